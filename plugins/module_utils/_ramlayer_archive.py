# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies of a RAM layer's generations on a second disk, and ZFS snapshots of the first.

The archive has the shape of the persistent side: ``generations/<n>`` and ``current``, each generation copied under a
hidden name, compared, synced and named in one step; files that did not change are shared with the archived one before.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._atomic import fsync_directory
from ._overlay import LayerError, holding_mount, mounts, run, scan
from ._ramlayer import Layer, locked
from ._root import Root
from ._systemd import run_command

SNAPSHOT = "ramlayer-"
# modify-window -1: to the nanosecond. Else rsync takes times of one second for the same (rsync(1)): a directory keeps
# the time of its last copied name, and a file changed within a second at its old size is linked to its old content.
_COPY = ["rsync", "-aHAX", "--sparse", "--numeric-ids", "--modify-window=-1"]
_PAUSES = 3


@dataclass(frozen=True)
class Archived:
    """``number`` is in the archive now; ``new`` when it was not before."""

    number: int
    new: bool
    folder: Path


def archived_numbers(folder: Path) -> list[int]:
    """Generations in an archive, oldest first."""
    place = folder / "generations"
    return sorted(int(path.name) for path in place.iterdir() if path.name.isdigit()) if place.is_dir() else []


def archive(layer: Layer, folder: Path, *, keep: int) -> Archived:
    """Copy the current generation into ``folder``. Raises LayerError; then the archive is as it was before.

    Syncs go on meanwhile. A generation that they take away while it is copied is given up for the current one.
    """
    for _try in range(_PAUSES):
        number = layer.store.current_number()
        if number is None:
            raise LayerError(f"{layer.name} has no generation yet, there is nothing to archive; sync it first")
        try:
            done = _archive_one(layer, number, folder)
        except (OSError, LayerError) as error:
            if (layer.store.folder / str(number)).exists():
                raise LayerError(f"{layer.name}: generation {number} not archived to {folder}: {error}") from error
            continue
        _prune(folder, keep)
        return done
    raise LayerError(f"{layer.name}: not archived: each generation was replaced while it was copied; raise "
                     "KEEP_GENERATIONS or SYNC_SEC")  # fmt: skip


def _archive_one(layer: Layer, number: int, folder: Path) -> Archived:
    generations = folder / "generations"
    known = archived_numbers(folder)
    if number in known:
        return Archived(number, False, folder)
    generations.mkdir(parents=True, exist_ok=True)
    _clear(generations)
    _copy(layer.store.folder / str(number), generations, number, known[-1] if known else None)
    _point(folder, number)
    return Archived(number, True, folder)


def _copy(source: Path, generations: Path, number: int, before: int | None) -> None:
    """One generation with its record, under its name when it is whole and on the disk."""
    building = generations / f".new-{number}"
    building.mkdir(mode=0o700)
    link = [] if before is None else [f"--link-dest={generations / str(before)}"]
    try:
        run([*_COPY, *link, f"{source}/", f"{building}/"])
        _compare(source / "upper", building / "upper")
        os.sync()
        building.rename(generations / str(number))
        fsync_directory(generations)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _compare(source: Path, copy: Path) -> None:
    one, other = scan(source), scan(copy)
    if one.keys() != other.keys():
        raise LayerError(f"the copy has {len(other)} names, {source} has {len(one)}")
    for path, entry in one.items():
        if other[path].state != entry.state:
            raise LayerError(f"the copy of {path} differs: does {copy} keep owners, device nodes and trusted.*?")


def _point(folder: Path, number: int) -> None:
    temporary = folder / ".current"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"generations/{number}")
    temporary.rename(folder / "current")
    fsync_directory(folder)


def _prune(folder: Path, keep: int) -> None:
    numbers = archived_numbers(folder)
    for number in numbers[: max(len(numbers) - keep, 0)]:
        old = folder / "generations" / f".old-{number}"
        (folder / "generations" / str(number)).rename(old)
    _clear(folder / "generations")


def _clear(generations: Path) -> None:
    for path in generations.iterdir():
        if path.name.startswith((".new-", ".old-")):
            shutil.rmtree(path)


def bring_back(layer: Layer, folder: Path, number: int) -> None:
    """Copy an archived generation back among the layer's own, to be restored. Raises LayerError."""
    with locked(layer):
        if number not in archived_numbers(folder):
            known = ", ".join(map(str, archived_numbers(folder))) or "none"
            raise LayerError(f"{folder} has no generation {number}; there are: {known}")
        if number in layer.store.numbers():
            raise LayerError(
                f"{layer.name} still has a generation {number} of its own: {layer.ctl('restore')} takes it"
            )
        generations = layer.store.folder
        generations.mkdir(parents=True, exist_ok=True)
        try:
            _copy(folder / "generations" / str(number), generations, number, None)
        except OSError as error:
            raise LayerError(f"{layer.name}: generation {number} not brought back: {error}") from error


# ---- snapshots -----------------------------------------------------------------------------------------------------


def dataset_of(root: Root, path: Path) -> str | None:
    """The ZFS data set that holds a path, or None when another file system does."""
    held = holding_mount(mounts(root), path)
    return held.source if held is not None and held.kind == "zfs" else None


def snapshot(
    layer: Layer, root: Root, number: int, *, keep: int, command: Callable[[list[str]], str] = run_command
) -> list[str]:
    """A snapshot of the persistent side's data set for a new generation; our own beyond ``keep`` go.

    Returns the names of ours that are there afterwards; empty without ZFS. Raises CommandError.
    """
    dataset = dataset_of(root, layer.persist)
    if dataset is None or keep < 1:
        return []
    ours = _ours(dataset, command)
    if number not in ours:
        command(["zfs", "snapshot", f"{dataset}@{SNAPSHOT}{number}"])
        ours = sorted({*ours, number})
    surplus, kept = ours[:-keep], ours[-keep:]
    for old in surplus:
        command(["zfs", "destroy", f"{dataset}@{SNAPSHOT}{old}"])
    return [f"{dataset}@{SNAPSHOT}{each}" for each in kept]


def _ours(dataset: str, command: Callable[[list[str]], str]) -> list[int]:
    listed = command(["zfs", "list", "-H", "-t", "snapshot", "-o", "name", "-d", "1", dataset])
    pattern = re.compile(rf"{re.escape(dataset)}@{SNAPSHOT}(\d+)")
    return sorted(int(match[1]) for line in listed.splitlines() if (match := pattern.fullmatch(line.strip())))
