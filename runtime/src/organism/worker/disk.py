# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps a job from filling the disk or cache that it writes to: no control group limits space, and quotas need a file
system that has them.

Space in a file system in memory counts against the job's memory limit as well; what is told here comes first.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
MOST_ENTRIES = 2_000_000
MOST_DEEP = 500
"""A tree with more entries or levels is taken to hide something."""


@dataclass(frozen=True)
class DiskLimits:
    """``max_bytes`` of one job, 0 for none. ``free_percent``: the reserve of a file system; a job that alone has taken
    more than that ends when less is free (0: never)."""

    max_bytes: int = 0
    free_percent: float = 0


@dataclass
class Taken:
    """What a job's user has written since it began."""

    bytes: int = 0
    files: int = 0
    hidden: bool = False
    """The tree is too deep or too large to be measured."""


class DiskGuard:
    """Of one running job. ``tops``: the directories that it can write to; ``uid``: its user; ``since``: Unix time."""

    def __init__(self, limits: DiskLimits, tops: tuple[Path, ...], uid: int, since: float) -> None:
        self._limits = limits
        self._tops = tuple(top for top in tops if not any(top != other and top.is_relative_to(other) for other in tops))
        self._uid = uid
        self._since = since
        self.short = False
        """The last look found a file system short of room, not the job's own limit passed."""

    def look(self) -> str:
        """Why the job has to end, or nothing. It may take long on a large tree: for a thread. Raises OSError."""
        limits = self._limits
        low = [status for top in self._tops if _low(status := os.statvfs(top), limits.free_percent)]
        if not limits.max_bytes and not low:
            return ""
        taken = self.measure()
        if taken.hidden:
            return "its files cannot be counted: too many, or too deep"
        if limits.max_bytes and taken.bytes > limits.max_bytes:
            return f"it has written {taken.bytes // MIB} MiB (JOB_DISK_MAX_MB is {limits.max_bytes // MIB})"
        reserve = limits.free_percent / 100
        for status in low:
            if taken.bytes > reserve * status.f_blocks * status.f_frsize or taken.files > reserve * (
                status.f_files or float("inf")
            ):
                self.short = True
                return (
                    f"it has filled the disk with {taken.bytes // MIB} MiB in {taken.files} files "
                    f"(less than JOB_DISK_FREE_PERCENT of {limits.free_percent:g} % is left)"
                )
        return ""

    def measure(self) -> Taken:
        """Files of the job's user that changed since it began, the open ones without a name included."""
        taken = Taken()

        def count(_parent: int, _name: str, status: os.stat_result) -> None:
            taken.files += 1
            taken.bytes += status.st_blocks * 512 // max(1, status.st_nlink if stat.S_ISREG(status.st_mode) else 1)

        for top in self._tops:
            taken.hidden = not self._each(top, count) or taken.hidden
        for status in _nameless(self._uid, self._tops):
            taken.files += 1
            taken.bytes += status.st_blocks * 512
        return taken

    def wipe(self, only: Path | None = None) -> None:
        """Remove these files (``only``: those below it), once the job has ended; directories stay. Raises OSError."""

        def remove(parent: int, name: str, status: os.stat_result) -> None:
            if not stat.S_ISDIR(status.st_mode):
                os.unlink(name, dir_fd=parent)

        for top in self._tops if only is None else (only,):
            self._each(top, remove)

    def _each(self, top: Path, act: Callable[[int, str, os.stat_result], None]) -> bool:
        """Call ``act`` with directory, name and status of each; links are not followed. False: it was not all."""
        left = MOST_ENTRIES
        # by descriptors: a path may be made longer than the kernel takes, and swapped for a link in between
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        first = os.open(top, flags)
        ways = [(first, iter(os.listdir(first)))]  # noqa: PTH208 - by descriptor
        try:
            while ways:
                directory, names = ways[-1]
                name = next(names, None)
                if name is None:
                    os.close(ways.pop()[0])
                    continue
                left -= 1
                if left < 0 or len(ways) > MOST_DEEP:
                    return False
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # the job goes on while this looks
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        below = os.open(name, flags, dir_fd=directory)
                        ways.append((below, iter(os.listdir(below))))  # noqa: PTH208 - by descriptor
                    if status.st_uid == self._uid and status.st_ctime >= self._since:
                        act(directory, name, status)
        finally:
            for directory, _ in ways:
                os.close(directory)
        return True


def _low(status: os.statvfs_result, percent: float) -> bool:
    """Is less than ``percent`` of the space or of the inodes free? File systems without inodes to count say 0."""
    return status.f_bavail * 100 < percent * status.f_blocks or status.f_favail * 100 < percent * status.f_files


def _nameless(uid: int, tops: tuple[Path, ...]) -> Iterator[os.stat_result]:
    """Files without a name that a user's processes hold open, once each: they take space, and no directory has them."""
    seen: set[tuple[int, int]] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it ends, or is no job's
            if process.stat().st_uid != uid:
                continue
            for link in (process / "fd").iterdir():
                target = link.readlink()
                if not any(target.is_relative_to(top) for top in tops):
                    continue  # in the job's own /tmp, or in memory
                status = link.stat()
                place = (status.st_dev, status.st_ino)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0 and place not in seen:
                    seen.add(place)
                    yield status
