# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No-op jobs through a pool: how many a second, and how long each takes; all by the product's own client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bench.jobs_pool import Pool
from bench.jobs_table import spread

from organism.bus.messages import seconds_since_epoch
from organism.client import AsyncMaestro
from organism.client._results import Result

NOOP = {"type": "noop"}
WINDOW = 100
"""Single submissions on their way at the same time."""
WAIT = 300.0


@dataclass(frozen=True)
class Throughput:
    """From the first submission to the last result in the submitter's hands; processor time in microseconds a job."""

    rate: float
    submitted: float
    """Submissions a second until the last was confirmed."""
    cpu: dict[str, float]
    syncs: float | None


async def _measured(pool: Pool, count: int, work: Callable[[], Awaitable[float]]) -> Throughput:
    """``work`` returns the moment at which the last submission was confirmed."""
    before, syncs, began = pool.usage(), pool.syncs(), time.monotonic()
    confirmed = await work()
    spent = time.monotonic() - began
    after = pool.usage()
    cpu = {name: 1e6 * (after[name].cpu - before[name].cpu) / count for name in after}
    counted = (pool.syncs() - syncs) / count if pool.shape.traced or pool.shape.delay else None
    return Throughput(count / spent, count / (confirmed - began), cpu, counted)


async def batches(pool: Pool, maestro: AsyncMaestro, count: int) -> Throughput:
    """In atomic batches of up to 1,000, as ``submit_many`` makes them."""

    async def work() -> float:
        handles = await maestro.submit_many([NOOP] * count)
        confirmed = time.monotonic()
        await maestro.wait(handles, timeout=WAIT)
        return confirmed

    return await _measured(pool, count, work)


async def array(pool: Pool, maestro: AsyncMaestro, count: int) -> Throughput:
    async def work() -> float:
        handles = await maestro.submit_array(count, type="noop")
        confirmed = time.monotonic()
        await maestro.wait(handles, timeout=WAIT)
        return confirmed

    return await _measured(pool, count, work)


async def singles(pool: Pool, maestro: AsyncMaestro, count: int) -> Throughput:
    """Each by itself, ``WINDOW`` at a time: one fsync each in the stream of submissions is their limit."""
    room = asyncio.Semaphore(WINDOW)

    async def work() -> float:
        async def one() -> object:
            async with room:
                return await maestro.submit(type="noop")

        handles = await asyncio.gather(*(one() for _ in range(count)))
        confirmed = time.monotonic()
        await maestro.wait(handles, timeout=WAIT)  # type: ignore[arg-type]  # handles, by submit's own type
        return confirmed

    return await _measured(pool, count, work)


async def steady(pool: Pool, maestro: AsyncMaestro, count: int) -> Throughput:
    """``WINDOW`` single jobs at a time, the next when one's result is there: what can be kept up.

    :func:`singles` cannot: its submissions are confirmed faster than the jobs go, so that a queue of most of them
    builds up, and a long queue is worked off in large groups, which take half the processor time a job.
    """
    room = asyncio.Semaphore(WINDOW)

    async def work() -> float:
        async def one() -> None:
            async with room:
                await _one(maestro)

        await asyncio.gather(*(one() for _ in range(count)))
        return time.monotonic()

    return await _measured(pool, count, work)


@dataclass(frozen=True)
class Latency:
    """Milliseconds: p50, p99, max. ``start`` is by the worker's stamp, which has whole milliseconds."""

    start: dict[str, float]
    result: dict[str, float]
    rate: float


async def _one(maestro: AsyncMaestro) -> tuple[float, float]:
    """Seconds from submission to start, and to the result in the submitter's hands."""
    wall, began = time.time(), time.monotonic()
    handle = await maestro.submit(type="noop")
    result: Result = await handle.result(timeout=WAIT)
    spent = time.monotonic() - began
    started = seconds_since_epoch(result.started or result.submitted)
    return max(0.0, started + 0.0005 - wall), spent  # the middle of its millisecond


async def idle(maestro: AsyncMaestro, count: int) -> Latency:
    """One job at a time."""
    began = time.monotonic()
    found = [await _one(maestro) for _ in range(count)]
    rate = count / (time.monotonic() - began)
    return Latency(spread([start for start, _ in found]), spread([end for _, end in found]), rate)


async def loaded(maestro: AsyncMaestro, rate: float, seconds: float) -> Latency:
    """Single jobs at so many a second, whatever becomes of the earlier ones."""
    tasks: list[asyncio.Task[tuple[float, float]]] = []
    began = time.monotonic()
    total = max(10, int(rate * seconds))
    for number in range(total):
        due = began + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))  # the rhythm is the purpose
        tasks.append(asyncio.create_task(_one(maestro)))
    sent = time.monotonic() - began
    found = await asyncio.gather(*tasks)
    return Latency(spread([start for start, _ in found]), spread([end for _, end in found]), total / sent)
