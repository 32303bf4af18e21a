# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Throughput and latency, ours and the peers', in interleaved rounds; and the same with a slow disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

from bench import jobs_load, jobs_peers
from bench.jobs_peers import Peer
from bench.jobs_pool import Pool, Shape, pool
from bench.jobs_table import Column, middle, ratios, text_of

Row = dict[str, float | None]
Say = Callable[[str], None]
DELAY = 0.001
"""Seconds that a slow disk takes longer for each fsync."""
FIELDS = ("server", "conductor", "workers", "client")

COLUMNS = (
    Column("rate", "jobs/s", 0),
    Column("start_p50", "start p50 ms"), Column("start_p99", "p99"),
    Column("p50", "result p50 ms"), Column("p99", "p99"),
    Column("start80_p50", "80 %: start p50 ms"), Column("start80_p99", "p99"),
    Column("p50_80", "result p50"), Column("p99_80", "p99"),
    Column("cpu", "CPU us/job", 0),
)  # fmt: skip
DISK_COLUMNS = (
    Column("rate", "jobs/s", 0), Column("p50", "result p50 ms"), Column("p99", "p99"),
    Column("syncs", "fsyncs/job", 2), Column("syncs_idle", "at idle", 2), Column("cpu", "CPU us/job", 0),
)  # fmt: skip


class Sizes(Protocol):
    @property
    def jobs(self) -> int: ...
    @property
    def singles(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def _row(found: jobs_load.Throughput) -> Row:
    """``cpu`` without the submitter's own, as for the peers."""
    row: Row = {"rate": found.rate, "submitted": found.submitted, "syncs": found.syncs}
    row["cpu"] = sum(found.cpu[name] for name in FIELDS if name != "client")
    return row | {f"cpu_{name}": found.cpu[name] for name in FIELDS}


async def _round(made: Pool, sizes: Sizes, *, load: bool) -> dict[str, Row]:
    """Ours: batches, an array, single submissions, one job at a time, and four fifths of what single ones can do."""
    async with made.client() as maestro:
        await jobs_load.batches(made, maestro, max(50, sizes.jobs // 10))
        row = _row(await jobs_load.batches(made, maestro, sizes.jobs))
        arrays = _row(await jobs_load.array(made, maestro, sizes.jobs))
        singles = _row(await jobs_load.singles(made, maestro, sizes.jobs))
        await asyncio.sleep(0.5)  # whatever is written behind is then written
        syncs = made.syncs()
        idle = await jobs_load.idle(maestro, sizes.singles)
        row["syncs_idle"] = (made.syncs() - syncs) / sizes.singles if row["syncs"] is not None else None
        row |= {"start_p50": idle.start["p50"], "start_p99": idle.start["p99"],
                "p50": idle.result["p50"], "p99": idle.result["p99"]}  # fmt: skip
        if load:
            kept_up = await jobs_load.steady(made, maestro, sizes.jobs)
            row["steady"] = kept_up.rate
            busy = await jobs_load.loaded(maestro, 0.8 * kept_up.rate, sizes.seconds)
            row |= {"start80_p50": busy.start["p50"], "start80_p99": busy.start["p99"],
                    "p50_80": busy.result["p50"], "p99_80": busy.result["p99"], "load": busy.rate}  # fmt: skip
    return {"maestro": row, "maestro, array": arrays, "maestro, one by one": singles}


async def speed(
    result: dict[str, Any], sizes: Sizes, folder: Path, cache: Path, peers: Sequence[Peer], say: Say
) -> None:
    for peer in peers:
        await asyncio.to_thread(jobs_peers.environment, cache, peer)
    rounds: dict[str, list[Row]] = {}
    async with AsyncExitStack() as stack:
        say("a server, a conductor, twelve workers")
        made = await stack.enter_async_context(pool(folder / "speed"))
        for number in range(1, sizes.rounds + 1):
            ours = await _round(made, sizes, load=True)
            for name, row in ours.items():
                rounds.setdefault(name, []).append(row)
            say(f"round {number}: maestro {text_of(ours['maestro']['rate'], 0)} jobs/s, "
                f"p99 {text_of(ours['maestro']['p99'], 1)} ms")  # fmt: skip
            for peer in peers:
                for sync in jobs_peers.SYNCS:
                    name = peer.name if sync == "everysec" else f"{peer.name}, always"
                    with jobs_peers.running(peer, cache, folder / "peer", sync) as running:
                        row = running.measure(sizes.jobs, sizes.singles, sizes.seconds)
                    rounds.setdefault(name, []).append(row)
                    say(f"round {number}: {name} {text_of(row['rate'], 0)} jobs/s, p99 {text_of(row['p99'], 1)} ms")
    rows = {name: middle(many) for name, many in rounds.items()}
    parts = {name: text_of(rows["maestro"][f"cpu_{name}"], 0) for name in FIELDS}
    result["tables"]["speed"] = rows
    result["notes"]["speed"] = [
        "maestro's CPU us/job: " + ", ".join(f"{name} {value}" for name, value in parts.items()),
        "80 % of jobs that are waited for one by one, a hundred at a time: "
        f"{text_of(rows['maestro'].get('steady'), 0)} a second are all",
        "submissions confirmed a second: " + ", ".join(
            f"{name} {text_of(row['submitted'], 0)}" for name, row in rows.items() if row.get("submitted")
        ),
        "jobs/s, ours / theirs: " + _told(ratios(_peers_and(rows), "rate")),
        "result p99, ours / theirs: " + _told(ratios(_peers_and(rows), "p99")),
        "CPU a job, ours / theirs: " + _told(ratios(_peers_and(rows), "cpu")),
    ]  # fmt: skip


def _peers_and(rows: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if name == "maestro" or not name.startswith("maestro")}


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items()) or "no peer ran"


async def slow_disk(
    result: dict[str, Any], sizes: Sizes, folder: Path, _cache: Path, _peers: Sequence[Peer], say: Say
) -> None:
    """Two pools, both under strace (which counts): one with the disk as it is, one a millisecond slower."""
    rows: dict[str, Row] = {}
    for title, delay in (("this disk", 0.0), ("", DELAY)):
        say(f"{title or f'{1e3 * delay:g} ms more for each fsync'}, counted")
        async with pool(folder / "disk", Shape(delay=delay, traced=True)) as made:
            many = [await _round(made, sizes, load=False) for _ in range(sizes.rounds)]
        for name in many[0]:
            rows[f"{name}, {title}" if title else name] = middle([one[name] for one in many])
    result["tables"]["disk"] = rows
    result["notes"]["disk"] = [
        f"without a disk's name: {1e3 * DELAY:g} ms more for each fsync, by strace, which counts them in all rows"
    ]
