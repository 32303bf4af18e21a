# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drives one peer, inside that peer's own virtual environment: ``python drive.py APP MODE ARGUMENTS...``.

APP is a module beside this file with ``count_many(n)``, ``stamp(sent)`` and ``echo()`` (coroutines). It prints one line
of JSON. Nothing of the product is importable here.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import threading
import time
from typing import Any

import redis

WAIT = 300.0


def _redis() -> Any:
    return redis.Redis.from_url(os.environ["BENCH_REDIS"])


async def bulk(app: Any, count: int) -> dict[str, Any]:
    """Seconds from the first submission to the last completion."""
    store = _redis()
    store.set("bench:count", 0)
    began = time.monotonic()
    await app.count_many(count)
    submitted = time.monotonic() - began
    while int(store.get("bench:count")) < count:
        if time.monotonic() - began > WAIT:
            raise SystemExit(f"only {int(store.get('bench:count'))} of {count} jobs ended within {WAIT:g} s")
        await asyncio.sleep(0.005)  # a counter tells nobody
    return {"seconds": time.monotonic() - began, "submitted": submitted}


async def idle(app: Any, count: int) -> dict[str, Any]:
    """One job at a time, its result fetched the way that the library offers."""
    starts, ends = [], []
    for _ in range(count):
        wall, began = time.time(), time.monotonic()
        started = await app.echo()
        ends.append(time.monotonic() - began)
        starts.append(max(0.0, started - wall))
    return {"start": starts, "result": ends}


async def loaded(app: Any, rate: float, seconds: float) -> dict[str, Any]:
    """At so many a second, whatever becomes of the earlier ones; from submission to start."""
    store = _redis()
    store.delete("bench:stamps")
    total, starts = max(10, int(rate * seconds)), []

    def collect() -> None:
        while len(starts) < total:
            found = store.blpop("bench:stamps", timeout=60)
            if found is None:
                return
            sent, started = found[1].split()
            starts.append(max(0.0, float(started) - float(sent)))

    reader = threading.Thread(target=collect)
    reader.start()
    began = time.monotonic()
    for number in range(total):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))  # the rhythm is the purpose
        await app.stamp(time.time())
    sent = time.monotonic() - began
    await asyncio.to_thread(reader.join)
    return {"start": starts, "rate": total / sent, "total": total}


async def main(words: list[str]) -> None:
    name, mode, *rest = words
    app = importlib.import_module(name)
    modes = {"bulk": lambda: bulk(app, int(rest[0])), "idle": lambda: idle(app, int(rest[0])),
             "loaded": lambda: loaded(app, float(rest[0]), float(rest[1]))}  # fmt: skip
    print(json.dumps(await modes[mode]()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
