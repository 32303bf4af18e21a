# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Following one job: its output and its states, until it is final."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from nats.aio.msg import Msg

from organism.bus import messages, rpc_types
from organism.client._errors import NotFoundError
from organism.client._link import Link
from organism.client._requests import build_request
from organism.client._results import LogChunk, Result
from organism.client._waiting import Waiter
from organism.core import _bus

LOG_PAUSE = 0.5
"""Seconds between two questions for new output: the worker pushes none, lest a chatty job load the bus."""
STATE_PAUSE = 0.5
PROGRESS_PAUSE = 1.0
FRESH, FRESH_PAUSE = 2.0, 0.1
"""Seconds that a job may be unknown to the conductor after its submission, and between two questions meanwhile."""

Reply = TypeVar("Reply")


async def patiently(ask: Callable[[], Awaitable[Reply]]) -> Reply:
    """The answer about a job that may have been submitted a moment ago: the conductor reads it from the bus at its own
    pace. Raises NotFoundError when it is still unknown after :data:`FRESH` seconds."""
    started = time.monotonic()
    while True:
        try:
            return await ask()
        except NotFoundError:
            if time.monotonic() - started >= FRESH:
                raise
        await asyncio.sleep(FRESH_PAUSE)  # nobody tells when it is read


async def logs(
    link: Link, task: rpc_types.TaskRequest, stream: str, follow: bool, offset: int
) -> AsyncGenerator[LogChunk]:
    """Pieces of output. A job that was started again starts over, with the next attempt's number."""
    attempt = 0
    while True:
        request = build_request(
            {"task_id": task.task_id, "stream": stream, "offset": offset, "attempt": attempt}, rpc_types.LogsRequest
        )
        reply = await link.rpc("logs", request, rpc_types.LogsReply)
        attempt, offset = reply.attempt, reply.next_offset
        if reply.text:
            yield LogChunk(reply.text, reply.attempt, reply.state)
        if reply.eof and (reply.state in messages.FINAL_STATES or not follow):
            return
        if not reply.text:
            if not follow:
                return
            await asyncio.sleep(LOG_PAUSE)


async def progress(link: Link, task: rpc_types.TaskRequest) -> AsyncGenerator[rpc_types.JobInfo]:
    """The job whenever what it says of its progress has changed; ends with it. Raises NotFoundError."""
    last: tuple[float | None, str, int] = (None, "", 0)
    while True:
        job = (await patiently(lambda: link.rpc("status", task, rpc_types.JobReply))).job
        if job.state in messages.FINAL_STATES:
            return
        told = (job.progress, job.progress_text, job.attempt)
        if told[:2] != (None, "") and told != last:
            last = told
            yield job
        await asyncio.sleep(PROGRESS_PAUSE)  # the conductor pushes none, lest a chatty job load the bus


async def states(link: Link, waiter: Waiter, task: rpc_types.TaskRequest) -> AsyncGenerator[messages.StateEvent]:
    """State events until the final one. Raises NotFoundError."""
    events: asyncio.Queue[messages.StateEvent] = asyncio.Queue()

    async def heard(message: Msg) -> None:
        with suppress(messages.BadMessage):  # an event of another version; the result tells the end anyway
            events.put_nowait(messages.decode(message.data, messages.StateEvent))

    subscription = None
    if link.settings.kind == "operator":
        subscription = await link.nc.subscribe(_bus.state_subject(task.task_id), cb=heard)
        await link.nc.flush()
    try:
        with waiter.expecting([task.task_id], fresh=False) as futures:
            final = futures[task.task_id]
            seen = -1
            last: tuple[str, int] | None = None
            while not final.done():
                if subscription is None or last is None:
                    event = await _now(link, task)
                else:
                    event = await _next(events, final)
                if event is not None and _is_news(event, seen, last):
                    last, seen = (event.state, event.attempt), max(seen, event.n)
                    yield event
                if subscription is None:
                    await asyncio.wait({final}, timeout=STATE_PAUSE)
            for event in _rest(final.result(), seen, last):
                yield event
    finally:
        if subscription is not None:
            await subscription.unsubscribe()


def _is_news(event: messages.StateEvent, seen: int, last: tuple[str, int] | None) -> bool:
    """The final state is told from the result, where it is certain."""
    if event.state in messages.FINAL_STATES or (event.state, event.attempt) == last:
        return False
    return event.n < 0 or event.n > seen


def _rest(result: Result, seen: int, last: tuple[str, int] | None) -> list[messages.StateEvent]:
    """What was not heard on the way, and the end: the history that comes with the result is complete."""
    history = result.history
    if seen < 0 and last is not None:
        # states came by asking, without their numbers: go on after the newest that looks like the last one told
        alike = [event.n for event in history if (event.state, event.attempt) == last]
        seen = max(alike, default=-1)
    rest = [event for event in history if event.n > seen]
    if not rest or rest[-1].state != result.state:
        rest.append(
            messages.StateEvent(
                ts=result.finished or messages.now(),
                task_id=result.task_id,
                n=max((event.n for event in history), default=seen) + 1,
                state=result.state,
                user=result.user,
                gpu=result.gpu,
                attempt=result.attempts,
                err=result.error,
                reason=result.reason or None,
            )
        )
    return rest


async def _now(link: Link, task: rpc_types.TaskRequest) -> messages.StateEvent | None:
    try:
        job = (await link.rpc("status", task, rpc_types.JobReply)).job
    except NotFoundError:
        return None  # the waiter decides when unknown is final
    return messages.StateEvent(
        ts=job.since or messages.now(),
        task_id=job.task_id,
        n=-1,
        state=job.state,
        user=job.user,
        gpu=job.gpu,
        attempt=job.attempt,
        tries=job.tries,
        err=job.err or None,
        reason=job.reason or None,
    )


async def _next(
    events: asyncio.Queue[messages.StateEvent], final: asyncio.Future[Result]
) -> messages.StateEvent | None:
    getting = asyncio.ensure_future(events.get())
    both: set[asyncio.Future[Any]] = {getting, final}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()
