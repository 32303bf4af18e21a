# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long outputs of ended jobs go to the bus, so that they outlive this worker: after the report, and never in its way.

What is still to be sent is marked in the attempt's directory, so a restart does not forget it. One piece at a time is
in memory, and the cache is held only while a piece is read.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from organism.bus import outputs
from organism.bus.errors import BusError, Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.messages import Report
from organism.bus.outputs import OutputName
from organism.worker.bus import Complaint
from organism.worker.cache_use import CacheUse
from organism.worker.store import STREAMS, Attempt, TaskStore

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0


class Uploader:
    def __init__(self, js: JetStream, gpu: str, store: TaskStore, cache: CacheUse, rate: float) -> None:
        """``rate``: bytes a second at most."""
        self._js = js
        self._gpu = gpu
        self._store = store
        self._cache = cache
        self._rate = rate
        self._wake = asyncio.Event()
        self._wake.set()  # an earlier worker's
        self._trouble = Complaint("long outputs of ended jobs cannot be sent to the bus")

    def owe(self, attempt: Attempt, report: Report) -> None:
        """The attempt's report is stored: send what that leaves out. Tells only the log when it cannot be noted."""
        if not left_out(report):
            return
        try:
            attempt.owe()
        except OSError as error:
            log.warning("the output of %s stays on this machine alone: %s", report.task_id, error)
            return
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        pause = FIRST_PAUSE
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                done = await self._send_all()
            except OSError as error:  # of the cache's lock, or its directory
                self._trouble.note(error)
                done = False
            if done:
                pause = FIRST_PAUSE
                continue
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
            self._wake.set()

    async def _send_all(self) -> bool:
        """False when something has to be tried again."""
        async with self._cache.hold():
            owing = await asyncio.to_thread(lambda: list(self._store.owing()))
        all_sent = True
        for attempt in owing:
            try:
                await self._send(attempt)
            except BusError as error:
                self._trouble.note(error)
                all_sent = False
                if isinstance(error, Unavailable):
                    break
            except FileNotFoundError:
                log.info("the output of %s was cleaned up before it was sent", attempt.ref.task_id)
            except (OSError, EOFError) as error:
                log.warning("the output of %s stays on this machine alone: %s", attempt.ref.task_id, error)
                attempt.settle()
        if all_sent and owing:
            self._trouble.over()
        return all_sent

    async def _send(self, attempt: Attempt) -> None:
        async with self._cache.hold():
            report = await asyncio.to_thread(attempt.outcome)
        for stream in left_out(report) if report is not None else []:
            await self._send_stream(attempt, stream, str(report.finished) if report else "")
        async with self._cache.hold():
            attempt.settle()

    async def _send_stream(self, attempt: Attempt, stream: str, finished: str) -> None:
        path = attempt.log(stream)

        async def read(offset: int, length: int) -> bytes:
            # held a piece at a time: who wants to empty the cache must not wait for a whole upload
            async with self._cache.hold():
                return await asyncio.to_thread(_read, path, offset, length)

        async def pace(length: int) -> None:
            await asyncio.sleep(length / self._rate)

        async with self._cache.hold():
            size = (await asyncio.to_thread(path.lstat)).st_size
        name = OutputName(self._gpu, attempt.ref.task_id, attempt.ref.attempt, stream)
        await outputs.store(self._js, name, read, size=size, finished=finished, pace=pace)


def left_out(report: Report) -> list[str]:
    """The streams of which the report has head and tail only."""
    sizes = {"stdout": (report.stdout, report.stdout_bytes), "stderr": (report.stderr, report.stderr_bytes)}
    return [stream for stream in STREAMS if not outputs.is_whole(*sizes[stream])]


def _read(path: Path, offset: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
