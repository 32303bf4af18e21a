# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job that outgrows the cache in RAM which its directory lies in: not its fault while the disk below has room.

No job says beforehand how much it will write, so the attempt ends as ``cache_full``, which costs the job no try, and
the next one gets its directory on disk (``RunOrder.on_disk``). That happens once a job: the disk's limits are its own.

Nothing counts the writes that a tmpfs refuses. So the room is looked at while the job runs, and what the job said is
read when it has failed: it may have removed, between two looks, what did not fit. A job that names a lack of space
anywhere else (its own /tmp) is tried once more for nothing; one whose write failed is never blamed for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path

from organism.worker.store import Attempt, TaskStore

log = logging.getLogger(__name__)

LOOK_EVERY = 0.2
"""Seconds; a look is one statvfs(2) of a file system in memory."""
FULL_PERCENT = 99.0
_SAID = re.compile(r"No space left on device|\bENOSPC\b|\bos error 28\b")


class CacheFull:
    """Of one running attempt; without any effect when its directory is not in a cache in RAM with a disk below it."""

    def __init__(self, store: TaskStore, attempt: Attempt) -> None:
        self.applies = store.disk is not None and attempt.path.is_relative_to(store.top) and store.top.parent.is_mount()
        self.seen = False
        self._cache = store.top.parent
        self._disk = None if store.disk is None else store.disk.top.parent

    async def watch(self) -> None:
        """Look until cancelled."""
        while self.applies and not self.seen:
            self.look()
            await asyncio.sleep(LOOK_EVERY)

    def look(self) -> None:
        try:
            self.seen = self.seen or _filled(os.statvfs(self._cache)) >= FULL_PERCENT
        except OSError as error:
            log.warning("the room in %s cannot be seen: %s", self._cache, error)

    def blames(self, error: str | None, texts: tuple[str, ...]) -> str:
        """Why this ending is the cache's doing, or nothing. ``error`` is that of a report, ``texts`` the output."""
        if not self.applies or error not in ("exit", "signal", "start"):
            return ""
        self.look()
        if not self.seen and not any(_SAID.search(text) for text in texts):
            return ""
        return self.offer("the GPU's cache in RAM was full while it ran")

    def offer(self, reason: str) -> str:
        """The reason and what follows from it, or nothing when the disk has no more room than the cache."""
        if not self.applies or self._disk is None:
            return ""
        try:
            roomier = _roomier(self._disk, self._cache)
        except OSError as error:
            log.warning("the room in %s cannot be seen: %s", self._disk, error)
            return ""
        return f"{reason}; the next attempt works on disk" if roomier else ""


def _filled(status: os.statvfs_result) -> float:
    """Percent of the space or of the inodes, whichever is scarcer; file systems without inodes to count say 0."""
    space = 100.0 * (1 - status.f_bavail / status.f_blocks) if status.f_blocks else 0.0
    return max(space, 100.0 * (1 - status.f_favail / status.f_files) if status.f_files else 0.0)


def _roomier(disk: Path, cache: Path) -> bool:
    below, ram = os.statvfs(disk), os.statvfs(cache)
    return below.f_bavail * below.f_frsize > ram.f_blocks * ram.f_frsize
