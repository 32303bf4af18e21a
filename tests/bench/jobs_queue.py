# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a long queue costs a conductor, in time, memory and at a restart; and what many workers cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bench import jobs_load
from bench.jobs_pool import Pool, Shape, Usage, pool
from bench.jobs_table import Column, text_of

from organism.client import AsyncMaestro, MaestroError

Say = Callable[[str], None]
PIECE = 10_000
"""Jobs that are handed to the client at once."""
AHEAD = 10
"""Priority of the jobs that are measured in front of those that wait."""
IN_CROWD = 20
"""Simulated workers in one process."""
HANG = 1800.0

COLUMNS = (
    Column("submit", "submitted/s", 0), Column("intake_cpu", "intake CPU us/job", 0),
    Column("memory", "RSS bytes/job", 0), Column("restart", "restart s", 2), Column("restart_cpu", "CPU us/job", 0),
    Column("rate", "jobs/s before them", 0), Column("cpu", "conductor CPU us/job", 0),
)  # fmt: skip
CROWD_COLUMNS = (
    Column("rate", "jobs/s", 0), Column("p50", "result p50 ms"), Column("p99", "p99"),
    Column("cpu_conductor", "conductor CPU us/job", 0), Column("cpu_server", "server", 0),
    Column("idle", "conductor % of a core, idle", 1),
)  # fmt: skip


class Sizes(Protocol):
    @property
    def jobs(self) -> int: ...
    @property
    def singles(self) -> int: ...
    @property
    def waiting(self) -> tuple[int, ...]: ...
    @property
    def crowd(self) -> int: ...


async def _queued(maestro: AsyncMaestro) -> int:
    reply = await maestro.top()
    return sum(count for state, count in reply.queue.items() if state in ("enqueued", "waiting_gpu", "retry"))


async def _until_queued(maestro: AsyncMaestro, count: int) -> None:
    async with asyncio.timeout(HANG):
        while True:
            try:
                if await _queued(maestro) >= count:
                    return
            except MaestroError:
                pass  # it takes over: the next question tells
            await asyncio.sleep(0.05)  # a count tells nobody


async def _wait_in_line(made: Pool, maestro: AsyncMaestro, count: int) -> dict[str, float | None]:
    conductor = made.conductors[0]
    before, began = Usage.of(conductor.pid), time.monotonic()
    for at in range(0, count, PIECE):
        await maestro.submit_many([jobs_load.NOOP] * min(PIECE, count - at), confirm=120)
    submitted = time.monotonic() - began
    await _until_queued(maestro, count)
    after = Usage.of(conductor.pid)
    return {
        "submit": count / submitted,
        "intake_cpu": 1e6 * (after.cpu - before.cpu) / count,
        "memory": (after.rss - before.rss) / count,
    }


async def waiting(result: dict[str, Any], sizes: Sizes, folder: Path, say: Say) -> None:
    """Jobs wait while no worker is there; the conductor is killed and started anew; others go before them."""
    rows = {}
    for count in sizes.waiting:
        name = f"{count:,} waiting"
        say(name)
        async with pool(folder / "queue", Shape(), workers=False) as made, made.client() as maestro:
            row = await _wait_in_line(made, maestro, count)
            conductor = made.conductors[0]
            conductor.kill()
            began = time.monotonic()
            conductor.start()
            await made.leading(2)
            row["restart"] = time.monotonic() - began
            row["restart_cpu"] = 1e6 * Usage.of(conductor.pid).cpu / count
            await made.start_workers()
            await _first(maestro)
            ahead = [{**jobs_load.NOOP, "priority": AHEAD}] * sizes.jobs
            before, began = Usage.of(conductor.pid), time.monotonic()
            await maestro.wait(await maestro.submit_many(ahead), timeout=HANG)
            row["rate"] = sizes.jobs / (time.monotonic() - began)
            row["cpu"] = 1e6 * (Usage.of(conductor.pid).cpu - before.cpu) / sizes.jobs
            rows[name] = row
            say(", ".join(f"{key} {text_of(value, 1)}" for key, value in row.items()))
    result["tables"]["queue"] = rows
    result["notes"]["queue"] = [
        "restart: from the conductor's kill -9 until its next start leads (the dead one's lease of 6 s included)",
        "jobs/s: of jobs with a higher priority, while the others wait",
    ]


async def _first(maestro: AsyncMaestro) -> None:
    """All workers are known: jobs go."""
    handle = await maestro.submit(type="noop", priority=AHEAD)
    await handle.result(timeout=HANG)


async def crowd(result: dict[str, Any], sizes: Sizes, folder: Path, say: Say) -> None:
    """Twelve workers and many, in both cases several to a process, so that the number is the only difference."""
    rows = {}
    for count in (12, sizes.crowd):
        say(f"{count} workers")
        shape = Shape(gpus=count, crowd=min(IN_CROWD, count))
        async with pool(folder / "crowd", shape) as made, made.client() as maestro:
            await jobs_load.batches(made, maestro, max(50, sizes.jobs // 10))
            before, began = Usage.of(made.conductors[0].pid), time.monotonic()
            await asyncio.sleep(3.0)  # nothing happens but heartbeats and metrics: that is what is measured
            idle = 100 * (Usage.of(made.conductors[0].pid).cpu - before.cpu) / (time.monotonic() - began)
            bulk = await jobs_load.batches(made, maestro, sizes.jobs)
            single = await jobs_load.idle(maestro, sizes.singles)
            rows[f"{count} workers"] = {
                "rate": bulk.rate, "p50": single.result["p50"], "p99": single.result["p99"],
                "cpu_conductor": bulk.cpu["conductor"], "cpu_server": bulk.cpu["server"], "idle": idle,
            }  # fmt: skip
    result["tables"]["crowd"] = rows
    result["notes"]["crowd"] = [f"simulated: the product's own workers, up to {IN_CROWD} in one process each"]
