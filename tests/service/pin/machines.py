# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real QEMU processes for the tests of pinning, started with the files and options that Proxmox VE gives them."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from service.pin.bootsector import write_disk

QEMU = shutil.which("qemu-system-x86_64")
HANG_GUARD = 60.0


class Vm:
    """One QEMU. ``top`` stands for ``/``: pid and monitor lie below ``top/run/qemu-server`` as on Proxmox VE."""

    def __init__(self, top: Path, vmid: int, *, vcpus: int = 2, smp: str = "", spin: bool = False) -> None:
        self.vmid = vmid
        self.run = top / "run/qemu-server"
        self.run.mkdir(parents=True, exist_ok=True)
        self.pidfile = self.run / f"{vmid}.pid"
        self.qmp = self.run / f"{vmid}.qmp"
        self.smp = smp or str(vcpus)
        self.disk = write_disk(top / f"disk{vmid}.raw") if spin else None
        self.pid = 0

    def words(self, run: Path) -> list[str]:
        """The command line; ``run``: folder of its pid and its monitor."""
        disk = ["-drive", f"file={self.disk},format=raw,if=ide"] if self.disk else ["-S"]
        return [
            *("nice", "-n", "19", str(QEMU), "-name", f"vm{self.vmid},debug-threads=on", "-machine", "pc"),
            *("-accel", "tcg,thread=multi,tb-size=8", "-smp", self.smp, "-m", "16", "-nodefaults"),
            *("-display", "none", "-object", "iothread,id=iothread-virtioscsi0", *disk),
            *("-qmp", f"unix:{run / f'{self.vmid}.qmp'},server=on,wait=off"),
            *("-pidfile", str(run / f"{self.vmid}.pid"), "-daemonize"),
        ]

    def start(self) -> Vm:
        """Returns when the monitor listens: -daemonize ends its first process then."""
        subprocess.run(
            self.words(self.run),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=HANG_GUARD,
            check=True,
        )
        self.pid = int(self.pidfile.read_text())
        return self

    def stop(self) -> None:
        """Kill it and wait for its end; the files stay, as after a crash."""
        if not self.pid:
            return
        descriptor = None
        try:
            descriptor = os.pidfd_open(self.pid)
            os.kill(self.pid, signal.SIGKILL)
            select.select([descriptor], [], [], HANG_GUARD)
        except ProcessLookupError:
            pass  # it had ended by itself
        finally:
            if descriptor is not None:
                os.close(descriptor)
        self.pid = 0

    def masks(self) -> dict[int, set[int]]:
        return {int(tid.name): os.sched_getaffinity(int(tid.name)) for tid in Path(f"/proc/{self.pid}/task").iterdir()}


def stat_fields(pid: int, tid: int) -> list[str]:
    """proc(5), from field 3 on."""
    return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()


def watch_cpus(threads: Iterable[tuple[int, int]], seconds: float) -> dict[int, tuple[set[int], int]]:
    """Thread to the CPUs it was seen on (field 39) and the clock ticks it has used meanwhile (field 14)."""
    pairs = list(threads)
    first = {tid: int(stat_fields(pid, tid)[11]) for pid, tid in pairs}
    seen: dict[int, set[int]] = {tid: set() for _pid, tid in pairs}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for pid, tid in pairs:
            seen[tid].add(int(stat_fields(pid, tid)[36]))
        time.sleep(0.02)
    return {tid: (seen[tid], int(stat_fields(pid, tid)[11]) - first[tid]) for pid, tid in pairs}


def node(top: Path, *, vcpu: Iterable[int], io: Iterable[int], host: Iterable[int] = ()) -> Path:
    """A root for the library: this machine's /proc and /sys, everything else of its own."""
    for name in ("proc", "sys"):
        (top / name).symlink_to(f"/{name}")
    plan = {"format": 1, "host": list(host), "vcpu": list(vcpu), "io": list(io)}
    (top / "etc/organism").mkdir(parents=True)
    (top / "etc/organism/cpu_plan.json").write_text(json.dumps(plan))
    return top


def command(root: Path, module: str, *words: str) -> list[str]:
    """The command line of a host tool with its root moved."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3] / 'runtime/src')!r})\n"
        "import organism.core._root as root\n"
        f"init = root.Root.__init__\n"
        f"root.Root.__init__ = lambda self, top={str(root)!r}: init(self, top)\n"
        f"import organism.host.{module} as tool\n"
        "sys.exit(tool.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, *words]


def tool(root: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, module, *words), capture_output=True, text=True, timeout=HANG_GUARD, check=False
    )
