# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``ramlayer``: the RAM layer of this host, for operators and for its units. Standard library only.

Exit codes: 0 done, 1 it failed, 2 wrong usage or wrong configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from organism.core import _ramlayer as ramlayer
from organism.core import _ramlayer_answers as answers
from organism.core import _ramlayer_archive as archiving
from organism.core import _ramlayer_host as host
from organism.core import _ramlayer_units as units
from organism.core._keyvalue import Settings, SettingsError
from organism.core._overlay import LayerError
from organism.core._ramlayer import Layer
from organism.core._ramlayer_answers import Answer
from organism.core._root import Root
from organism.core._systemd import CommandError, Systemctl, booted

WITHOUT_SYSTEMD = "systemd is not the manager here: the layer was mounted directly, no unit was touched"


@dataclass(frozen=True)
class Call:
    """One invocation: what was asked, the configuration, and the machine."""

    arguments: argparse.Namespace
    settings: Settings
    root: Root

    @property
    def layer(self) -> Layer:
        return host.layer(self.settings)

    @property
    def habits(self) -> answers.Habits:
        return host.habits(self.settings)


def _sync(call: Call) -> Answer:
    return _snapped(call, answers.syncing(call.layer, call.root, call.habits))


def _tend(call: Call) -> Answer:
    return _snapped(call, answers.tending(call.layer, call.root, call.habits))


def _snapped(call: Call, answer: Answer) -> Answer:
    """With the ZFS snapshot of a new generation, where they are asked for."""
    keep = call.settings.integer("ZFS_SNAPSHOTS")
    if not keep or not answer["new"]:
        return answer
    kept = archiving.snapshot(call.layer, call.root, answer["number"], keep=keep)
    text = f"; {len(kept)} snapshots kept" if kept else "; no snapshot: PERSIST_DIR is not on ZFS"
    return answer | {"snapshots": kept, "message": answer["message"] + text}


def _mount(call: Call) -> Answer:
    told = host.problems(call.settings, call.root, call.arguments.config)
    if told:
        raise LayerError("; ".join(told))
    return answers.mounting(call.layer, call.root)


def _restore(call: Call) -> Answer:
    number = call.arguments.generation
    if call.arguments.from_archive:
        now = ramlayer.presence(call.layer, call.root)
        if now.ram is not None:
            raise LayerError(f"the layer is mounted, its next sync would undo this: stop {call.layer.unit} first")
        archiving.bring_back(call.layer, _archive_folder(call), number)
    return answers.restoring(call.layer, call.root, number)


def _archive_folder(call: Call) -> Path:
    reason = host.no_archive(call.settings, call.root)
    if reason:
        raise LayerError(f"no archive: {reason}")
    return Path(call.settings.text("ARCHIVE_DIR"))


def _archive(call: Call) -> Answer:
    done = archiving.archive(call.layer, _archive_folder(call), keep=call.settings.integer("ARCHIVE_KEEP"))
    what = "archived in" if done.new else "is in the archive already:"
    return {
        "message": f"generation {done.number} {what} {done.folder}", "number": done.number, "new": done.new,
        "generations": archiving.archived_numbers(done.folder),
    }  # fmt: skip


def _detect(call: Call) -> Answer:
    problems = host.problems(call.settings, call.root, call.arguments.config)
    memory = host.budget(call.settings, call.root)
    told = host.warnings(call.settings, call.root)
    lines = [memory.sum_text, *(f"problem: {text}" for text in problems), *(f"warning: {text}" for text in told)]
    return {
        "message": "\n".join(lines), "problems": problems, "warnings": told, "layers_mb": memory.total_mb,
        "allowed_mb": memory.allowed_mb, "machine_mb": memory.machine_mb,
        "zfs": archiving.dataset_of(call.root, call.layer.persist),
    }  # fmt: skip


def _status(call: Call) -> Answer:
    found = units.overview(call.settings, call.root, Systemctl())
    last, age = found["last_sync"], found["generation_age_s"]
    used = "-" if "used_mb" not in found else f"{found['used_mb']:.0f} of {found['size_mb']} MiB ({found['level']})"
    rows = [
        ("tmpfs", "OK" if found["tmpfs"] else "NO"),
        ("overlay", f"{'OK' if found['overlay'] else 'NO'}  {found['merged']}"),
        ("used", used),
        ("generation", f"{found['generation'] or '-'}" + ("" if age is None else f", {age:.0f} s old")),
        ("last sync", "-" if last is None else "ok" if last["ok"] else f"FAILED: {last['error']}"),
        *((name, state or "-") for name, state in found["timers"].items()),
        ("archive", found["archive"]["reason"] or f"{found['archive']['folder']}: "
         f"{', '.join(map(str, found['archive']['generations'])) or 'empty'}"),
    ]  # fmt: skip
    lines = [f"{name:18}{text}" for name, text in rows]
    if found["level"] in ("high", "full"):
        lines.append("the layer is nearly full: stop ramlayer.service, run ramlayer commit, start it; or raise RAM_MB")
    return found | {"message": "\n".join(lines)}


def _switch(call: Call, *, on: bool) -> Answer:
    if on:
        told = host.problems(call.settings, call.root, call.arguments.config)
        if told:
            raise LayerError("; ".join(told))
    systemctl = Systemctl()
    facts = units.gather(call.settings, call.root, call.arguments.config, systemctl)
    files = units.dropins(call.settings, call.root) if facts.units is not None else {}
    plan = units.plan(
        facts, wanted=units.wishes(call.settings, call.root, on=on), files=files,
        size_mb=call.settings.integer("RAM_MB") if on else None, merged=call.settings.text("MERGED"),
    )  # fmt: skip
    done = units.apply(plan, call.settings, call.root, systemctl)
    if not booted(call.root):
        done.append(WITHOUT_SYSTEMD)
    message = "\n".join([plan.difference.message, *done])
    return {"changed": plan.difference.changed, "messages": done, "message": message}


COMMANDS: dict[str, tuple[Callable[[Call], Answer], str]] = {
    "detect": (_detect, "show whether memory, disks and mounts fit"),
    "status": (_status, "show mounts, fill level, generations, timers and archive"),
    "enable": (lambda call: _switch(call, on=True), "switch units and timers on, mount"),
    "disable": (lambda call: _switch(call, on=False), "switch units and timers off, save and unmount"),
    "sync": (_sync, "save what changed to disk, as a new generation"),
    "tend": (_tend, "mount again what lost its overlay, and save (what ram-sync.timer does)"),
    "prewarm": (
        lambda call: answers.prewarming(call.layer, call.root, call.habits),
        "bring files of base into RAM, pinned and then newest first, up to the quota and the high watermark",
    ),
    "generations": (lambda call: answers.listing(call.layer), "list the generations on disk"),
    "restore": (_restore, "choose the generation that the next start restores (only while unmounted)"),
    "commit": (
        lambda call: answers.committing(call.layer, call.root),
        "merge the saved content into base (only while unmounted)",
    ),
    "archive": (_archive, "copy the current generation to ARCHIVE_DIR (what ram-archive.timer does)"),
    "mount": (_mount, "restore and mount (what ramlayer.service does at start)"),
    "unmount": (
        lambda call: answers.unmounting(call.layer, call.root),
        "save and unmount (what ramlayer.service does at stop)",
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line; shell completions are made from it."""
    made = argparse.ArgumentParser(prog="ramlayer", description="The RAM layer of this host.")
    made.add_argument("--config", default=host.CONFIG, help="settings file (default: %(default)s)")
    made.add_argument("--json", action="store_true", help="answer with one JSON object")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="answer in JSON")
        if name == "restore":
            command.add_argument("--generation", type=int, required=True, metavar="N", help="its number")
            command.add_argument("--from-archive", action="store_true", help="take it from ARCHIVE_DIR")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    root = Root()
    try:
        call = Call(arguments, host.load(root, arguments.config), root)
        answer = {"ok": True, **COMMANDS[arguments.command][0](call)}
        code, text = 0, str(answer["message"]).strip("\n")
    except SettingsError as error:
        code, text = 2, "\n".join(error.problems)
    except (LayerError, CommandError, OSError) as error:
        code, text = 1, str(error)
    if code:
        answer = {"ok": False, "error": text}
    if arguments.json:
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    elif code:
        sys.stderr.write(f"ramlayer: {text}\n")
    else:
        sys.stdout.write(f"{text}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
