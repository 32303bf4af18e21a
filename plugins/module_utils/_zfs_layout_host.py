# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ZFS pools and datasets of a host, read with one ``zpool get`` and one ``zfs get``, and changed by a plan's commands.

The record of earlier state is ``zfs_layout``: ``zfs <dataset>`` for one that was created, ``zfs <dataset> <property>``
and ``zpool <pool> <property>`` with value and source before.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import _zfs_layout as layout
from ._earlier import EarlierState
from ._overlay import mounts
from ._root import Root
from ._systemd import CommandError, Runner

CAPABILITY = "zfs_layout"
_COLUMNS = "name,property,value,source"


def _properties(wanted: Mapping[str, Mapping[str, str]], kept: Iterable[str], kind: str, always: Iterable[str]) -> str:
    names = [*always, *(prop for values in wanted.values() for prop in values)]
    names += [key.split(" ", 2)[2] for key in kept if key.startswith(f"{kind} ") and key.count(" ") > 1]
    return ",".join(dict.fromkeys(names))


def _busy(root: Root, wanted: layout.Wanted) -> dict[str, str]:
    """Mount points of wanted datasets that something else is mounted on, or where files would be hidden."""
    mounted = {mount.target: mount.source for mount in mounts(root)}
    found = {}
    for name, values in wanted.datasets.items():
        point = values.get("mountpoint", "")
        if not point.startswith("/"):
            continue
        at = mounted.get(point)
        if at is not None and at != name:
            found[point] = f"{at} is mounted at {point} already"
        elif at is None and root.listdir(point):
            entries = root.listdir(point)
            found[point] = f"{point} has files ({', '.join(entries[:3])}) that a mount would hide; move them first"
    return found


def gather(root: Root, wanted: layout.Wanted, run: Runner) -> layout.Facts:
    """Two reading commands. Raises LayoutError (a property that ZFS does not know), CommandError, EarlierStateError."""
    kept = EarlierState(CAPABILITY, root).kept
    named = dict.fromkeys([*wanted.pools, *map(layout.pool_of, wanted.datasets)])
    named |= dict.fromkeys(layout.pool_of(key.split(" ")[1]) for key in kept)
    if not named:
        return layout.Facts({}, {}, {}, {}, kept)
    pool_properties = _properties(wanted.pools, kept, "zpool", layout.SURVEY)
    try:
        pools = layout.parse_table(run(["zpool", "get", "-Hp", "-o", _COLUMNS, pool_properties]))
    except CommandError as error:
        _refuse_unknown(error)
        reason = _why_none(error)
        if reason is None:
            raise
        return layout.Facts({}, {}, layout.unusable({}, named, reason), {}, kept)
    unusable = layout.unusable(pools, named)
    readable = [pool for pool in named if pool not in unusable]
    datasets: layout.Table = {}
    if readable:
        properties = _properties(wanted.datasets, kept, "zfs", layout.NEEDED)
        command = ["zfs", "get", "-Hp", "-r", "-t", "filesystem,volume", "-o", _COLUMNS, properties, *readable]
        try:
            datasets = layout.parse_table(run(command))
        except CommandError as error:
            _refuse_unknown(error)
            raise
    return layout.Facts(pools, datasets, unusable, _busy(root, wanted), kept)


def _refuse_unknown(error: CommandError) -> None:
    for line in str(error).splitlines():
        if "invalid property" in line or "bad property list" in line:
            raise layout.LayoutError(f"{line.strip()}; ZFS on this host does not know it, so nothing was changed")


def _why_none(error: CommandError) -> str | None:
    """Why no pool can be seen at all, when that is what the error says."""
    text = str(error)
    if "is not installed" in text:
        return "ZFS is not installed here (zfsutils-linux)"
    if "modules" in text or "/dev/zfs" in text:
        return "the zfs kernel module is not loaded here (modprobe zfs)"
    return None


def apply(root: Root, plan: layout.Plan, run: Runner) -> None:
    """Record, then run the commands. Raises LayoutError that says what had been done before one failed."""
    state = EarlierState(CAPABILITY, root)
    state.remember(plan.record)
    done: list[str] = []
    for command in plan.commands:
        if command[:2] == ["zfs", "mount"] and any(mount.source == command[2] for mount in mounts(root)):
            continue  # a changed mountpoint has mounted it
        try:
            run(command)
        except CommandError as error:
            so_far = f"Done before it: {'; '.join(done)}" if done else "Nothing had been changed before it"
            raise layout.LayoutError(f"{error}. {so_far}; run again when it is repaired") from error
        done.append(" ".join(command))
    stale = [key for key in state.kept if key not in plan.record]
    if stale:
        state.forget(stale)
