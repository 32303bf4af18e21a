# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Celery on Redis with late acknowledgement: a job whose worker dies is run again, as ours is."""

from __future__ import annotations

import os
import time

import redis
from celery import Celery

URL = os.environ["BENCH_REDIS"]
store = redis.Redis.from_url(URL)
app = Celery("celery_app", broker=URL, backend=URL)
app.conf.task_acks_late = True
app.conf.worker_hijack_root_logger = False


@app.task(ignore_result=True)
def count() -> None:
    store.incr("bench:count")


@app.task(ignore_result=True)
def stamped(sent: float) -> None:
    store.rpush("bench:stamps", f"{sent} {time.time()}")


@app.task
def told() -> float:
    return time.time()


async def count_many(number: int) -> None:
    for _ in range(number):
        count.delay()


async def stamp(sent: float) -> None:
    stamped.delay(sent)


async def echo() -> float:
    return float(told.delay().get(timeout=60, interval=0.001))
