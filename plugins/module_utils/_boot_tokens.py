# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel parameters of one capability, brought to the next boot and taken back, beside those of others.

The record of earlier state is ``kernel_cmdline-<capability>``. Its keys: the path of the file for GRUB; the path of
/etc/kernel/cmdline (the whole line before); ``/etc/kernel/cmdline#<group>`` (words of that group before and as set);
``wanted#<group>`` (what the capability wants, for comparison with other capabilities); ``refresh`` while the boot
loader has not read a change yet, so that a run that was cut short is finished by the next one.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _grub_dropin as grub
from . import _kernel_cmdline as kc
from ._atomic import write_atomic
from ._boot_loader import CMDLINE_FILE, GRUB, KERNEL_CMDLINE, BootLoader, written_lines
from ._difference import Difference
from ._earlier import FOLDER as EARLIER
from ._earlier import EarlierState, Kept
from ._root import Root
from ._systemd import CommandError, Runner, run_command

RECORD = "kernel_cmdline-"
PENDING = "/run/organism/reboot-required.d"
REFRESH = "refresh"
_WANTED = "wanted#"
_IN_FILE = f"{CMDLINE_FILE}#"

CAPABILITY = re.compile(r"[A-Za-z0-9_]+")

Words = dict[str, tuple[str, ...]]


class BootTokensError(Exception):
    """What must not or could not be done; the text names the object, the reason and the next step."""


@dataclass(frozen=True)
class Facts:
    """A host as this capability finds it. ``line``: first line of /etc/kernel/cmdline; ``rest``: all behind it."""

    loader: BootLoader
    dropin: str | None
    line: str | None
    rest: str
    live: str
    folder: bool
    kept: Mapping[str, Kept]
    others: Mapping[str, Words]
    waiting: tuple[str, ...]


@dataclass
class Plan:
    """``dropin`` and ``line``: texts after the change (None: the file goes). ``record``: keys to keep."""

    difference: Difference
    dropin: str | None
    line: str | None
    record: dict[str, Kept]
    groups: tuple[str, ...]
    refresh: bool
    kept_by_others: list[dict[str, str]] = field(default_factory=list)


def record(root: Root, capability: str) -> EarlierState:
    return EarlierState(f"{RECORD}{capability}", root)


def _words_of(kept: Mapping[str, Kept]) -> Words:
    return {key[len(_WANTED) :]: tuple(value.set) for key, value in kept.items() if key.startswith(_WANTED)}


def others(root: Root, capability: str) -> dict[str, Words]:
    """What other capabilities want, by capability. Raises EarlierStateError."""
    found = {}
    for name in root.listdir(EARLIER):
        if name.startswith(RECORD) and name.endswith(".json"):
            other = name[len(RECORD) : -len(".json")]
            if other != capability:
                found[other] = _words_of(record(root, other).kept)
    return found


def gather(root: Root, capability: str, loader: BootLoader) -> Facts:
    """Raises EarlierStateError."""
    file, dropin = root.path(CMDLINE_FILE), root.path(grub.path(capability))
    text = file.read_text(encoding="utf-8") if file.exists() else None
    first = (text or "").split("\n", 1)[0]
    return Facts(
        loader=loader,
        dropin=dropin.read_text(encoding="utf-8") if dropin.exists() else None,
        line=None if text is None else first,
        rest="\n" if text is None else text[len(first) :],
        live=root.read("/proc/cmdline"),
        folder=root.exists(grub.FOLDER),
        kept=record(root, capability).kept,
        others=others(root, capability),
        waiting=tuple(entry["key"] for entry in read_pending(root, capability)),
    )


def conflicts(wanted: Words, facts: Facts) -> list[str]:
    """Groups that another capability wants otherwise, in sentences."""
    found = []
    for other, theirs in sorted(facts.others.items()):
        for group in sorted(set(wanted) & set(theirs)):
            if wanted[group] != theirs[group]:
                mine, its = (" ".join(words[group]) or f"no {group}" for words in (wanted, theirs))
                found.append(f"{group}: wanted here is `{mine}`, and capability {other} has `{its}`")
    return found


def _lines(text: str | None) -> list[str] | None:
    """A text as a diff shows it best."""
    return None if text is None else text.splitlines()


def _plan_grub(capability: str, wanted: Words, facts: Facts, plan: Plan) -> None:
    path = grub.path(capability)
    kept = facts.kept.get(path)
    if wanted:
        plan.dropin = grub.render(capability, wanted)
        plan.record[path] = Kept(facts.dropin, plan.dropin)
        plan.record[grub.FOLDER] = Kept(facts.folder, True)
    elif kept is not None:
        if facts.dropin == kept.set:
            plan.dropin = kept.before
        elif facts.dropin is not None and facts.dropin != kept.before:
            plan.kept_by_others.append({"name": path, "reason": "changed by somebody else since it was written"})
    plan.difference.add(path, _lines(facts.dropin), _lines(plan.dropin))


def _plan_line(wanted: Words, facts: Facts, plan: Plan) -> None:
    """The first line of /etc/kernel/cmdline, edited group by group."""
    held = {key[len(_IN_FILE) :]: kept for key, kept in facts.kept.items() if key.startswith(_IN_FILE)}
    if not wanted and not held:
        return
    base = facts.line if facts.line is not None else kc.boot_file_line(facts.live)
    now = kc.parse(base)
    if wanted and not now.has_root():
        source = CMDLINE_FILE if facts.line is not None else "/proc/cmdline, which stands in for it,"
        raise BootTokensError(
            f"the first line of {source} has no root=, and such a system does not boot; write the whole command line "
            f"of this host into {CMDLINE_FILE} first"
        )
    doubled = sorted(set(wanted) & {token.group for token in kc.parse(facts.rest.replace("\n", " ")).tokens})
    if doubled and facts.loader.name == "systemd-boot":  # kernel-install joins the lines, proxmox-boot-tool does not
        raise BootTokensError(f"{CMDLINE_FILE} has {', '.join(doubled)} below its first line; put all on one line")
    edits: Words = {}
    for group, kept in held.items():
        if group in wanted:
            continue
        present = tuple(token.text for token in now.of(group))
        if any(group in theirs for theirs in facts.others.values()):
            continue
        if present == tuple(kept.set):
            edits[group] = tuple(kept.before)
        elif present != tuple(kept.before):
            reason = f"`{' '.join(present)}` was put there by somebody else since"
            plan.kept_by_others.append({"name": f"{CMDLINE_FILE}: {group}", "reason": reason})
    for group, words in wanted.items():
        before = tuple(token.text for token in now.of(group))
        plan.record[f"{_IN_FILE}{group}"] = Kept(list(before), list(words))
        if before != words:
            edits[group] = words
    after: str | None = kc.replace(now, edits).render() if edits else base
    whole = facts.kept.get(CMDLINE_FILE)
    if wanted:
        plan.record[CMDLINE_FILE] = whole or Kept({"existed": facts.line is not None, "line": base}, None)
    elif whole is not None and kc.same_tokens(str(after), whole.before["line"]):
        after = whole.before["line"] if whole.before["existed"] else None  # to the letter, blanks and order too
    plan.line = after
    plan.difference.add(CMDLINE_FILE, facts.line, plan.line)


def make_plan(capability: str, wanted: Words, facts: Facts) -> Plan:
    """What to do so that the next boot has these words (none: what was there before). Raises BootTokensError."""
    clash = conflicts(wanted, facts)
    if clash:
        raise BootTokensError(
            f"capability {capability} cannot have its kernel parameters: {'; '.join(clash)}. Agree on one value, or "
            "take the other one back first (kernel_cmdline, state=absent)"
        )
    groups = [*wanted, *_words_of(facts.kept), *facts.waiting]
    plan = Plan(Difference(), facts.dropin, facts.line, {}, tuple(dict.fromkeys(groups)), False)
    _plan_grub(capability, wanted if GRUB in facts.loader.places else {}, facts, plan)
    _plan_line(wanted if KERNEL_CMDLINE in facts.loader.places else {}, facts, plan)
    plan.record |= {f"{_WANTED}{group}": Kept(None, list(words)) for group, words in wanted.items()}
    if REFRESH in facts.kept:
        plan.difference.add("boot loader", "has not read the last change", "refreshed")
    plan.refresh = plan.difference.changed
    return plan


def coming(root: Root, capability: str, facts: Facts, plan: Plan, run: Runner = run_command) -> list[kc.Cmdline]:
    """The command lines of the next boot as far as settings make them, one a place. Raises CommandError."""
    lines = []
    if GRUB in facts.loader.places:
        lines.append(kc.parse(grub.evaluate(root, {grub.path(capability): plan.dropin}, run)))
    if KERNEL_CMDLINE in facts.loader.places:
        lines.append(kc.parse(plan.line if plan.line is not None else kc.boot_file_line(facts.live)))
    return lines


def overruled(wanted: Words, lines: Iterable[kc.Cmdline]) -> list[str]:
    """Wanted words that would not count at the next boot, since something else has the last word."""
    found = []
    for line in lines:
        for group, words in wanted.items():
            mine = kc.effective([kc.token(word) for word in words], group)
            theirs = kc.effective(line.tokens, group)
            if mine != theirs:
                found.append(
                    f"{group}: wanted `{' '.join(mine) or 'nothing'}`, found `{' '.join(theirs) or 'nothing'}`"
                )
    return sorted(set(found))


def pending(facts: Facts, plan: Plan, lines: Iterable[kc.Cmdline]) -> list[dict[str, str | None]]:
    """What a reboot would change of the parameters that this capability has or had."""
    live = kc.parse(facts.live)
    found = [entry for line in lines for entry in kc.pending(plan.groups, live, line)]
    return [entry for number, entry in enumerate(found) if entry not in found[:number]]


def read_pending(root: Root, capability: str) -> list[dict[str, Any]]:
    """The parameters that an earlier run left waiting for a reboot; none after it, since /run is empty then."""
    text = root.read_or_none(f"{PENDING}/{capability}")
    try:
        return [entry for entry in json.loads(text or "{}").get("pending", []) if isinstance(entry.get("key"), str)]
    except (ValueError, AttributeError):
        return []


def write_pending(root: Root, capability: str, waiting: list[dict[str, str | None]]) -> None:
    """Leave or remove ``/run/organism/reboot-required.d/<capability>``. Raises OSError."""
    path = root.path(f"{PENDING}/{capability}")
    if not waiting:
        path.unlink(missing_ok=True)
        return
    boot_id = root.read_or_none("/proc/sys/kernel/random/boot_id")
    text = json.dumps({"format": 1, "capability": capability, "boot_id": boot_id, "pending": waiting}, indent=1) + "\n"
    if root.read_or_none(f"{PENDING}/{capability}") != text.rstrip("\n"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text, durable=False)


def check_writable(root: Root, capability: str, facts: Facts, plan: Plan) -> None:
    """Raises BootTokensError when a file cannot be replaced, before anything is."""
    for name, before, after in (
        (grub.path(capability), facts.dropin, plan.dropin),
        (CMDLINE_FILE, facts.line, plan.line),
    ):
        if before == after:
            continue
        path = root.path(name)
        place = path.parent
        while not place.exists():
            place = place.parent
        for thing in (place, path):
            if thing.exists() and not os.access(thing, os.W_OK):
                raise BootTokensError(f"{name} cannot be written: {thing} is read-only; nothing was changed")


def _put(root: Root, name: str, content: str | bytes | None) -> None:
    path = root.path(name)
    data = content.encode() if isinstance(content, str) else content
    if data == (path.read_bytes() if path.exists() else None):
        return
    if data is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data, mode=path.stat().st_mode & 0o7777 if path.exists() else 0o644)


def check_written(wanted: Words, loader: BootLoader, root: Root) -> None:
    """Raises BootTokensError when the loader's menu has no entry with the words: some set-ups write none in silence."""
    lines = written_lines(root, loader)
    if lines is None or any(not overruled(wanted, [kc.parse(line)]) for line in lines):
        return
    hint = "kernel-install writes none without layout=bls and BOOT_ROOT in /etc/kernel/install.conf"
    where = "/boot/grub/grub.cfg" if loader.name == "grub" else f"the entries of systemd-boot ({hint})"
    raise BootTokensError(f"the boot loader was refreshed and no entry has the new parameters in {where}")


def apply(
    root: Root,
    capability: str,
    wanted: Words,
    facts: Facts,
    plan: Plan,
    refresh: Iterable[Iterable[str]],
    run: Runner = run_command,
) -> list[str]:
    """Record, write, let the boot loader read it; the commands that ran. Raises BootTokensError with all put back."""
    state = record(root, capability)
    if not plan.difference:
        _hand_over(root, facts, plan, state)
        _settle(state, plan)
        return []
    earlier = dict(state.kept)
    originals = {
        name: root.path(name).read_bytes() if root.exists(name) else None
        for name in (grub.path(capability), CMDLINE_FILE)
    }
    state.remember({**plan.record, REFRESH: Kept(None, "due")})
    done: list[str] = []
    try:
        _put(root, grub.path(capability), plan.dropin)
        if plan.line != facts.line:
            _put(root, CMDLINE_FILE, None if plan.line is None else plan.line + facts.rest)
        for command in refresh:
            done.append(" ".join(command))
            run(list(command))
        check_written(wanted, facts.loader, root)
    except (OSError, CommandError, BootTokensError) as error:
        for name, content in originals.items():
            _put(root, name, content)
        if not facts.folder:
            _remove_if_empty(root)
        _put_record_back(state, earlier, due=bool(done))
        told = f" Then run `{done[-1]}` until it works: it may have stopped half-way." if done else ""
        raise BootTokensError(f"{error}. The files are again as they were.{told}") from error
    made = state.kept.get(grub.FOLDER)
    _hand_over(root, facts, plan, state)
    if made is not None and made.before is False and grub.FOLDER not in plan.record:
        _remove_if_empty(root)
    _settle(state, plan)
    return done


def _remove_if_empty(root: Root) -> None:
    folder = root.path(grub.FOLDER)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _put_record_back(state: EarlierState, earlier: Mapping[str, Kept], *, due: bool) -> None:
    state.forget([key for key in state.kept if key not in earlier])
    state.remember(earlier)
    if due and earlier:
        state.remember({REFRESH: Kept(None, "due")})


def _hand_over(root: Root, facts: Facts, plan: Plan, state: EarlierState) -> None:
    """What another capability still needs becomes its to restore, with what was there before both."""
    for key, kept in state.kept.items():
        if key in plan.record or not (key.startswith(_IN_FILE) or key == grub.FOLDER):
            continue
        for other in facts.others:
            heir = record(root, other)
            if key in heir.kept and heir.kept[key].before == kept.set:  # it came after this one
                inherited = Kept(kept.before, heir.kept[key].set)
                heir.forget([key])
                heir.remember({key: inherited})
                break


def _settle(state: EarlierState, plan: Plan) -> None:
    """The record holds what is wanted now and nothing more."""
    stale = [key for key in state.kept if key not in plan.record]
    if stale:
        state.forget(stale)
    state.remember(plan.record)
