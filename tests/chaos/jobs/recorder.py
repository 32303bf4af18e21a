# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes down what is on the bus: run orders and journal while they are there, everything else when all is over."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from chaos.jobs.notebook import Notebook

from organism.bus.errors import StreamReset
from organism.bus.jetstream import JetStream, Stored
from organism.bus.tail import StreamTail
from organism.core import _bus

KV = f"KV_{_bus.BUCKET_JOBS}"
AGAIN = 500
"""Messages that are read again where a stream ends before what was read of it."""


class Recorder:
    """``orders`` are the newest run orders of each job, for those who forge."""

    def __init__(self, js: JetStream, book: Notebook) -> None:
        self.js, self.book = js, book
        self.orders: dict[str, list[dict[str, Any]]] = {}
        self.results: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._next = 0

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._follow(_bus.STREAM_WQ, self._queue)),
            asyncio.create_task(self._follow(_bus.STREAM_RESULTS, self._result)),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raises what ended the recording."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def _follow(self, stream: str, take: Any) -> None:
        start = 1
        while True:
            tail = StreamTail(self.js, stream, start_seq=start)
            try:
                async for batch in tail:
                    for message in batch:
                        take(message)
            except StreamReset as problem:
                # what was read and never was on disk has gone with the server; what comes in its places is read again
                self.book.note("reset", stream=stream, why=str(problem))
                start = max(1, tail.next_seq - AGAIN)
            finally:
                await tail.close()

    def _queue(self, message: Stored) -> None:
        if 0 < self._next < message.seq:  # cut off for so long that what is finished was purged meanwhile
            self.book.note("missed", first=self._next, last=message.seq - 1)
        self._next = message.seq + 1
        kind = message.subject.split(".")[2]
        body = json.loads(message.data)
        if kind == "run":
            body.pop("spec")
            self.orders.setdefault(body["task_id"], []).append(body)
            self.book.note("order", seq=message.seq, body=body)
        elif kind == "journal" and body["kind"] == "retry":
            self.book.note("retry", seq=message.seq, body=body)
        elif kind == "epoch":
            self.book.note("epoch", seq=message.seq, epoch=body["epoch"])
        elif kind == "enqueue":
            self.book.note("queued", seq=message.seq, task_id=body.get("task_id"), labels=body.get("labels", {}))

    def _result(self, message: Stored) -> None:
        if message.subject.startswith("gpu.task.result."):
            self.results.add(message.subject.rsplit(".", 1)[-1])

    async def dump(self) -> None:
        """All results, events, states and dead letters."""
        for stream, what in (
            (_bus.STREAM_RESULTS, "result"),
            (_bus.STREAM_EVENTS, "event"),
            (KV, "state"),
            (_bus.STREAM_DLQ, "dead"),
        ):
            for message in await whole(self.js, stream):
                if not message.subject.startswith("gpu.task.fence."):
                    name = message.subject.rsplit(".", 1)[-1]
                    self.book.note(what, seq=message.seq, task_id=name, body=json.loads(message.data))


async def whole(js: JetStream, stream: str) -> list[Stored]:
    """All that a quiet stream holds."""
    state = (await js.info(stream))["state"]
    if not state["messages"]:
        return []
    found: list[Stored] = []
    tail = StreamTail(js, stream)
    try:
        async for batch in tail:
            found += batch
            if tail.caught_up or tail.next_seq > int(state["last_seq"]):
                return found
    finally:
        await tail.close()
    return found


def witness(ran: Path, book: Notebook) -> None:
    """What the jobs themselves wrote down."""
    for place in sorted(ran.iterdir()):
        for line in place.read_text().splitlines():
            words = line.split()
            if len(words) == 3:
                book.note("ran", task_id=place.name, step=words[0], attempt=int(words[1]), gpu=words[2])
