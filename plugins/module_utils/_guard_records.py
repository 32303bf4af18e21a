# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard's own records, below ``/run/organism/guard``: none of them is the truth, and each is checked against it.

    lock                 flock(2): one request at a time on this host; its text says who has it
    leases/100.json      VM 100 may have these devices: as long as it runs, or the task lives that starts it (S4-D03)
    requests/100.json    when VM 100 was last asked for, and by which process
    requests/ml.stop     when it was last asked that none of group ml runs

They are gone after a boot, as everything is that they tell of. A lease is written and removed under the lock, except by
the VM's own hooks: before its start and after its end the VM's lock keeps everybody else away.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from . import _qemu
from ._atomic import write_atomic
from ._guard import Announced
from ._root import Root

FOLDER = "/run/organism/guard"
LOCK = f"{FOLDER}/lock"
LEASES = f"{FOLDER}/leases"
REQUESTS = f"{FOLDER}/requests"
FORMAT = 1


@dataclass(frozen=True)
class Process:
    """``start``: clock ticks after boot, tells a process from a later one with the same pid."""

    pid: int
    start: int

    @classmethod
    def of(cls, root: Root, pid: int) -> Process | None:
        start = _qemu.start_of(root, pid)
        return None if start is None else cls(pid, start)

    def alive(self, root: Root) -> bool:
        return _qemu.start_of(root, self.pid) == self.start


@dataclass(frozen=True)
class Lease:
    """``starter``: the task that starts the VM, None for a VM that was found running. ``generation`` rises on this
    host.

    ``cluster``: the exclusive groups of the VM. ``acquired``: UTC, ISO 8601.
    """

    vmid: int
    keys: tuple[str, ...]
    generation: int
    acquired: str
    vm: str = ""
    cluster: tuple[str, ...] = ()
    memory: int = 0
    kind: str = "start"
    starter: Process | None = None
    backend: str = "pve"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"format": FORMAT, **asdict(self), "keys": list(self.keys), "cluster": list(self.cluster)}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Records:
    """Reads and writes the records of a host."""

    def __init__(self, root: Root) -> None:
        self._root = root

    # Leases

    def leases(self) -> dict[int, Lease]:
        """By VMID. A damaged record is none (its file is replaced or removed with the next look)."""
        found = {}
        for name in self._root.listdir(LEASES):
            number, _dot, ending = name.partition(".")
            if number.isdigit() and ending == "json":
                lease = self._lease(int(number))
                if lease is not None:
                    found[lease.vmid] = lease
        return found

    def _lease(self, vmid: int) -> Lease | None:
        text = self._root.read_or_none(f"{LEASES}/{vmid}.json")
        try:
            raw = json.loads(text or "")
            if raw.pop("format") != FORMAT or raw["vmid"] != vmid:
                return None
            starter = raw["starter"]
            return Lease(
                **{
                    **raw,
                    "keys": tuple(raw["keys"]),
                    "cluster": tuple(raw["cluster"]),
                    "starter": Process(int(starter["pid"]), int(starter["start"])) if starter else None,
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def write_lease(self, lease: Lease) -> None:
        """Raises OSError."""
        self._write(f"{LEASES}/{lease.vmid}.json", lease.as_dict())

    def drop_lease(self, vmid: int) -> bool:
        """Says whether there was one. Raises OSError."""
        try:
            self._root.path(f"{LEASES}/{vmid}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def lease_names(self) -> set[int]:
        """VMIDs of all files, damaged ones included."""
        names = (name.partition(".") for name in self._root.listdir(LEASES))
        return {int(number) for number, _dot, ending in names if number.isdigit() and ending == "json"}

    def next_generation(self) -> int:
        """Only under the lock. Raises OSError."""
        path = f"{FOLDER}/generation"
        number = (self._root.read_int(path) or 0) + 1
        self._write(path, number)
        return number

    # Requests

    def announce(self, vmid: int, process: Process | None) -> int:
        """Say that a VM was asked for; its place in time (CLOCK_MONOTONIC, ns). Raises OSError."""
        at = time.monotonic_ns()
        self._write(f"{REQUESTS}/{vmid}.json", {"at": at, "process": asdict(process) if process else None})
        return at

    def announce_stop(self, group: str) -> int:
        """Say that nothing of a group shall run. Raises OSError."""
        at = time.monotonic_ns()
        self._write(f"{REQUESTS}/{group}.stop", {"at": at})
        return at

    def announced(self, root: Root) -> tuple[dict[int, Announced], dict[str, int]]:
        """Last request for each VM, last wish that a group stops."""
        asked: dict[int, Announced] = {}
        stops: dict[str, int] = {}
        for name in self._root.listdir(REQUESTS):
            stem, _dot, ending = name.rpartition(".")
            raw = self._request(name)
            if raw is None:
                continue
            if ending == "stop":
                stops[stem] = int(raw["at"])
            elif ending == "json" and stem.isdigit():
                process = raw.get("process")
                alive = process is not None and Process(process["pid"], process["start"]).alive(root)
                asked[int(stem)] = Announced(int(stem), int(raw["at"]), alive)
        return asked, stops

    def _request(self, name: str) -> dict[str, Any] | None:
        try:
            raw = json.loads(self._root.read_or_none(f"{REQUESTS}/{name}") or "")
        except ValueError:
            return None
        return raw if isinstance(raw, dict) and isinstance(raw.get("at"), int) else None

    def forget_request(self, vmid: int) -> None:
        """Raises OSError."""
        self._root.path(f"{REQUESTS}/{vmid}.json").unlink(missing_ok=True)

    def _write(self, path: str, value: Any) -> None:
        real = self._root.path(path)
        real.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(real, json.dumps(value, indent=1) + "\n", mode=0o644, durable=False)


class HostLock:
    """The host-wide lock. The kernel gives it back when its holder ends, however it ends."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._descriptor: int | None = None

    def acquire(self, what: str, wait: float) -> str | None:
        path = self._root.path(LOCK)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait <= 0:
                os.close(descriptor)
            if wait <= 0 or not _flock_within(descriptor, wait):
                return self.holder() or "it does not say who it is"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}: {what}, since {now()}\n".encode(), 0)
        self._descriptor = descriptor
        return None

    def holder(self) -> str:
        """Who has it, by its own words; those of the last one where nobody has it."""
        return (self._root.read_or_none(LOCK) or "").strip()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _flock_within(descriptor: int, wait: float) -> bool:
    """Wait in the kernel's queue, first come first served, for at most so many seconds; closes it when that is over.

    flock(2) has no time limit; a thread waits in our place. One that is given up closes the file when it gets the lock.
    """
    turn = threading.Lock()
    outcome: list[str] = []
    came = threading.Event()

    def queue() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with turn:
            if outcome:
                os.close(descriptor)
                return
            outcome.append("got")
        came.set()

    threading.Thread(target=queue, daemon=True).start()
    came.wait(wait)
    with turn:
        if outcome:
            return True
        outcome.append("gave up")
    return False


def summary(leases: Mapping[int, Lease]) -> list[dict[str, Any]]:
    """For JSON output."""
    return [lease.as_dict() for _vmid, lease in sorted(leases.items())]
