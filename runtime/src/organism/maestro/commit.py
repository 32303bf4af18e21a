# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Group commit: while one group of messages is on its way to disk the next one gathers.

A single publish costs one fsync; an atomic batch of any size four, and about a millisecond of the server's time, which
makes a small store on disk for each (nats-server 2.15.1, ``sync_interval: always``). So small groups go as pipelined
singles and large ones as batches; what is small is measured, since it depends on the disk. A replicated stream takes
one fenced write at a time: once it has said so, every group goes as a batch, which is fenced as a whole. Every write
carries the fence: the server refuses it when another conductor has taken over. What became of a message is always found
out: nothing is given up while it may be stored.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from organism.bus.errors import (
    BusError,
    DuplicateInBatch,
    FenceBusy,
    StreamFull,
    SubjectFull,
    Unavailable,
    WrongLastSequence,
)
from organism.bus.jetstream import MAX_BATCH, Expect, JetStream, Outgoing

log = logging.getLogger(__name__)

SINGLES = 4
"""Groups up to this size are always cheaper as single publishes."""
BATCHES = 64
"""Groups from this size on are always cheaper as a batch."""
GROUP_BYTES = 8 * 1024 * 1024
"""Payload of a group; one message may be larger."""
RETRY = 0.2
"""Seconds before a write is tried again that the server could not answer."""
BUSY = 0.02
"""The same when an earlier write under the fence is still on its way through a cluster."""


class Fenced(Exception):
    """This conductor no longer leads: the write was refused, or will not be tried any more."""


Outcome = int | BusError | Fenced
"""The message's sequence in the stream, or why it is not there (StreamFull, SubjectFull, Refused, Fenced, ...)."""


@dataclass(slots=True)
class _Write:
    message: Outgoing
    done: Callable[[Outcome], None]
    told: bool = False

    def tell(self, outcome: Outcome) -> None:
        """Once: a group that is cut off in the middle is told of in parts."""
        if not self.told:
            self.told = True
            self.done(outcome)


class Pace:
    """Running means of what a single publish and a batch take, in seconds; what is not known yet is found out."""

    WEIGHT = 0.1

    def __init__(self) -> None:
        self.single: float | None = None
        self.batch: float | None = None

    def batched(self, size: int) -> bool:
        """Whether a group of this size should go as a batch."""
        if size <= SINGLES or size >= BATCHES:
            return size >= BATCHES
        if self.single is None or self.batch is None:
            return self.batch is None
        return size * self.single > self.batch

    def took(self, size: int, seconds: float, *, batched: bool) -> None:
        if batched:
            self.batch = self._mean(self.batch, seconds)
        else:
            self.single = self._mean(self.single, seconds / size)

    def _mean(self, old: float | None, new: float) -> float:
        return new if old is None else old + self.WEIGHT * (new - old)


class Writer:
    """Writes to one stream, one group at a time. ``fence`` is None for streams that need none."""

    def __init__(self, js: JetStream, name: str, *, fence: Expect | None, on_fenced: Callable[[str], None]) -> None:
        self.js = js
        self.name = name
        self.fence = fence
        self.pace = Pace()
        self.one_at_a_time = False
        """The stream is replicated, and refuses a second fenced write while one is on its way."""
        self.settled = 0
        """All groups that touched sequences up to here are completely known."""
        self._on_fenced = on_fenced
        self._queue: deque[_Write] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._free = asyncio.Lock()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self._run(), name=f"commit {self.name}")
        return self._task

    def put(self, subject: str, data: bytes, msg_id: str, done: Callable[[Outcome], None]) -> None:
        """Queue a write; ``done`` is called once, when its outcome is known."""
        if self._closed:
            done(Fenced("not leading"))
            return
        self._queue.append(_Write(Outgoing(subject, data, msg_id), done))
        self._idle.clear()
        self._wake.set()

    async def write(self, subject: str, data: bytes, msg_id: str) -> int:
        """The same as a coroutine; returns the sequence. Raises what ``done`` would be given."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if future.done():
                return
            if isinstance(outcome, int):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        self.put(subject, data, msg_id, done)
        return await future

    async def move_fence(self, subject: str, data: bytes) -> int:
        """Store ``subject`` anew between two groups and make its sequence the fence (its first copy may go now)."""
        async with self._free:
            if self._closed:
                raise Fenced("not leading")
            while True:
                try:
                    ack = await self.js.publish(subject, data, expect=self.fence)
                    break
                except WrongLastSequence:
                    # moved by our own write whose answer got lost, or by another conductor
                    last = await self.js.last(self.name, subject)
                    if last is None or last.data != data or self.fence is None or last.seq <= self.fence[0]:
                        self._lost("the fence has moved")
                        raise Fenced("the fence has moved") from None
                    self.fence = (last.seq, subject)
                    return last.seq
                except Unavailable:
                    await asyncio.sleep(RETRY)  # the server is there but has no stream leader: there is no event for it
            self.fence = (ack.seq, subject)
            return ack.seq

    async def drain(self) -> None:
        """Wait until the outcome of everything queued is known."""
        await self._idle.wait()

    async def close(self) -> None:
        """Stop; what was not sent is told Fenced."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._refuse_all()

    def _refuse_all(self) -> None:
        while self._queue:
            self._queue.popleft().tell(Fenced("not leading"))
        self._idle.set()

    def _lost(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            self._on_fenced(f"{self.name}: {why}")

    # ---- groups ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._closed:
            if not self._queue:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            async with self._free:
                group = self._gather()
                try:
                    await self._commit(group)
                except asyncio.CancelledError:
                    for write in group:
                        write.tell(Fenced("stopping; the message may be stored"))
                    raise
        self._refuse_all()

    def _gather(self) -> list[_Write]:
        group: list[_Write] = []
        size = 0
        while self._queue and len(group) < MAX_BATCH:
            size += len(self._queue[0].message.data)
            if group and size > GROUP_BYTES:
                break
            group.append(self._queue.popleft())
        return group

    async def _commit(self, group: list[_Write]) -> None:
        started = time.monotonic()
        if not (len(group) > 1 if self.one_at_a_time else self.pace.batched(len(group))):
            await self._singles(group)
            self.pace.took(len(group), time.monotonic() - started, batched=False)
            return
        messages = [write.message for write in group]
        first = messages[0]
        messages[0] = Outgoing(first.subject, first.data, first.msg_id, self.fence, first.headers)
        while True:
            try:
                ack = await self.js.publish_batch(messages)
            except FenceBusy:
                await self._in_turn()
                continue
            except Unavailable as problem:
                log.warning("%s: %s; trying again", self.name, problem)
                await asyncio.sleep(RETRY)  # see Writer.move_fence
                continue
            except WrongLastSequence as problem:
                self._fail(group, str(problem))
                return
            except StreamFull as problem:
                for write in group:
                    write.tell(problem)
                return
            except (DuplicateInBatch, SubjectFull):
                await self._singles(group)  # one of them is known: only the server can say which
                return
            except BusError as problem:
                log.warning("%s: a group of %d goes one by one: %s", self.name, len(group), problem)
                await self._singles(group)
                return
            break
        self.pace.took(len(group), time.monotonic() - started, batched=True)
        self.settled = max(self.settled, ack.seq)
        start = ack.seq - len(group) + 1
        for offset, write in enumerate(group):
            write.tell(start + offset)

    async def _singles(self, group: list[_Write]) -> None:
        at = 0
        while at < len(group):
            part = group[at : at + (1 if self.one_at_a_time else 100)]
            at += len(part)
            if self._closed:
                for write in part:
                    write.tell(Fenced("not leading"))
                continue
            outcomes = await asyncio.gather(*(self._single(write.message) for write in part))
            self.settled = max([self.settled, *(outcome for outcome in outcomes if isinstance(outcome, int))])
            for write, outcome in zip(part, outcomes, strict=True):
                if isinstance(outcome, WrongLastSequence):
                    self._lost(str(outcome))
                    write.tell(Fenced(str(outcome)))
                else:
                    write.tell(outcome)

    async def _in_turn(self) -> None:
        self.one_at_a_time = True
        await asyncio.sleep(BUSY)  # nothing tells when the other write has come through

    async def _single(self, message: Outgoing) -> int | BusError:
        while True:
            try:
                ack = await self.js.publish(message.subject, message.data, msg_id=message.msg_id, expect=self.fence)
            except FenceBusy:
                await self._in_turn()
                continue
            except Unavailable as problem:
                if self.js.nc.is_closed:
                    return problem
                log.warning("%s: %s; trying again", self.name, problem)
                await asyncio.sleep(RETRY)  # see Writer.move_fence
                continue
            except BusError as problem:
                return problem
            return ack.seq

    def _fail(self, group: list[_Write], why: str) -> None:
        self._lost(why)
        for write in group:
            write.tell(Fenced(why))
