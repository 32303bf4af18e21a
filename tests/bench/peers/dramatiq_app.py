# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dramatiq on Redis, as its guide sets it up, with a result backend for the echo."""

from __future__ import annotations

import os
import time

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

URL = os.environ["BENCH_REDIS"]
store = redis.Redis.from_url(URL)
broker = RedisBroker(url=URL)
backend = RedisBackend(url=URL)
broker.add_middleware(Results(backend=backend))
dramatiq.set_broker(broker)


@dramatiq.actor
def count() -> None:
    store.incr("bench:count")


@dramatiq.actor
def stamped(sent: float) -> None:
    store.rpush("bench:stamps", f"{sent} {time.time()}")


@dramatiq.actor(store_results=True)
def told() -> float:
    return time.time()


async def count_many(number: int) -> None:
    for _ in range(number):
        count.send()


async def stamp(sent: float) -> None:
    stamped.send(sent)


async def echo() -> float:
    return float(told.send().get_result(block=True, timeout=60_000))
