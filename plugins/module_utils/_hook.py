# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one hook of a VM: which entries run in which phase, and which of them must not.

Proxmox VE knows one hookscript a VM and calls it ``SCRIPT VMID PHASE`` under the VM's lock, without any time limit; an
exit code other than 0 of phase pre-start refuses the start, in the other phases it is a warning (PVE::GuestHelpers,
exec_hookscript). ``organism-hook`` is that script and runs the executables of ``/etc/organism/hook.d/PHASE/`` in the
order of their names, then or before them the hookscript that the VM had before (``/etc/organism/hook.foreign``).

A migrated or hibernated VM passes pre-start and post-start too (with ``PVE_MIGRATED_FROM`` on a migration's target), a
VM whose start fails gets no post-stop, and a guest that powers itself off gets no pre-stop: phases come without their
counterparts.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._root import Root

PHASES = ("pre-start", "post-start", "pre-stop", "post-stop")
FOLDER = "/etc/organism/hook.d"
FOREIGN = "/etc/organism/hook.foreign"
CONFIG = "/etc/organism/hook.json"
FORMAT = 1

ENTRY_TIMEOUT_S = 60.0
TOTAL_TIMEOUT_S = 300.0
TIMED_OUT = 124  # as timeout(1)
REFUSED = 126  # as a shell says of what it may not execute

_OWN_LIMIT = re.compile(rb"^# organism-hook: timeout=([0-9]{1,5})$", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # as run-parts(8): no editor's or package manager's leftovers


class HookError(Exception):
    """The call or its settings are wrong; the text names the object and the next step."""


@dataclass(frozen=True)
class Settings:
    """Seconds. ``timeouts``: of single entries by name, before what an entry's own head says, before ``entry``.

    ``total`` bounds a whole phase, the foreign script included.
    """

    entry: float = ENTRY_TIMEOUT_S
    total: float = TOTAL_TIMEOUT_S
    timeouts: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        return self.timeouts.get(name, self.entry)

    def text(self) -> str:
        """The settings' file."""
        raw = {
            "format": FORMAT,
            "entry_timeout_s": self.entry,
            "total_timeout_s": self.total,
            "timeouts_s": dict(sorted(self.timeouts.items())),
        }
        return json.dumps(raw, indent=1) + "\n"


@dataclass(frozen=True)
class Entry:
    """One thing to run. ``refused``: why it must not run, or None. ``foreign``: the VM's earlier hookscript."""

    name: str
    path: str
    timeout: float
    refused: str | None = None
    foreign: bool = False


@dataclass(frozen=True)
class Plan:
    """What a call runs, in this order. ``ignored``: names in the folder that are no entries, with the reason."""

    vmid: int | None
    phase: str
    entries: tuple[Entry, ...]
    total: float
    ignored: tuple[tuple[str, str], ...] = ()

    @property
    def stops_at_failure(self) -> bool:
        """Only before a start can a failure prevent anything; the other phases run to their end."""
        return self.phase == "pre-start"


def check_call(arguments: list[str]) -> tuple[int, str]:
    """VMID and phase of a call as Proxmox VE makes it. Raises HookError."""
    if len(arguments) != 2:
        raise HookError(f"expected VMID PHASE, got {len(arguments)} words; phases are {', '.join(PHASES)}")
    vmid, phase = arguments
    if not re.fullmatch(r"[1-9][0-9]{2,8}", vmid):  # PVE::JSONSchema, pve-vmid: 100 to 999999999
        raise HookError(f"{vmid!r} is no VMID (100 to 999999999)")
    if phase not in PHASES:
        raise HookError(f"{phase!r} is no phase; phases are {', '.join(PHASES)}")
    return int(vmid), phase


def settings(root: Root) -> Settings:
    """The time limits; those of the program where there is no file. Raises HookError for a file that cannot be used."""
    try:
        raw = json.loads(root.read(CONFIG))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise HookError(f"{CONFIG}: {error}; run the role vm_hook again") from error
    try:
        if raw["format"] != FORMAT:
            raise HookError(f"{CONFIG}: format {raw['format']}, and this version reads {FORMAT}")
        found = Settings(
            float(raw["entry_timeout_s"]),
            float(raw["total_timeout_s"]),
            {str(name): float(seconds) for name, seconds in raw.get("timeouts_s", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HookError(f"{CONFIG} holds no time limits ({error!r}); run the role vm_hook again") from error
    check_settings(found)
    return found


def check_settings(found: Settings) -> None:
    """Raises HookError for limits that would run nothing."""
    for name, seconds in (("entry", found.entry), ("total", found.total), *found.timeouts.items()):
        if not 0 < seconds <= 86400:
            raise HookError(f"the time limit {name} = {seconds:g} s is not between 0 and a day")


def plan(root: Root, phase: str, vmid: int | None, limits: Settings, owner: int = 0) -> Plan:
    """What a call of this phase runs.

    ``vmid`` None: for any VM, without a foreign script. ``owner``: a uid beside root's that files may belong to.
    Raises HookError for a record of a foreign script that cannot be read.
    """
    folder = f"{FOLDER}/{phase}"
    entries, ignored = [], []
    unsafe = _unsafe(root, folder, owner) if root.exists(folder) else None
    for name in root.listdir(folder):
        if not _NAME.fullmatch(name):
            ignored.append((name, "its name has other characters than letters, digits, _ and -"))
            continue
        path = f"{folder}/{name}"
        reason = f"its folder {folder} {unsafe}" if unsafe else _refusal(root, path, owner)
        limit = limits.of(name) if reason or name in limits.timeouts else _own_limit(root, path) or limits.of(name)
        entries.append(Entry(name, path, limit, reason))
    foreign = foreign_of(root, vmid, limits) if vmid is not None else None
    if foreign is not None:
        # on the way down in reverse: what was set up last is taken down first
        entries.insert(len(entries) if phase.endswith("-start") else 0, foreign)
    return Plan(vmid, phase, tuple(entries), limits.total, tuple(ignored))


def _own_limit(root: Root, path: str) -> float | None:
    """Seconds that a script's own head says it needs (``# organism-hook: timeout=270``), None where it says nothing."""
    with root.path(path).open("rb") as script:
        found = _OWN_LIMIT.search(script.read(1024))
    return float(found[1]) if found and 0 < int(found[1]) <= 86400 else None


def _refusal(root: Root, path: str, owner: int) -> str | None:
    real = root.path(path)
    try:
        mode = real.stat().st_mode
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(mode):
        return "is no file"
    if unsafe := _unsafe(root, path, owner):
        return unsafe
    if not mode & 0o111:
        return "is not executable (chmod 755 it, or remove it)"
    return None


def _unsafe(root: Root, path: str, owner: int) -> str | None:
    """Why others than root could have written what would run as root."""
    status = root.path(path).stat()
    if status.st_mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0:
        return f"can be written by group {status.st_gid} (mode {stat.S_IMODE(status.st_mode):04o})"
    if status.st_uid not in (0, owner):
        return f"belongs to user {status.st_uid}, not to root"
    return None


# The hookscript that a VM had before ----------------------------------------------------------------------------------


def foreign_path(vmid: int) -> str:
    return f"{FOREIGN}/{vmid}.json"


def foreign_text(volume: str, path: str) -> str:
    """The record of a VM's earlier hookscript. ``volume``: as in the VM's configuration; ``path``: where that lies."""
    return json.dumps({"format": FORMAT, "volume": volume, "path": path}, indent=1) + "\n"


def foreign_record(root: Root, vmid: int) -> dict[str, Any] | None:
    """``volume`` and ``path`` of a VM's earlier hookscript, or None. Raises HookError."""
    name = foreign_path(vmid)
    try:
        raw = json.loads(root.read(name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HookError(f"{name}: {error}; remove it if VM {vmid} needs no other hookscript") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("path"), str):
        raise HookError(f"{name} is no record of a hookscript; remove it if VM {vmid} needs no other hookscript")
    return raw


def foreign_of(root: Root, vmid: int, limits: Settings) -> Entry | None:
    """The entry for a VM's earlier hookscript. It had no time limit, so it gets all that the phase has.

    It may belong to whom it likes: Proxmox VE has run it as root before, and only asked that it is executable.
    """
    raw = foreign_record(root, vmid)
    if raw is None:
        return None
    path, reason = raw["path"], None
    try:
        if not root.path(path).stat().st_mode & 0o111:
            reason = "is not executable"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    return Entry(str(raw.get("volume", path)), path, limits.total, reason, foreign=True)


def next_step(entry: Entry, plan: Plan) -> str:
    """What an operator can do about a failed entry."""
    if entry.foreign:
        return f"its own hookscript before was {entry.path}; remove {foreign_path(plan.vmid or 0)} to do without it"
    return f"see what it says above, or move {entry.path} away"
