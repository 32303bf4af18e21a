# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker's hold on its GPU's cache: while it has one the cache stays mounted, between two jobs it may be emptied.

The other side is :mod:`organism.core._ramlayer_spill`, which explains the two lock files.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from organism.core._ramlayer_spill import lock_files

POLL_SECONDS = 0.1


class CacheBusyError(Exception):
    """The cache is being emptied just now, which takes seconds."""


class CacheUse:
    """Holds nest and may overlap within one worker; the first takes the lock, the last gives it back."""

    def __init__(self, ram_root: Path | None, gpu: str) -> None:
        """``ram_root``: where the caches' tmpfs are; without one, or without caches there, nothing is locked."""
        self._files = None if ram_root is None else lock_files(ram_root, gpu)
        self._holders = 0
        self._lock = ExitStack()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Waits for the end of an emptying. Raises OSError."""
        while not self._take():  # noqa: ASYNC110 - flock(2) tells nobody when it becomes free
            await asyncio.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def hold_now(self) -> Iterator[None]:
        """For who cannot wait. Raises CacheBusyError or OSError."""
        if not self._take():
            raise CacheBusyError
        try:
            yield
        finally:
            self._give_back()

    def _take(self) -> bool:
        if not self._holders and not self._locked():
            return False
        self._holders += 1
        return True

    def _give_back(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._lock.close()

    def _locked(self) -> bool:
        if self._files is None or not self._files[0].parent.is_dir():
            return True
        gate, jobs = self._files
        with ExitStack() as opened:
            try:
                # through the gate: who waits to empty the cache stands in it
                fcntl.flock(opened.enter_context(gate.open("a")), fcntl.LOCK_SH | fcntl.LOCK_NB)
                stream = self._lock.enter_context(jobs.open("a"))
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                return False
        return True
