# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""arq; its poll set to 10 ms (the default of half a second makes it look worse than it can be)."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import redis.asyncio
from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

URL = os.environ["BENCH_REDIS"]
SETTINGS = RedisSettings.from_dsn(URL)
POLL = 0.01
_pool: ArqRedis | None = None


async def count(context: dict[str, Any]) -> None:
    await context["store"].incr("bench:count")


async def stamped(context: dict[str, Any], sent: float) -> None:
    await context["store"].rpush("bench:stamps", f"{sent} {time.time()}")


async def told(_context: dict[str, Any]) -> float:
    return time.time()


async def startup(context: dict[str, Any]) -> None:
    context["store"] = redis.asyncio.Redis.from_url(URL)


class WorkerSettings:
    functions = (count, stamped, told)
    redis_settings = SETTINGS
    on_startup = startup
    max_jobs = 12
    poll_delay = POLL
    keep_result = 60


async def _open() -> ArqRedis:
    global _pool  # one driver, one connection
    if _pool is None:
        _pool = await create_pool(SETTINGS)
    return _pool


async def count_many(number: int) -> None:
    pool = await _open()
    for at in range(0, number, 100):
        await asyncio.gather(*(pool.enqueue_job("count") for _ in range(min(100, number - at))))


async def stamp(sent: float) -> None:
    await (await _open()).enqueue_job("stamped", sent)


async def echo() -> float:
    job = await (await _open()).enqueue_job("told")
    if job is None:
        raise RuntimeError("arq did not take the job")
    return float(await job.result(timeout=60, poll_delay=0.001))
