# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two shards on one bus: each with its own jobs, GPUs and conductors, and neither in the other's way."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus.messages import Report, now
from organism.client import AsyncMaestro
from organism.maestro import janitor
from service.maestro.books import settled_books
from service.maestro.shards import ShardSubmitter, ShardWorker, kept, leads
from service.maestro.stage import ConductorProcess, eventually, forever, lasting, until
from service.support import HANG, BusServer

Conductors = Callable[..., ConductorProcess]
USERS = (("conductor", "a"), ("conductor", "b"), ("submitter", "alice"), ("submitter", "bob"))


@pytest.fixture
def bus(bus_servers: Callable[..., BusServer]) -> BusServer:
    """A running nats-server for four GPUs."""
    return bus_servers(members=[*USERS, *(("worker", f"gpu{number}") for number in range(4))]).ready()


async def crew(bus: BusServer) -> list[ShardWorker]:
    """Two GPUs for each of the shards 0 and 1."""
    return [await ShardWorker(bus, f"gpu{number}", str(number // 2)).start() for number in range(4)]


def did(workers: list[ShardWorker], shard: str) -> set[str]:
    """The ids of jobs that ran on a shard's GPUs."""
    return {ref.task_id for worker in workers if worker.shard == shard for ref in worker.started}


def test_each_shard_runs_its_own_jobs_on_its_own_gpus(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        zero, one = conductors("a"), conductors("b", SHARD="1")
        await asyncio.gather(leads(zero, "0"), leads(one, "1"))
        workers = await crew(bus)
        alice, bob = await ShardSubmitter.of(bus, "0"), await ShardSubmitter.of(bus, "1", "bob")
        first, second = await asyncio.gather(alice.many(150), bob.many(150))
        await asyncio.gather(alice.results(*first), bob.results(*second))
        assert did(workers, "0") == set(first) and did(workers, "1") == set(second)
        assert all(worker.started for worker in workers)
        assert await settled_books(bus, [*first, *second]) == {"done": 300}
        assert (await alice.top(), await bob.top()) == (["gpu0", "gpu1"], ["gpu2", "gpu3"])
        # nobody's report is answered by the other shard, who would not know the job
        assert {verdict for worker in workers for _, verdict in worker.verdicts} <= {"recorded", "retry"}
        listed = await bob.call("list", all=True)
        assert {job["task_id"] for job in listed.data["jobs"]} <= set(second)
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


def test_a_user_chooses_the_shard(bus: BusServer, conductors: Conductors, tmp_path: Path) -> None:
    """The Python client by an argument, the command line by its flag and by the environment."""
    context = tmp_path / "client.toml"
    context.write_text(f'servers = ["{bus.url}"]\nuser = "bob"\nnkey_file = "{bus.credentials("submitter", "bob")}"\n')

    def ctl(*words: str, **environ: str) -> Any:
        line = [sys.executable, "-m", "organism.cli.maestroctl", "--json", *words]
        done = subprocess.run(line, env={**os.environ, **environ}, capture_output=True, timeout=HANG, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    async def main() -> None:
        zero, one = conductors("a"), conductors("b", SHARD="1")
        await asyncio.gather(leads(zero, "0"), leads(one, "1"))
        workers = await crew(bus)
        async with AsyncMaestro(context=str(context), shard="1") as maestro:
            job = await maestro.submit(["true"])
            assert (await job.result(timeout=HANG)).state == "done"
        named = ("--context", str(context))
        other = (await asyncio.to_thread(ctl, *named, "--shard", "1", "submit", "--wait", "--", "true"))["result"]
        assert did(workers, "1") == {job.task_id, other["task_id"]} and not did(workers, "0")
        listed = [
            {entry["task_id"] for entry in (await asyncio.to_thread(ctl, *named, *words, "list", "--all"))["jobs"]}
            for words in ((), ("--shard", "1"))
        ]
        assert listed == [set(), {job.task_id, other["task_id"]}]
        by_environment = {
            "ORGANISM_BUS_URL": bus.url,
            "ORGANISM_USER": "bob",
            "ORGANISM_NKEY_FILE": str(bus.credentials("submitter", "bob")),
            "ORGANISM_SHARD": "1",
            "HOME": str(tmp_path),
        }
        shown = await asyncio.to_thread(lambda: ctl("top", "--once", **by_environment))
        assert [gpu["id"] for gpu in shown["gpus"]] == ["gpu2", "gpu3"]
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


def test_what_has_ended_leaves_the_stream_of_both(bus: BusServer, conductors: Conductors) -> None:
    """Also what an idle shard has left behind, and with no shard's fence or newest record."""

    async def main() -> None:
        zero, one = conductors("a"), conductors("b", SHARD="1")
        await asyncio.gather(leads(zero, "0"), leads(one, "1"))
        workers = await crew(bus)
        alice, bob = await ShardSubmitter.of(bus, "0"), await ShardSubmitter.of(bus, "1", "bob")
        # few jobs of shard 1, then nothing more: shard 0 must not wait for it with its own
        ids = await bob.many(5)
        await bob.results(*ids)
        one.stop()
        conductors("b", SHARD="1")
        more = await alice.many(janitor.PREFIX + 50)
        await alice.results(*more)

        async def tidy() -> bool:
            found = await kept(bus)
            return (found["enqueue.1"], found["epoch.1"]) == (0, 1) and found["enqueue.0"] + found["run"] < 100

        await eventually(tidy, every=0.5)
        # the shards go on: neither has lost its fence
        await alice.many(1, task_id="z")
        await bob.many(1, task_id="y")
        assert (await alice.result("z")).state == (await bob.result("y")).state == "done"
        assert await settled_books(bus, [*ids, *more, "y", "z"]) == {"done": len(ids) + len(more) + 2}
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


def test_survivors_take_a_dead_ones_shard_and_leave_the_other_alone(bus: BusServer, conductors: Conductors) -> None:
    """Each of two machines conducts a shard and stands by for the other's."""

    async def main() -> None:
        # a free shard is left to its own conductor for so long, which on a busy machine is needed to start
        times = {"LEASE_TTL_SEC": 12, "HEARTBEAT_TTL_SEC": 15}
        zero, one = conductors("a", SHARD="0,1", **times), conductors("b", SHARD="1,0", **times)
        await asyncio.gather(leads(zero, "0"), leads(one, "1"))
        taken = (zero.text().count("leading shard 1"), one.text().count("leading shard 0"))
        workers = await crew(bus)
        for worker in workers:
            worker.work = lasting(0.02)
        alice, bob = await ShardSubmitter.of(bus, "0"), await ShardSubmitter.of(bus, "1", "bob")
        first, second = await asyncio.gather(alice.many(60), bob.many(60))
        await until(lambda: len(did(workers, "1")) > 10)
        one.kill9()
        await leads(zero, "1")
        assert taken == (0, 0)
        await alice.results(*first)
        assert {result.attempts for result in (await bob.results(*second)).values()} == {1}
        assert zero.text().count("leading shard 0, epoch") == 1
        assert did(workers, "0") == set(first) and did(workers, "1") == set(second)
        assert await settled_books(bus, [*first, *second]) == {"done": 120}
        assert (await alice.top(), await bob.top()) == (["gpu0", "gpu1"], ["gpu2", "gpu3"])
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs a job", "with an outcome that nobody has heard"])
def test_a_worker_that_moves_gives_its_jobs_back(bus: BusServer, conductors: Conductors, *, ended: bool) -> None:
    """At once: the first heartbeat for another shard says that whatever it ran before has ended."""

    async def main() -> None:
        zero = conductors("a", HEARTBEAT_TTL_SEC=600)
        one = conductors("b", SHARD="1")
        await asyncio.gather(leads(zero, "0"), leads(one, "1"))
        mover = await ShardWorker(bus, "gpu0", "0", forever).start()
        alice, bob = await ShardSubmitter.of(bus, "0"), await ShardSubmitter.of(bus, "1", "bob")
        (job,) = await alice.many(1)
        await until(lambda: mover.running)
        (ref,) = mover.running
        await mover.crash()
        if ended:
            mover.outcomes[ref] = Report(
                ts=now(), task_id=job, attempt=1, gpu_id="gpu0", incarnation=mover.incarnation, type="cmd", returncode=0
            )
        mover.shard = "1"
        mover.work = lasting(0.0)
        await mover.start()

        async def moved() -> bool:
            return (await bob.top(), await alice.top()) == (["gpu0"], [])

        await eventually(moved)
        other = await ShardWorker(bus, "gpu1", "0").start()
        result = await alice.result(job)
        # whether an outcome on its disk is still taken is a race between its report and its heartbeat
        assert (result.state, result.attempts) == ("done", 2) or (ended and result.attempts == 1)
        assert "GPU gpu0 has moved to shard 1" in zero.text()
        (more,) = await bob.many(1)
        assert (await bob.result(more)).data["gpu_id"] == "gpu0"
        await until(lambda: not mover.outcomes)
        assert await settled_books(bus, [job, more]) == {"done": 2}
        await other.stop()
        await mover.stop()

    asyncio.run(main())
