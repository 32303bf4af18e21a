# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""taskiq on Redis streams, which acknowledge; twelve tasks at a time in one worker process."""

from __future__ import annotations

import asyncio
import os
import time

import redis.asyncio
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ["BENCH_REDIS"]
store = redis.asyncio.Redis.from_url(URL)
broker = RedisStreamBroker(url=URL).with_result_backend(RedisAsyncResultBackend(redis_url=URL, result_ex_time=300))
_started = asyncio.Lock()
_up = False


@broker.task(task_name="count")
async def count() -> None:
    await store.incr("bench:count")


@broker.task(task_name="stamped")
async def stamped(sent: float) -> None:
    await store.rpush("bench:stamps", f"{sent} {time.time()}")


@broker.task(task_name="told")
async def told() -> float:
    return time.time()


async def _open() -> None:
    global _up  # one driver, one connection
    async with _started:
        if not _up:
            await broker.startup()
            _up = True


async def count_many(number: int) -> None:
    await _open()
    for at in range(0, number, 100):
        await asyncio.gather(*(count.kiq() for _ in range(min(100, number - at))))


async def stamp(sent: float) -> None:
    await _open()
    await stamped.kiq(sent)


async def echo() -> float:
    await _open()
    task = await told.kiq()
    return float((await task.wait_result(check_interval=0.001, timeout=60)).return_value)
