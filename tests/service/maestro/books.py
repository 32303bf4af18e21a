# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the streams hold, and whether it agrees."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.bus.messages import DeadLetter, Result, StateEvent
from organism.bus.tail import StreamTail
from organism.core import _bus
from service.support import HANG, BusServer


class Books:
    """Everything that the streams hold at one moment."""

    def __init__(self) -> None:
        self.results: dict[str, list[Result]] = {}
        self.events: dict[str, list[StateEvent]] = {}
        self.states: dict[str, StateEvent] = {}
        self.letters: list[DeadLetter] = []
        self.queue: list[Any] = []

    @classmethod
    async def read(cls, bus: BusServer) -> Books:
        nc = await bus.connected("admin", "setup")
        try:
            js = JetStream(nc)
            books = cls()
            for stored in await _all(js, _bus.STREAM_RESULTS):
                if stored.subject.startswith("gpu.task.result."):
                    result = messages.decode(stored.data, Result)
                    books.results.setdefault(result.task_id, []).append(result)
            for stored in await _all(js, _bus.STREAM_EVENTS):
                event = messages.decode(stored.data, StateEvent)
                books.events.setdefault(event.task_id, []).append(event)
            for stored in await _all(js, f"KV_{_bus.BUCKET_JOBS}"):
                state = messages.decode(stored.data, StateEvent)
                books.states[state.task_id] = state
            books.letters = [messages.decode(one.data, DeadLetter) for one in await _all(js, _bus.STREAM_DLQ)]
            books.queue = await _all(js, _bus.STREAM_WQ)
            return books
        finally:
            await nc.close()

    def check(self, task_ids: list[str]) -> Counter[str]:
        """Every job has one result; its events end in that state; the bucket says the same."""
        states: Counter[str] = Counter()
        for task_id in task_ids:
            results = self.results.get(task_id, [])
            assert len(results) == 1, f"{task_id} has {len(results)} results"
            result = results[0]
            states[result.state] += 1
            assert result.history[0].state == "enqueued"
            assert result.history[-1].state == result.state
            numbers = [event.n for event in result.history]
            assert numbers == sorted(set(numbers)), f"{task_id}: {numbers}"
            events = self.events.get(task_id, [])
            assert events, f"{task_id} has no events"
            assert events[-1].state == result.state, f"{task_id}: {[event.state for event in events]}"
            assert {event.n for event in result.history if event.state in ("enqueued", "scheduled", "retry")} <= {
                event.n for event in events
            }, f"{task_id}: events are missing"
            assert self.states[task_id].state == result.state, f"{task_id}: {self.states[task_id]}"
        assert not set(self.results) - set(task_ids), "results of nobody's jobs"
        return states


async def _all(js: JetStream, stream: str) -> list[Any]:
    tail = StreamTail(js, stream)
    found: list[Any] = []
    try:
        async with asyncio.timeout(HANG):
            async for batch in tail:
                found.extend(batch)
                if tail.caught_up:
                    break
    finally:
        await tail.close()
    return found


async def settled_books(bus: BusServer, task_ids: list[str]) -> Counter[str]:
    """Projections are written behind the truth: read until they agree, and fail with what they say if they never do."""
    last: AssertionError | None = None
    try:
        async with asyncio.timeout(HANG / 2):
            while True:
                try:
                    return (await Books.read(bus)).check(task_ids)
                except (AssertionError, KeyError) as problem:
                    last = AssertionError(str(problem))
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise last or AssertionError("the books cannot be read") from None
