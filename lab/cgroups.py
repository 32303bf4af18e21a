# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A control group for each container on a host whose PID 1 is not systemd.

systemd-nspawn makes the groups ``payload`` and ``supervisor`` below its own one. Without a systemd that gives every
container a group of its own, two containers would share ``/payload``: each node's systemd would then count, and kill,
the other's processes. (On a systemd host the transient unit with ``Delegate=yes`` is that group.)
"""

from __future__ import annotations

import signal
from pathlib import Path

from . import host
from .config import Settings
from .errors import LabError


def hierarchies(mountinfo: str, membership: str) -> list[Path]:
    """Folders of this process's own group in the unified hierarchy and in v1's ``name=systemd``, where mounted.

    ``mountinfo`` is /proc/self/mountinfo, ``membership`` /proc/self/cgroup (cgroups(7), proc(5)).
    """
    own = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        name = "" if kind == "cgroup2" else "name=systemd" if "name=systemd" in options.split(",") else None
        if name is None or kind not in ("cgroup", "cgroup2") or name not in own:
            continue
        inside = own[name] if root == "/" else "/" + own[name].removeprefix(root).lstrip("/")
        folder = Path(point) / inside.lstrip("/")
        if folder not in found:
            found.append(folder)
    return found


def _hierarchies() -> list[Path]:
    return hierarchies(Path("/proc/self/mountinfo").read_text("utf-8"), Path("/proc/self/cgroup").read_text("utf-8"))


def make(where: Settings, node: str) -> list[Path]:
    """Make the node's groups; gives the files to which the supervisor's pid has to be written before it starts."""
    places = _hierarchies()
    if not any((place / "cgroup.controllers").exists() for place in places):
        # A host with v1 hierarchies only: the kernel still has the unified one, it just is not mounted anywhere.
        own = where.folder / "cgroup"
        own.mkdir(parents=True, exist_ok=True)
        host.run("mount", "-t", "cgroup2", "cgroup2", own)
        places = _hierarchies()
    files = []
    for place in places:
        group = place / where.group(node)
        _remove(group)
        group.mkdir()
        files.append(group / "cgroup.procs")
    return files


def groups(where: Settings) -> list[Path]:
    """The groups of this lab that exist, running or left over."""
    return [group for place in _hierarchies() if place.is_dir() for group in sorted(place.glob(where.group("*")))]


def _remove(group: Path) -> None:
    """End what still runs in a group (a container whose supervisor was killed), then remove it."""
    if not group.is_dir():
        return
    watches = [
        host.Watch(pid) for file in group.rglob("cgroup.procs") for pid in map(int, file.read_text().split()) if pid
    ]
    try:
        if stubborn := host.end_all(watches, signal.SIGKILL, 30):
            raise LabError(
                f"processes of {group.name} do not end: {', '.join(str(watch.pid) for watch in stubborn)}",
                "look at `ps` for a process in state D",
            )
    finally:
        for watch in watches:
            watch.close()
    for below in sorted(group.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        if below.is_dir():
            below.rmdir()
    group.rmdir()


def remove_all(where: Settings) -> None:
    """Remove the groups of ended containers, and the hierarchy where the lab mounted it."""
    for group in groups(where):
        _remove(group)
    own = where.folder / "cgroup"
    for point in host.mounts_below(own):
        host.run("umount", point)
    if own.is_dir():
        own.rmdir()
