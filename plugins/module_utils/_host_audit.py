# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Is what was set up on this host in force now, and will it be after a boot? Looks, and changes nothing.

Each record of earlier state (``_earlier``) says what a capability has set last. For each capability there is a check
``host.now`` and a check ``host.boot``, or one for every single thing that is missing. What cannot be judged is SKIP
with the reason, and never counts as passed. Then come ``host.cpu_plan``, ``host.level`` and ``host.reboot``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from . import _check, _cpu_list, _cpu_plan, _levels, _reboot
from ._check import Check
from ._earlier import FOLDER, EarlierState, EarlierStateError
from ._nic import Nics
from ._qemu_pin import Hands
from ._root import Root
from ._systemd import Runner, run_command

NOW, BOOT = "host.now", "host.boot"
_SITE = "ansible-playbook organism.proxmox.site --tags {}"

_TAGS = {
    "irq_lowlat": "irq",
    "irq_affinity": "irq",
    "nic_flows": "steering",
    "nic_steering": "steering,nic",
    "nic_steering-packets": "steering",
    "nic_steering-hardware": "nic",
    "steer_keeper": "steering,irq,nic",
    "qemu_pin_keeper": "qemu_pin",
    "zfs_arc": "zfs",
    "zfs_layout": "zfs",
}


class AuditError(Exception):
    """Nothing can be looked at; the text says why and what to do."""


@dataclass
class Host:
    """The host, and what reads it; a test gives its own."""

    root: Root = field(default_factory=Root)
    run: Runner = run_command
    nics: Nics | None = None
    hands: Hands | None = None

    def __post_init__(self) -> None:
        self.nics = self.nics or Nics(self.root, run=self.run)
        self.hands = self.hands or Hands(root=self.root, run=self.run)


@dataclass
class Verdict:
    """What was found of one capability. ``held`` and ``kept``: how many things are right now, and after a boot."""

    name: str
    held: int = 0
    kept: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    """(check, thing, what was found and what was wanted)"""
    unknown: list[tuple[str, str, str]] = field(default_factory=list)
    """(check, thing, why it was not judged)"""
    notes: list[str] = field(default_factory=list)

    def judge(self, check: str, thing: str, ok: bool, detail: str) -> None:
        """One thing: counted when it is right, told with ``detail`` when it is not."""
        if not ok:
            self.wrong.append((check, thing, detail))
        elif check == NOW:
            self.held += 1
        else:
            self.kept += 1

    def skip(self, check: str, thing: str, why: str) -> None:
        self.unknown.append((check, thing, why))

    def checks(self, seconds: float) -> list[Check]:
        """The records: a sum for now and for the next boot where all that was judged is right, and each exception."""
        found = []
        for check, good, word in ((NOW, self.held, "in force"), (BOOT, self.kept, "set again at boot")):
            bad = [Check(check, f"{self.name} {thing}".strip(), False, 0.0, detail, next_step(self.name))
                   for where, thing, detail in self.wrong if where == check]  # fmt: skip
            if good and not bad:
                note = f"; {'; '.join(self.notes)}" if self.notes and check == NOW else ""
                found.append(Check(check, self.name, True, seconds, f"{good} {word}{note}"))
                seconds = 0.0
            found += bad
            found += [Check(check, f"{self.name} {thing}".strip(), None, 0.0, why)
                      for where, thing, why in self.unknown if where == check]  # fmt: skip
        if not found:
            found.append(Check(NOW, self.name, None, seconds, "its record holds nothing that could be judged"))
        return found


Judge = Callable[[Host, EarlierState], Verdict]


def next_step(record: str) -> str:
    """The command that sets a capability up again."""
    name = record.removeprefix("kernel_cmdline-")
    tag = _TAGS.get(name, name)
    known = {capability for level in _levels.LEVELS.values() for capability in level.capabilities}
    if set(tag.split(",")) <= known:
        return _SITE.format(tag)
    return f"run the playbook again that has set {name} up"


def records(root: Root) -> list[str]:
    """Names of all records. Raises AuditError when they cannot be read."""
    folder = root.path(FOLDER)
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise AuditError(f"{FOLDER} cannot be read: run this as root")
    return [name.removesuffix(".json") for name in root.listdir(FOLDER) if name.endswith(".json")]


def audit(host: Host, judges: Mapping[str, Judge]) -> list[Check]:
    """Every check. ``judges``: by name of a record, or its beginning; the empty name judges the rest.

    Raises AuditError.
    """
    found: list[Check] = []
    for name in records(host.root):
        started = time.monotonic()
        try:
            kind = max((each for each in judges if name.startswith(each)), key=len)
            verdict = judges[kind](host, EarlierState(name, host.root))
        except (EarlierStateError, OSError) as error:
            verdict = Verdict(name)
            verdict.wrong.append((NOW, "", str(error)))
        found += verdict.checks(time.monotonic() - started)
    if not found:
        found.append(Check(NOW, "", None, 0.0, f"nothing is set up here: {FOLDER} has no record"))
    return [*found, _plan(host.root), *_marks(host.root), *_waiting(host.root)]


def _plan(root: Root) -> Check:
    try:
        plan = _cpu_plan.load(root)
        online = set(_cpu_list.parse(root.read("/sys/devices/system/cpu/online")))
    except (ValueError, OSError) as error:
        return Check("host.cpu_plan", "", False, 0.0, str(error), _SITE.format("cpu_plan"))
    if plan is None:
        return Check("host.cpu_plan", "", None, 0.0, f"there is no {_cpu_plan.PATH}: level 1 has not run")
    gone = sorted({*plan.host, *plan.vcpu, *plan.io} - online)
    if gone:
        detail = f"the plan has CPUs {_cpu_list.render(gone)}, which are not online"
        return Check("host.cpu_plan", "", False, 0.0, detail, _SITE.format("cpu_plan"))
    zones = ", ".join(f"{zone.upper()} {_cpu_list.render(plan.zone(zone))}" for zone in _cpu_plan.ZONES)
    return Check("host.cpu_plan", "", True, 0.0, zones)


def markers(root: Root) -> dict[int, _levels.Marker | None]:
    """Levels of a host (0 to 4) to what says that they have finished."""
    texts = {
        number: root.read_or_none(_levels.marker_path(number))
        for number, level in _levels.LEVELS.items()
        if level.applies_to(["pve"])
    }
    return {number: None if text is None else _levels.parse_marker(text) for number, text in texts.items()}


def _marks(root: Root) -> list[Check]:
    found = []
    known = markers(root)
    highest = max((number for number, marker in known.items() if marker is not None), default=-1)
    for number, marker in known.items():
        level, subject = _levels.LEVELS[number], f"{number}"
        reason = _levels.obstacle(level, marker, _levels.COLLECTION_VERSION)
        if reason is None and marker is not None:
            detail = f"{level.name}: finished by {marker.version} on {marker.finished}"
            found.append(Check("host.level", subject, True, 0.0, detail))
        elif number > highest:
            found.append(Check("host.level", subject, None, 0.0, f"{level.name}: has not finished here"))
        else:
            found.append(Check("host.level", subject, False, 0.0, str(reason), _SITE.format(f"level{number}")))
    return found


def _waiting(root: Root) -> list[Check]:
    try:
        waiting = [_reboot.describe(entry) for entry in _reboot.waiting(root)]
    except OSError as error:
        return [Check("host.reboot", "", None, 0.0, f"this host does not say how it was booted: {error}")]
    if not waiting:
        return [Check("host.reboot", "", True, 0.0, "nothing waits for a reboot")]
    return [Check("host.reboot", "", None, 0.0, f"waits for a reboot: {entry}") for entry in waiting]


def summary(checks: list[Check]) -> str:
    """One line for people."""
    good, bad, left = (_check.count(checks, ok) for ok in (True, False, None))
    return f"{good} passed, {bad} failed, {left} skipped"
