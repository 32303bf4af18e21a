# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for results: the conductor's notices for speed, its answers for certainty.

A notice (``maestro.notify.<user>.<id>``) is lost when this client or the bus was away in that moment, and there is none
for a job that ended before or that belongs to somebody else. So every id that is waited for is also asked about: at
once when it may be final already, after a pause when it was submitted while we listened, and anew after a reconnection.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from nats.aio.msg import Msg

from organism.bus import messages, rpc_types
from organism.bus.errors import BusError
from organism.client._errors import BusUnreachableError, ConductorUnreachableError, MaestroError, NotFoundError
from organism.client._link import RETRY_PAUSE, Link
from organism.client._results import Result
from organism.core import _bus

HOLD = 5.0
"""Seconds that the conductor may hold a question about a few jobs."""
FEW = 16
"""Up to so many ids one question is held; above, it is put every ROUND seconds, lest each result cost one question."""
ROUND = 2.0
MANY = 1000
"""Above so many jobs the rounds are longer, lest the conductor tell all the time what notices tell anyway."""
HEARD = 2.0
"""Seconds before the first question about a job whose notice cannot have been missed."""
FRESH_GRACE = 30.0
"""Seconds that a job we saw accepted may be unknown to the conductor (which may just be taking over)."""
GRACE = 3.0
RECENT = 4096
RECENT_BYTES = 32 * 1024 * 1024


@dataclass
class _Entry:
    future: asyncio.Future[Result]
    due: float
    known_by: float
    """Until then "unknown" means "not yet"."""
    waiters: int = 0
    asking: bool = False


@dataclass
class _Recent:
    """Results that came before anybody waited for them; the oldest go first."""

    results: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    size: int = 0

    def add(self, task_id: str, data: bytes) -> None:
        self.size += len(data) - len(self.results.pop(task_id, b""))
        self.results[task_id] = data
        while len(self.results) > RECENT or self.size > RECENT_BYTES:
            _, old = self.results.popitem(last=False)
            self.size -= len(old)

    def get(self, task_id: str) -> Result | None:
        data = self.results.get(task_id)
        return None if data is None else Result.of(messages.decode(data, messages.Result))


class Waiter:
    """Shares one subscription and one questioner among all who wait on a connection."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.trouble = ""
        """Why there is no answer at the moment; empty when all is well."""
        self._entries: dict[str, _Entry] = {}
        self._recent = _Recent()
        self._poke = asyncio.Event()
        self._listening = asyncio.Lock()
        self._on = False
        self._task: asyncio.Task[None] | None = None
        self._questions: set[asyncio.Task[None]] = set()
        self._hooks = ExitStack()

    async def listen(self) -> None:
        """Hear notices from here on."""
        async with self._listening:
            if not self._on:
                await self.link.nc.subscribe(_bus.notify_subject(self.link.settings.user, "*"), cb=self._notice)
                await self.link.nc.flush()
                self._hooks.enter_context(self.link.nc.on_reconnect(self._reconnected))
                self._on = True

    async def close(self) -> None:
        self._hooks.close()
        tasks = [*self._questions, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _notice(self, message: Msg) -> None:
        task_id = message.subject.rsplit(".", 1)[1]
        entry = self._entries.get(task_id)
        if entry is None:
            self._recent.add(task_id, message.data)
            return
        try:
            result = Result.of(messages.decode(message.data, messages.Result))
        except messages.BadMessage:
            entry.due = 0.0  # a conductor of another version: ask, and be told properly
            self._poke.set()
            return
        _settle(entry, result)

    def _reconnected(self) -> None:
        for entry in self._entries.values():
            entry.due = 0.0
        for question in self._questions:
            question.cancel()  # its answer was meant for the connection before
        self._poke.set()

    @contextmanager
    def expecting(self, task_ids: Iterable[str], *, fresh: bool) -> Iterator[dict[str, asyncio.Future[Result]]]:
        """Futures of these jobs' results; asked about while the context lasts.

        ``fresh``: this connection was listening when the job was accepted. A future may fail with NotFoundError.
        """
        now = time.monotonic()
        futures: dict[str, asyncio.Future[Result]] = {}
        for task_id in dict.fromkeys(task_ids):
            entry = self._entries.get(task_id)
            if entry is None:
                entry = _Entry(
                    asyncio.get_running_loop().create_future(),
                    due=now + HEARD if fresh and self._on else now,
                    known_by=now + (FRESH_GRACE if fresh else GRACE),
                )
                recent = self._recent.get(task_id)
                if recent is not None:
                    entry.future.set_result(recent)
                self._entries[task_id] = entry
            entry.waiters += 1
            futures[task_id] = entry.future
        if any(self._entries[task_id].due <= now for task_id in futures):
            self._poke.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield futures
        finally:
            for task_id in futures:
                entry = self._entries[task_id]
                entry.waiters -= 1
                if not entry.waiters:
                    del self._entries[task_id]
                    if entry.future.done() and not entry.future.cancelled():
                        entry.future.exception()  # nobody will look at it: keep asyncio from complaining
            if not self._entries:
                self._poke.set()

    def _open(self) -> dict[str, _Entry]:
        return {task_id: entry for task_id, entry in self._entries.items() if not entry.future.done()}

    async def _run(self) -> None:
        try:
            await self.listen()
        except BusError as error:
            self._fail(self._open(), BusUnreachableError(str(error)))
        while entries := self._open():
            self._poke.clear()
            now = time.monotonic()
            idle = {task_id: entry for task_id, entry in entries.items() if not entry.asking}
            due = [task_id for task_id, entry in idle.items() if entry.due <= now]
            if due:
                self._start(due)
                continue
            next_due = min((entry.due for entry in idle.values()), default=None)
            try:
                async with asyncio.timeout(None if next_due is None else next_due - now):
                    await self._poke.wait()
            except TimeoutError:
                continue

    def _start(self, due: list[str]) -> None:
        for task_id in due:
            self._entries[task_id].asking = True
        question = asyncio.create_task(self._ask(due))
        self._questions.add(question)

        def over(task: asyncio.Task[None]) -> None:
            self._questions.discard(task)
            for task_id in due:
                entry = self._entries.get(task_id)
                if entry is not None:
                    entry.asking = False
            self._poke.set()

        question.add_done_callback(over)

    async def _ask(self, due: list[str]) -> None:
        few = len(due) <= FEW
        hold = HOLD if few else 0.0
        for start in range(0, len(due), rpc_types.WAIT_IDS):
            chunk = due[start : start + rpc_types.WAIT_IDS]
            try:
                reply = await self.link.rpc(
                    "wait",
                    rpc_types.WaitRequest(task_ids=chunk, timeout=hold),
                    rpc_types.WaitReply,
                    within=hold + 2,
                    patience=0,
                )
            except (ConductorUnreachableError, BusUnreachableError) as error:
                self.trouble = str(error)
                await asyncio.sleep(2 * RETRY_PAUSE)
                return
            except MaestroError as error:
                self._fail({task_id: self._entries[task_id] for task_id in chunk if task_id in self._entries}, error)
                return
            self.trouble = ""
            # not at once because some were final: notices tell of those, and the next would be final as well
            self._take(chunk, reply, 0.0 if few or reply.cut else ROUND * max(1.0, len(due) / MANY))

    @staticmethod
    def _fail(entries: dict[str, _Entry], error: MaestroError) -> None:
        for entry in entries.values():
            if not entry.future.done():
                entry.future.set_exception(error)

    def _take(self, chunk: list[str], reply: rpc_types.WaitReply, pause: float) -> None:
        now = time.monotonic()
        for task_id in chunk:
            entry = self._entries.get(task_id)
            if entry is None or entry.future.done():
                continue
            result = reply.results.get(task_id)
            if result is not None:
                _settle(entry, Result.of(result))
            elif task_id in reply.unknown:
                entry.due = now + RETRY_PAUSE
                if now > entry.known_by:
                    entry.future.set_exception(
                        NotFoundError(
                            f"no job {task_id} of yours is known to the conductor: look at `maestroctl list --all`"
                        )
                    )
            else:
                entry.due = now + pause


def _settle(entry: _Entry, result: Result) -> None:
    if not entry.future.done():
        entry.future.set_result(result)
