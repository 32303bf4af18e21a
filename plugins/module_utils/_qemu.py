# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU processes and their threads: which process is a VM, and which of its threads does what.

Proxmox VE: pid in ``/run/qemu-server/ID.pid``, monitor ``/run/qemu-server/ID.qmp``, control group
``qemu.slice/ID.scope`` (qemu-server, Helpers.pm and Systemd.pm). Any other QEMU by its ``-pidfile`` and ``-qmp``.

Threads are told apart by the monitor (query-cpus-fast, query-iothreads), never by their names: those are QEMU's for
debugging, and the longer ones of Proxmox VE's I/O threads are not set at all. vhost workers are threads of QEMU since
Linux 6.4; before, and with ``vhost.fork_from_owner_default=N``, kernel threads named ``vhost-PID``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import _qmp
from ._root import Root

PVE_RUN = "/run/qemu-server"
_PF_NO_SETAFFINITY = 0x04000000  # include/linux/sched.h; io_uring's workers have it
_PROGRAM = re.compile(r"(qemu-system-.*|qemu-kvm|kvm|qemu)")

VCPU, IOTHREAD, MAIN, EMULATOR, VHOST, FIXED = "vcpu", "iothread", "main", "emulator", "vhost", "fixed"
"""Roles. EMULATOR: helpers of the main thread. FIXED: the kernel lets nobody choose the CPUs of the thread."""


class QemuError(Exception):
    """A VM cannot be looked at; the text names it and the next step."""


@dataclass(frozen=True)
class Target:
    """How a VM is found. ``name``: for people and file names. ``vmid``: of Proxmox VE, else None."""

    name: str
    pidfile: str
    qmp: str
    vmid: int | None = None

    @property
    def label(self) -> str:
        return f"VM {self.name}"

    @property
    def scope(self) -> str | None:
        """Unit of Proxmox VE's control group."""
        return f"{self.vmid}.scope" if self.vmid is not None else None


@dataclass(frozen=True)
class Machine:
    """A running VM. ``start``: clock ticks after boot, tells a process from a later one with the same pid."""

    target: Target
    pid: int
    start: int


@dataclass(frozen=True)
class Thread:
    """``index``: number of the vCPU, else None. ``core``: the guest's core that it is a thread of, None if unknown."""

    tid: int
    name: str
    role: str
    index: int | None = None
    core: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        what = f"vCPU {self.index}" if self.role == VCPU else f"{self.role} {self.name}"
        return f"{what} (thread {self.tid})"


def pve(vmid: int) -> Target:
    """A VM of Proxmox VE."""
    return Target(str(vmid), f"{PVE_RUN}/{vmid}.pid", f"{PVE_RUN}/{vmid}.qmp", vmid)


def pve_running(root: Root) -> list[int]:
    """VMIDs with a file of a pid; the process may have ended."""
    names = (name.removesuffix(".pid") for name in root.listdir(PVE_RUN) if name.endswith(".pid"))
    return sorted(int(name) for name in names if name.isdigit())


def start_of(root: Root, pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat`` (proc(5)), or None when the process is gone or only waits to be reaped."""
    text = root.read_or_none(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None


def find(root: Root, target: Target) -> Machine | None:
    """The process of a VM, or None when it does not run. A file that is left of an ended process proves nothing.

    Raises QemuError for a file that holds no pid.
    """
    text = root.read_or_none(target.pidfile)
    if text is None or not text.strip():
        return None
    if not text.strip().isdigit():
        raise QemuError(f"{target.label}: {target.pidfile} holds no process id but {text.strip()[:40]!r}")
    pid = int(text)
    start = start_of(root, pid)
    if start is None or not _is_target(root, pid, target):
        return None
    return Machine(target, pid, start)


def _is_target(root: Root, pid: int, target: Target) -> bool:
    """Is the process this VM, and not one that got the pid later?"""
    words = (root.read_or_none(f"/proc/{pid}/cmdline") or "").split("\0")
    program = root.link_name(f"/proc/{pid}/exe") or posixpath.basename(words[0])
    if not _PROGRAM.fullmatch(program.removesuffix(" (deleted)")) and not _PROGRAM.fullmatch(
        posixpath.basename(words[0])
    ):
        return False
    if target.vmid is not None:
        if f"/{target.scope}" in (root.read_or_none(f"/proc/{pid}/cgroup") or ""):
            return True
        if ("-id", str(target.vmid)) in pairwise(words):
            return True
    names = {target.pidfile, target.qmp, target.pidfile.replace("/run/", "/var/run/", 1)}
    return any(name in word for word in words for name in names)


def same(root: Root, machine: Machine) -> bool:
    """Does the process still run?"""
    return start_of(root, machine.pid) == machine.start


Ask = Callable[[str], _qmp.Answer]


def ask(path: str) -> _qmp.Answer:
    """One exchange: the vCPUs, the I/O threads. Raises QmpError."""
    return _qmp.exchange(path, ["query-cpus-fast", "query-iothreads"])


def threads(root: Root, machine: Machine, asking: Ask = ask) -> list[Thread]:
    """All threads of a VM with their roles, by number. Raises QmpError, QemuError."""
    answer = asking(str(root.path(machine.target.qmp)))
    if answer.peer not in (0, machine.pid):
        raise QemuError(
            f"{machine.target.label}: the monitor {machine.target.qmp} belongs to process {answer.peer}, "
            f"and {machine.target.pidfile} says {machine.pid}: is the VM just being restarted?"
        )
    cpus, iothreads = answer.replies
    try:
        known = _of_monitor(cpus, iothreads)
    except (KeyError, TypeError, ValueError) as error:
        raise QemuError(f"{machine.target.label}: QEMU's monitor answers what nobody knows ({error!r})") from error
    return sorted([*_tasks(root, machine.pid, known), *kernel_vhosts(root, machine.pid)], key=lambda thread: thread.tid)


def _of_monitor(cpus: Iterable[dict[str, Any]], iothreads: Iterable[dict[str, Any]]) -> dict[int, Thread]:
    """Threads that the monitor names, by number. With TCG on one thread all vCPUs are that one: the first counts."""
    found: dict[int, Thread] = {}
    for each in iothreads:
        found[int(each["thread-id"])] = Thread(int(each["thread-id"]), str(each["id"]), IOTHREAD)
    for each in sorted(cpus, key=lambda cpu: int(cpu["cpu-index"])):
        tid, index = int(each["thread-id"]), int(each["cpu-index"])
        if tid not in found:
            found[tid] = Thread(tid, f"CPU {index}", VCPU, index, _core(each.get("props", {})))
    return found


def _core(props: dict[str, Any]) -> tuple[int, ...] | None:
    """What names the guest's core of a vCPU; QEMU leaves out the levels that a machine does not have."""
    if "core-id" not in props:
        return None
    levels = ("node-id", "drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id")
    return tuple(int(props.get(level, 0)) for level in levels)


def helpers(root: Root, pid: int) -> list[Thread]:
    """All threads of a process as if none were known to the monitor."""
    return _tasks(root, pid, {})


def _tasks(root: Root, pid: int, known: dict[int, Thread]) -> list[Thread]:
    found = []
    for name in root.listdir(f"/proc/{pid}/task"):
        stat = root.read_or_none(f"/proc/{pid}/task/{name}/stat")
        if stat is None:
            continue  # it has ended meanwhile
        tid, comm = int(name), stat.partition("(")[2].rpartition(")")[0]
        flags = int(stat.rpartition(")")[2].split()[6])
        if tid in known:
            found.append(known[tid])
        elif flags & _PF_NO_SETAFFINITY:
            found.append(Thread(tid, comm, FIXED))
        elif tid == pid:
            found.append(Thread(tid, comm, MAIN))
        else:
            found.append(Thread(tid, comm, VHOST if comm.startswith("vhost-") else EMULATOR))
    return found


def kernel_vhosts(root: Root, pid: int) -> list[Thread]:
    """vhost workers that are kernel threads: children of kthreadd, pid 2, with the owner's pid in their name."""
    found = []
    for name in root.listdir("/proc"):
        if not name.isdigit() or (root.read_or_none(f"/proc/{name}/comm") or "") != f"vhost-{pid}":
            continue
        stat = root.read_or_none(f"/proc/{name}/stat")
        fields = stat.rpartition(")")[2].split() if stat else []
        if len(fields) > 6 and fields[1] == "2":
            fixed = int(fields[6]) & _PF_NO_SETAFFINITY
            found.append(Thread(int(name), f"vhost-{pid}", FIXED if fixed else VHOST))
    return found
