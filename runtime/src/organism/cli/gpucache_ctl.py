# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``gpucache-ctl``: the RAM caches of this machine's GPUs, for operators, for their units and for the agent.

Exit codes: 0 done, 1 it failed for at least one GPU (the others are done), 2 wrong usage or wrong configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from organism._version import VERSION
from organism.core import _gpucache as gpucache
from organism.core import _gpucache_units as units
from organism.core import _ramlayer_answers as answers
from organism.core import _ramlayer_host as host
from organism.core._bus import IDENTIFIER
from organism.core._keyvalue import Settings, SettingsError
from organism.core._overlay import LayerError
from organism.core._ramlayer import Layer
from organism.core._ramlayer_answers import Answer
from organism.core._root import Root
from organism.core._systemd import CommandError, Systemctl, booted

WITHOUT_SYSTEMD = "systemd is not the manager here: mounts were done directly, no unit was touched"


@dataclass(frozen=True)
class Call:
    """One invocation: what was asked, the configuration, and the machine."""

    arguments: argparse.Namespace
    settings: Settings
    root: Root

    def layer(self, gpu: str) -> Layer:
        return gpucache.layer(self.settings, gpu)


class UsageError(Exception):
    """The call or the configuration is wrong; nothing was done."""


# ---- one GPU at a time ----------------------------------------------------------------------------------------------


def _habits(call: Call) -> answers.Habits:
    return gpucache.habits(call.settings)


def _mount(call: Call, gpu: str) -> Answer:
    if gpu not in gpucache.gpus(call.settings, call.root).ids:
        raise LayerError(f"{gpu} is not a GPU of this machine's caches; see gpucache-ctl detect")
    return answers.mounting(call.layer(gpu), call.root)


# ---- all of them ----------------------------------------------------------------------------------------------------


def _detect(call: Call) -> tuple[Answer, list[str]]:
    found = gpucache.gpus(call.settings, call.root)
    known = {entry["id"]: entry for entry in gpucache.read_map(call.root, call.settings.text("GPU_MAP")) or []}
    others_mb = host.configured_mb(call.root)
    memory = gpucache.budget(call.settings, len(found.ids), call.root, others_mb=others_mb)
    told = gpucache.warnings(call.settings, found, call.root, others_mb=others_mb)
    if memory.refusal:
        told.insert(0, memory.refusal)
    caches = gpucache.cpu_caches(call.root)
    answer: Answer = {
        "source": found.source,
        "gpus": [{"gpu": gpu, **known.get(gpu, {})} for gpu in found.ids],
        "pci": [{"address": address, "backend": backend} for address, backend in gpucache.pci_gpus(call.root)],
        "cache_mb": memory.each_mb, "others_mb": others_mb, "total_mb": memory.total_mb,
        "machine_mb": memory.machine_mb, "warnings": told, "cpu_caches": caches,
    }  # fmt: skip
    lines = [f"{len(found.ids)} GPUs, from {found.source}; {memory.sum_text}"]
    for gpu in found.ids:
        entry = known.get(gpu, {})
        lines.append("  ".join([f"{gpu:12}", *(str(entry.get(k) or "-") for k in ("backend", "address", "model"))]))
    lines += [f"L{c['level']} {c['type']} {c['size']} shared by CPU {c['cpus']}" for c in caches]
    return answer, lines + [f"warning: {text}" for text in told]


_COLUMNS = ("GPU", "TMPFS", "OVL", "USED", "LEVEL", "GEN", "AGE", "LAST SYNC", "TIMER")


def _status(call: Call, ids: Sequence[str]) -> tuple[Answer, list[str]]:
    shown = units.overview(call.settings, ids, call.root, Systemctl())
    rows: list[tuple[str, ...]] = [_COLUMNS]
    remarks = []
    for gpu in shown:
        last = gpu["last_sync"]
        used = "-" if "used_mb" not in gpu else f"{gpu['used_mb']:.0f}/{gpu['size_mb']} MiB"
        age = gpu["generation_age_s"]
        rows.append((
            gpu["gpu"], "OK" if gpu["tmpfs"] else "NO", "OK" if gpu["overlay"] else "NO", used, gpu["level"],
            str(gpu["generation"] or "-"), "-" if age is None else f"{age:.0f} s",
            "-" if last is None else "ok" if last["ok"] else "FAILED", gpu["timer"] or "-",
        ))  # fmt: skip
        if last is not None and not last["ok"]:
            remarks.append(f"last sync failed: {last['error']}")
        if gpu["level"] in ("high", "full"):
            hint = f"gpucache-ctl spill {gpu['gpu']} makes room between two jobs; or raise CACHE_MB"
            remarks.append(f"{gpu['gpu']} is {gpu['used_percent']} % full: {hint}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return {"gpus": shown, "remarks": remarks}, lines + remarks


def _switch(call: Call, ids: Sequence[str], on: bool) -> tuple[Answer, list[str]]:
    everything = not call.arguments.gpus
    found = units.instances(call.root) + units.mounted_gpus(call.settings, call.root)
    if on:
        found_gpus = gpucache.gpus(call.settings, call.root)
        gpucache.check(call.settings, found_gpus, call.root, others_mb=host.configured_mb(call.root))
    elif everything:
        ids = sorted({*ids, *found})
    wanted = units.wishes(call.settings, ids if on else (), () if on else ids)
    if not on:
        wanted[units.AGENT] = units.Wish(False, False)
    if not everything:
        # the agent serves all GPUs: it is switched with all of them
        del wanted[units.AGENT]
    systemctl = Systemctl()
    facts = units.gather(call.settings, ids, call.root, call.arguments.config, systemctl)
    files = units.dropins(call.settings, call.root) if facts.units is not None else {}
    plan = units.plan(
        facts, wanted=wanted, files=files, ids=ids if on else (), size_mb=call.settings.integer("CACHE_MB")
    )
    told = units.apply(plan, call.settings, call.root, systemctl)
    if not booted(call.root):
        told.append(WITHOUT_SYSTEMD)
    left = [] if on else [gpu for gpu in ids if gpu in units.mounted_gpus(call.settings, call.root)]
    if left:
        raise LayerError(f"still mounted: {', '.join(left)}; see gpucache-ctl status")
    return {"changed": plan.difference.changed, "gpus": list(ids), "messages": told}, [plan.difference.message, *told]


ONE: dict[str, tuple[Callable[[Call, str], Answer], str]] = {
    "sync": (
        lambda call, gpu: answers.syncing(call.layer(gpu), call.root, _habits(call)),
        "save what changed to disk, as a new generation",
    ),
    "tend": (
        lambda call, gpu: answers.tending(call.layer(gpu), call.root, _habits(call)),
        "save, and make room when the cache is too full (what gpucache-sync@ID.timer does)",
    ),
    "spill": (
        lambda call, gpu: answers.spilling(call.layer(gpu), call.root, _habits(call)),
        "bring the coldest files down to base, between two jobs",
    ),
    "prewarm": (
        lambda call, gpu: answers.prewarming(call.layer(gpu), call.root, _habits(call)),
        "bring files of base into RAM, pinned and then newest first, up to the quota and the high watermark",
    ),
    "commit": (
        lambda call, gpu: answers.committing(call.layer(gpu), call.root),
        "merge the saved content into base (only while unmounted)",
    ),
    "generations": (lambda call, gpu: answers.listing(call.layer(gpu)), "list the generations on disk"),
    "restore": (
        lambda call, gpu: answers.restoring(call.layer(gpu), call.root, call.arguments.generation),
        "choose the generation that the next start restores (only while unmounted)",
    ),
    "mount": (_mount, "restore and mount (what gpucache@ID.service does at start)"),
    "unmount": (
        lambda call, gpu: answers.unmounting(call.layer(gpu), call.root),
        "save and unmount (what gpucache@ID.service does at stop)",
    ),
}
ALL = {
    "detect": "show the GPUs, where their ids come from, and whether memory and disks fit",
    "status": "show mounts, fill level, generations, syncs and timers",
    "enable": "switch units and timers on, mount",
    "disable": "switch units, timers and the agent off, save and unmount",
}


def parser() -> argparse.ArgumentParser:
    """The command line; shell completions are made from it."""
    made = argparse.ArgumentParser(prog="gpucache-ctl", description="RAM caches of this machine's GPUs.")
    made.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    made.add_argument("--config", default=gpucache.CONFIG, help="settings file (default: %(default)s)")
    made.add_argument("--json", action="store_true", help="answer with one JSON object")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in [*ALL.items(), *((name, text) for name, (_run, text) in ONE.items())]:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="answer in JSON")
        if name != "detect":
            command.add_argument("gpus", nargs="*", metavar="GPU", help="logical ids; without one, all of this machine")
        if name == "restore":
            command.add_argument("--generation", type=int, required=True, metavar="N", help="its number")
    return made


def run(arguments: argparse.Namespace, root: Root) -> tuple[int, Answer, list[str]]:
    """Exit code, answer for machines, lines for people. Raises UsageError."""
    try:
        settings = gpucache.load(root, arguments.config)
        given: list[str] = getattr(arguments, "gpus", [])
        ids = given or _all(arguments.command, settings, root)
        _known(arguments.command, given, settings, root)
        call = Call(arguments, settings, root)
        if arguments.command in ONE:
            return _each(call, ids)
        try:
            if arguments.command == "detect":
                answer, lines = _detect(call)
            elif arguments.command == "status":
                answer, lines = _status(call, ids)
            else:
                answer, lines = _switch(call, ids, arguments.command == "enable")
        except (LayerError, CommandError, OSError) as error:
            return 1, {"ok": False, "error": str(error)}, [f"error: {error}"]
        return 0, {"ok": True, **answer}, lines
    except SettingsError as error:
        raise UsageError("\n".join(error.problems)) from None


def _all(command: str, settings: Settings, root: Root) -> list[str]:
    """The GPUs of this machine. Raises SettingsError when there is none, unless what is left is to be switched off."""
    try:
        return list(gpucache.gpus(settings, root).ids)
    except SettingsError:
        if command != "disable":
            raise
        return []


def _known(command: str, given: Sequence[str], settings: Settings, root: Root) -> None:
    """Raises UsageError for a GPU that is not this machine's; what was configured earlier can still be taken down."""
    for gpu in given:
        if not IDENTIFIER.fullmatch(gpu):
            raise UsageError(f"{gpu!r} is no GPU id; ids match {IDENTIFIER.pattern}")
    if given and command not in ("unmount", "disable", "mount"):
        known = gpucache.gpus(settings, root).ids
        strange = [gpu for gpu in given if gpu not in known]
        if strange:
            raise UsageError(f"no cache of {', '.join(strange)} on this machine; there are: {', '.join(known)}")


def _each(call: Call, ids: Sequence[str]) -> tuple[int, Answer, list[str]]:
    given: list[Answer] = []
    lines: list[str] = []
    work = ONE[call.arguments.command][0]
    for gpu in ids:
        try:
            answer = {"gpu": gpu, "ok": True, **work(call, gpu)}
            lines.append(f"{gpu}: {answer['message']}")
        except (LayerError, OSError) as error:
            answer = {"gpu": gpu, "ok": False, "error": str(error)}
            lines.append(f"error: {error}")
        given.append(answer)
    whole = all(answer["ok"] for answer in given)
    return (0 if whole else 1), {"ok": whole, "gpus": given}, lines


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        code, answer, lines = run(arguments, Root())
    except UsageError as error:
        code, answer, lines = 2, {"ok": False, "error": str(error)}, [f"gpucache-ctl: {error}"]
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        for line in lines:
            failed = line.startswith(("error: ", "gpucache-ctl: "))
            print(line, file=sys.stderr if failed else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
