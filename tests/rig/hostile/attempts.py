# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a curious job tries. Prints one JSON object: the name of each attempt, and ``done`` or why not.

It runs twice: as a job, and (with the word ``control``) as root beside the jobs: what fails there is really there.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CACHES = Path("/srv/gpucache")


def read(path: str) -> None:
    with Path(path).open("rb") as stream:
        stream.read(1)


def open_only(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def names(path: str | Path) -> None:
    list(Path(path).iterdir())


def write(path: str, text: str = "x") -> None:
    Path(path).write_text(text)


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)


def bus() -> None:
    socket.create_connection(("127.0.0.1", 4222), 10).close()


def see_worker() -> None:
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue  # no process, or it has just ended
        if b"worker.py" in line:
            return
    raise ProcessLookupError("no worker is visible")


def check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def set_user_id() -> None:
    Path("mine").write_text("#!/bin/sh\n")
    os.chmod("mine", 0o4755)  # noqa: PTH101 - as a program would
    if not Path("mine").stat().st_mode & stat.S_ISUID:
        raise PermissionError("the bit was dropped")


def own_group() -> str:
    return Path("/proc/self/cgroup").read_text().rpartition(":")[2].strip()


HARMLESS: dict[str, Callable[[], object]] = {
    "read the worker's key": lambda: read("/etc/organism/keys/worker-gpu0.nk"),
    "list the keys": lambda: names("/etc/organism/keys"),
    "list the server's store": lambda: names("/var/lib/nats"),
    "talk to the bus": bus,
    "talk to the system's services": lambda: connect("/run/dbus/system_bus_socket"),
    "see the worker's process": see_worker,
    "list another GPU's cache": lambda: names(CACHES / "gpu1"),
    "list another GPU's persistent cache": lambda: names("/data/gpucache/gpu1"),
    "list another GPU's RAM": lambda: names("/run/gpucache/gpu1"),
    "list the earlier job": lambda: names(CACHES / "gpu0/tasks/earlier/1"),
    "open another GPU's node": lambda: open_only("/dev/dri/renderD129", os.O_RDWR),
    "read the disk": lambda: read("/dev/vda"),
    "read the kernel's log": lambda: open_only("/dev/kmsg"),
}
HARMFUL: dict[str, Callable[[], object]] = {
    "make another GPU's node": lambda: os.mknod("node", stat.S_IFCHR | 0o666, os.makedev(7, 2)),
    "write to /etc": lambda: write("/etc/organism-was-here"),
    "write to /usr": lambda: write("/usr/organism-was-here"),
    "write to /run": lambda: write("/run/organism-was-here"),
    "write to /run/lock": lambda: write("/run/lock/organism-was-here"),
    "write to its own record": lambda: write("../outcome.json"),
    "write to its unit's status": lambda: write("../end/status"),
    "replace its directory": lambda: os.rename("../../1", "../../2"),  # noqa: PTH104 - as a program would
    "raise its memory limit": lambda: write(f"/sys/fs/cgroup{own_group()}/memory.max", "max"),
    "leave its control group": lambda: write("/sys/fs/cgroup/cgroup.procs", str(os.getpid())),
    "set a sysctl": lambda: write("/proc/sys/kernel/core_pattern", "|/bin/true"),
    "become root": lambda: os.setuid(0),
    "make a file that becomes its owner": set_user_id,
    "make a user name space": lambda: check(LIBC.unshare(0x10000000)),  # CLONE_NEWUSER
    "mount": lambda: check(LIBC.mount(b"none", b"/mnt", b"tmpfs", 0, None)),
    "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time() + 86400),
    "set the host name": lambda: socket.sethostname("mallory"),
    "run in real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "run before others": lambda: os.nice(-5),
    "be spared when memory runs out": lambda: write("/proc/self/oom_score_adj", "-1000"),
    "signal the first process": lambda: os.kill(1, 0),
    "overfill /tmp": lambda: write("/tmp/large", "x" * 60 * 1024 * 1024),
    "overfill /dev/shm": lambda: write("/dev/shm/large", "x" * 60 * 1024 * 1024),
}
ALLOWED: dict[str, Callable[[], object]] = {
    "open its own node": lambda: open_only("/dev/dri/renderD128", os.O_RDWR),
    "write to its directory": lambda: write("mine"),
    "write to its GPU's cache": lambda: write(str(CACHES / "gpu0/model")),
    "write to /tmp": lambda: write("/tmp/mine"),
    "write to /dev/shm": lambda: write("/dev/shm/mine"),
}


def attempt(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever stops it is the answer
        return f"{type(error).__name__}: {error}"
    return "done"


def writable() -> list[str]:
    """Every directory of the whole tree that takes a new file."""
    return sorted(top for top, _, _ in os.walk("/") if os.access(top, os.W_OK | os.X_OK) and creates(top))


def creates(top: str) -> bool:
    try:
        os.close(os.open(f"{top}/organism-was-here", os.O_CREAT | os.O_WRONLY))
    except OSError:
        return False
    os.unlink(f"{top}/organism-was-here")  # noqa: PTH108 - as a program would
    return True


def main(control: bool) -> None:
    calls = HARMLESS if control else {**ALLOWED, **HARMLESS, **HARMFUL}
    told: dict[str, object] = {name: attempt(call) for name, call in calls.items()}
    if not control:
        told["writable"] = writable()
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main("control" in sys.argv[1:])
