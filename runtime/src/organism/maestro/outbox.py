# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages that nobody confirms: answers, notifications, telemetry; sent in order by one task."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from organism.bus.connection import BusClient
from organism.bus.errors import BusError
from organism.core import _bus

log = logging.getLogger(__name__)

MOST = 100_000
"""Messages that wait; beyond that the oldest are dropped: whoever asked asks again."""


class Outbox:
    """``send`` from anywhere, never waiting."""

    def __init__(self, nc: BusClient) -> None:
        self.nc = nc
        self._queue: deque[tuple[str, bytes]] = deque(maxlen=MOST)
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self._run(), name="outbox")
        return self._task

    def send(self, subject: str, data: bytes) -> None:
        if subject:
            self._queue.append((subject, data))
            self._empty.clear()
            self._wake.set()

    def answer(self, reply: str, data: bytes, name: str, kinds: tuple[str, ...]) -> None:
        """To the asker's own inbox and to nowhere else: what is said here, a conductor says."""
        if _bus.is_own_inbox(reply, name, kinds):
            self.send(reply, data)
        elif reply:
            log.warning("no answer to %s: %s is not in their own inbox", name, reply)

    async def drain(self) -> None:
        await self._empty.wait()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            while self._queue:
                subject, data = self._queue.popleft()
                try:
                    await self.nc.say(subject, data)
                except BusError as problem:
                    log.warning("%s: not sent: %s", subject, problem)
            self._empty.set()
            self._wake.clear()
            await self._wake.wait()
