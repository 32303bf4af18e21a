# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What shards cost and give: a conductor's processor time a job with one and two of them, and a dead one's takeover.

Jobs a second are told only where there are four cores or more: on fewer the conductors, the server and twelve workers
share what one of them could use up, and a second conductor has nothing to run on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.jobs_load import NOOP, WAIT
from bench.jobs_pool import Pool, Shape, Usage, pool
from bench.jobs_table import Column, middle

from organism.client import AsyncMaestro
from organism.core._client_settings import in_shard

Say = Callable[[str], None]
CORES = 4
"""Fewer cannot show that a second conductor helps."""
COLUMNS = (
    Column("conductors", "conductors us/job", 0),
    Column("most", "busiest us/job of all", 0),
    Column("server", "server us/job", 0),
    Column("rate", f"jobs/s ({CORES} cores or more)", 0),
    Column("leads", "taken over after s", 2),
    Column("result", "first result after s", 2),
    Column("gap", "other shard's longest wait s", 2),
)
EACH = 0.02
"""Seconds between two looks at a log."""


class Sizes(Protocol):
    @property
    def jobs(self) -> int: ...

    @property
    def rounds(self) -> int: ...


@dataclass
class Shards(Shape):
    """``shards`` of each conductor by its name, its own first; the GPUs are dealt out among all of them."""

    shards: dict[str, Sequence[str]] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        return sorted({shard for shards in self.shards.values() for shard in shards})


class ShardPool(Pool):
    """A pool whose GPUs and conductors are divided."""

    shape: Shards

    def _conductor(self, name: str) -> Any:
        part = super()._conductor(name)
        _add(self.folder / f"maestro-{name}.conf", ",".join(self.shape.shards[name]))
        return part

    def _worker_config(self, gpu: str) -> Path:
        names = self.shape.all
        return _add(super()._worker_config(gpu), names[self.gpus.index(gpu) % len(names)])

    async def all_lead(self) -> None:
        """Until each shard has a leader: its own conductor, where it has one."""
        own = {shards[0]: name for name, shards in self.shape.shards.items()}
        for shard in self.shape.all:
            await self.leads(shard, [own[shard]] if shard in own else list(self.shape.shards))

    async def leads(self, shard: str, names: Sequence[str], times: int = 1) -> None:
        logs = [part.log for part in self.conductors if part.name.rpartition(".")[2] in names]
        async with asyncio.timeout(WAIT):
            while not any(log.read_text().count(f"leading shard {shard}, epoch") >= times for log in logs):  # noqa: ASYNC110 - a log tells nobody
                await asyncio.sleep(EACH)

    def client_of(self, shard: str) -> AsyncMaestro:
        return AsyncMaestro(in_shard(self.client().settings, shard, "the benchmark"))


def _add(config: Path, shard: str) -> Path:
    with config.open("a") as file:
        file.write(f"SHARD={shard}\n")
    return config


SHAPES: dict[str, dict[str, Sequence[str]]] = {
    "1 shard": {"a": ["0"]},
    "2 shards, a conductor each": {"a": ["0"], "b": ["1"]},
    "2 shards, 1 conductor": {"a": ["0", "1"]},
}


async def shards(result: dict[str, Any], sizes: Sizes, folder: Path, say: Say) -> None:
    """Fills ``result["tables"]["shards"]``."""
    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in SHAPES}
    for number in range(1, sizes.rounds + 1):
        for place, (name, divided) in enumerate(SHAPES.items()):
            shape = Shards(conductors=tuple(divided), shards=divided)
            async with pool(folder / f"shards-{number}-{place}", shape, kind=ShardPool) as made:
                assert isinstance(made, ShardPool)
                found[name].append(await _throughput(made, sizes.jobs))
            say(f"round {number}: {name}: {found[name][-1]['conductors']:.0f} us of the conductors a job")
    rows: dict[str, dict[str, float | None]] = {name: middle(rounds) for name, rounds in found.items()}
    divided = {"a": ["0", "1"], "b": ["1", "0"]}
    shape = Shards(conductors=tuple(divided), shards=divided)
    async with pool(folder / "shards-takeover", shape, kind=ShardPool) as made:
        assert isinstance(made, ShardPool)
        rows["2 hosts, one killed (LEASE_TTL_SEC 6)"] = await _takeover(made)
    result["tables"]["shards"] = rows
    if not _enough():
        why = f"{os.cpu_count()} cores: whether two conductors do more jobs a second cannot be shown here"
        result["notes"]["shards"] = [why]


def _enough() -> bool:
    return (os.cpu_count() or 1) >= CORES


async def _throughput(made: ShardPool, count: int) -> dict[str, float | None]:
    """Batches of no-ops, as many in each shard, all at the same time."""
    await made.all_lead()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(made.client_of(shard)) for shard in made.shape.all]
        await asyncio.gather(*(_batch(client, 50) for client in clients))
        before, whole, began = _each(made), made.usage(), time.monotonic()
        await asyncio.gather(*(_batch(client, count // len(clients)) for client in clients))
        spent = time.monotonic() - began
        used = [after.cpu - one.cpu for one, after in zip(before, _each(made), strict=True)]
        server = made.usage()["server"].cpu - whole["server"].cpu
    done = count // len(clients) * len(clients)
    return {
        "conductors": 1e6 * sum(used) / done,
        "most": 1e6 * max(used) / done,
        "server": 1e6 * server / done,
        "rate": done / spent if _enough() else None,
    }


def _each(made: ShardPool) -> list[Usage]:
    return [Usage.of(part.pid) for part in made.conductors]


async def _batch(client: AsyncMaestro, count: int) -> None:
    await client.wait(await client.submit_many([NOOP] * count), timeout=WAIT)


async def _takeover(made: ShardPool) -> dict[str, float | None]:
    """Kill shard 1's conductor; shard 0 gets a job at a time meanwhile."""
    await made.all_lead()
    async with made.client_of("0") as zero, made.client_of("1") as one:
        await asyncio.gather(_batch(zero, 20), _batch(one, 20))
        over = asyncio.Event()
        waiting = asyncio.create_task(_longest(zero, over))
        dead = next(part for part in made.conductors if part.name.endswith(".b"))
        dead.kill()
        began = time.monotonic()
        handle = await one.submit(**NOOP)  # type: ignore[arg-type]  # the type's name
        await made.leads("1", ["a"])
        leads = time.monotonic() - began
        await handle.result(timeout=WAIT)
        result = time.monotonic() - began
        over.set()
        return {"leads": leads, "result": result, "gap": await waiting}


async def _longest(client: AsyncMaestro, over: asyncio.Event) -> float:
    longest = 0.0
    while not over.is_set():
        began = time.monotonic()
        await (await client.submit(type="noop")).result(timeout=WAIT)
        longest = max(longest, time.monotonic() - began)
    return longest
