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
from bench.jobs_pool import CONDUCTOR, LIMITS, Pool, Shape, Usage, pool
from bench.jobs_table import Column, text_of
from chaos.jobs.parts import Part

from organism.client import AsyncMaestro, MaestroError
from organism.core import _bus

Say = Callable[[str], None]
PIECE = 10_000
"""Jobs that are handed to the client at once."""
AHEAD = 10
"""Priority of the jobs that are measured in front of those that wait."""
ANNOUNCED = 6.0
"""Seconds after which a job that waits is announced to do so (WAIT_GPU_SEC is 5)."""
LATER = 6 * 3600.0
"""Seconds: a job that waits for its time does so until the pool is ended."""
IN_CROWD = 20
"""Simulated workers in one process."""
HANG = 3600.0
LOOK, STILL, LOOKS = 1.0, 0.05, 5
"""Seconds between two looks at a conductor, and seconds of processor time between them that mean that it rests; so many
times in a row, since it may wait for a server that has no processor."""

COLUMNS = (
    Column("submit", "submitted/s", 0), Column("intake_cpu", "intake CPU us/job", 0),
    Column("memory", "RSS bytes/job", 0), Column("server_memory", "server's", 0),
    Column("restart", "restart s", 2), Column("restart_cpu", "CPU us/job", 0), Column("after_cpu", "and after it", 0),
    Column("rate", "jobs/s before them", 0), Column("cpu", "conductor CPU us/job", 0),
)  # fmt: skip
CROWD_COLUMNS = (
    Column("rate", "jobs/s", 0), Column("p50", "result p50 ms"), Column("p99", "p99"),
    Column("cpu_conductor", "conductor CPU us/job", 0), Column("cpu_server", "server", 0),
    Column("idle", "conductor % of a core, idle", 1), Column("restart", "restart s", 2),
    Column("complete", "all heard s", 2),
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


async def _done(maestro: AsyncMaestro) -> int:
    return (await maestro.top()).queue["done"]


async def _until_queued(maestro: AsyncMaestro, count: int) -> None:
    async with asyncio.timeout(HANG):
        while True:
            try:
                if await _queued(maestro) >= count:
                    return
            except MaestroError:
                pass  # it takes over: the next question tells
            await asyncio.sleep(0.05)  # a count tells nobody


async def _at_rest(part: Part) -> Usage:
    """What the process has used when it does nothing more: what it writes behind is then written."""
    async with asyncio.timeout(HANG):
        before, still = Usage.of(part.pid), 0
        while still < LOOKS:
            await asyncio.sleep(LOOK)  # work tells nobody that it is over
            after = Usage.of(part.pid)
            still = still + 1 if after.cpu - before.cpu <= STILL else 0
            before = after
        return before


async def _wait_in_line(made: Pool, maestro: AsyncMaestro, count: int) -> dict[str, float | None]:
    conductor = made.conductors[0]
    before, server, began = await _at_rest(conductor), made.usage()["server"], time.monotonic()
    for at in range(0, count, PIECE):
        await maestro.submit_many([jobs_load.NOOP] * min(PIECE, count - at), confirm=120)
    submitted = time.monotonic() - began
    await _until_queued(maestro, count)
    await asyncio.sleep(ANNOUNCED)  # each is then announced to wait for a GPU, which is a part of what it costs
    after = await _at_rest(conductor)
    return {
        "submit": count / submitted,
        "intake_cpu": 1e6 * (after.cpu - before.cpu) / count,
        "memory": (after.rss - before.rss) / count,
        "server_memory": (made.usage()["server"].rss - server.rss) / count,
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
            leads = Usage.of(conductor.pid).cpu
            row["restart_cpu"] = 1e6 * leads / count
            await asyncio.sleep(ANNOUNCED)
            row["after_cpu"] = 1e6 * ((await _at_rest(conductor)).cpu - leads) / count
            row["taken"] = conductor.log.read_text().count("taken by")
            await made.start_workers()
            await _first(maestro)
            ahead = [{**jobs_load.NOOP, "priority": AHEAD}] * sizes.jobs
            before, done, began = Usage.of(conductor.pid), await _done(maestro), time.monotonic()
            await maestro.wait(await maestro.submit_many(ahead), timeout=HANG)
            row["rate"] = sizes.jobs / (time.monotonic() - began)
            # the first and the last of them go beside some of those that wait
            row["cpu"] = 1e6 * (Usage.of(conductor.pid).cpu - before.cpu) / (await _done(maestro) - done)
            rows[name] = row
            say(", ".join(f"{key} {text_of(value, 1)}" for key, value in row.items()))
    result["tables"]["queue"] = rows
    result["notes"]["queue"] = [
        "intake: until everything about the jobs is written behind, and they are announced to wait for a GPU",
        "restart: from the conductor's kill -9 until its next start leads (the dead one's lease of 6 s included);"
        " after it: until it has looked for events that a crash may have cost, and rests",
        f"limits set for this: MAX_QUEUE {CONDUCTOR['MAX_QUEUE']:,}, MiB of ORG_WQ {_mib(LIMITS.queue_bytes)},"
        f" of ORG_EVENTS {_mib(LIMITS.events_bytes)}, of organism_jobs {_mib(LIMITS.jobs_bytes)}",
        "leases taken: "
        + ", ".join(f"{name} {row['taken']:.0f}" for name, row in rows.items())
        + " (2: none was lost)",
        "jobs/s: of jobs with a higher priority, while the others wait",
    ]


def _mib(size: int) -> str:
    return f"{size // _bus.MIB:,}"


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
            restart, complete = await _restart(made, maestro, count, sizes.waiting[-1])
            rows[f"{count} workers"] = {
                "rate": bulk.rate, "p50": single.result["p50"], "p99": single.result["p99"],
                "cpu_conductor": bulk.cpu["conductor"], "cpu_server": bulk.cpu["server"], "idle": idle,
                "restart": restart, "complete": complete,
            }  # fmt: skip
    result["tables"]["crowd"] = rows
    result["notes"]["crowd"] = [
        f"simulated: the product's own workers, up to {IN_CROWD} in one process each",
        f"restart: with {sizes.waiting[-1]:,} jobs waiting, from the conductor's kill -9 until its next start leads;"
        " all heard: until it has heard every worker",
    ]


async def _restart(made: Pool, maestro: AsyncMaestro, workers: int, count: int) -> tuple[float, float]:
    """Seconds until a conductor leads again, and until it knows all its workers, with so many jobs waiting."""
    later = {**jobs_load.NOOP, "delay": LATER}
    for at in range(0, count, PIECE):
        await maestro.submit_many([later] * min(PIECE, count - at), confirm=120)
    await _until_queued(maestro, count)
    conductor = made.conductors[0]
    await _at_rest(conductor)
    conductor.kill()
    began = time.monotonic()
    conductor.start()
    await made.leading(2)
    restart = time.monotonic() - began
    async with asyncio.timeout(HANG):
        while sum(gpu.state == "idle" for gpu in (await maestro.top()).gpus) < workers:  # noqa: ASYNC110 - see below
            await asyncio.sleep(0.05)  # a count tells nobody
    return restart, time.monotonic() - began
