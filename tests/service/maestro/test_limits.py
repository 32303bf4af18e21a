# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Full streams, shards beside each other, and logs that are asked for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

from organism.bus.errors import StreamFull
from organism.bus.jetstream import JetStream
from organism.bus.messages import Report, RunOrder
from organism.core import _bus
from service.maestro.books import Books, settled_books
from service.maestro.shards import ShardWorker
from service.maestro.stage import (
    ConductorProcess,
    FakeWorker,
    Submitter,
    eventually,
    forever,
    succeed,
    until,
)
from service.support import SMALL, BusServer

Conductors = Callable[..., ConductorProcess]


async def talkative(worker: FakeWorker, order: RunOrder) -> Report:
    return worker.report(order, returncode=0, stdout="x" * 8000)


def with_room(bus_servers: Callable[..., BusServer], **limits: int) -> BusServer:
    bus = bus_servers()
    bus.start()
    asyncio.run(bus.apply_topology(limits=dataclasses.replace(SMALL, **limits)))
    return bus


def test_outcomes_wait_while_the_results_are_full(bus_servers: Callable[..., BusServer], tmp_path: Path) -> None:
    bus = with_room(bus_servers, results_bytes=60_000)
    conductor = ConductorProcess(bus, tmp_path / "maestro").start()

    async def main() -> None:
        worker = await FakeWorker(bus, "gpu0", talkative).start()
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(12)]
        await until(lambda: any(verdict == "retry" for _, verdict in worker.verdicts))
        assert "stream_full" in conductor.text()
        books = await Books.read(bus)
        assert 0 < len(books.results) < 12
        await bus.apply_topology(limits=SMALL)
        results = await alice.results(*ids)
        assert {result.attempts for result in results.values()} == {1}
        assert await settled_books(bus, ids) == {"done": 12}
        await worker.stop()

    try:
        asyncio.run(main())
    finally:
        conductor.stop()


def test_a_queue_full_of_large_submissions_gets_moving_again(
    bus_servers: Callable[..., BusServer], tmp_path: Path
) -> None:
    bus = with_room(bus_servers, queue_bytes=1_000_000)
    conductor = ConductorProcess(bus, tmp_path / "maestro").start()

    async def main() -> None:
        await conductor.leading()
        alice = await Submitter.connect(bus)
        ids: list[str] = []
        refused = 0
        for number in range(30):
            try:
                await alice.js.publish(
                    _bus.enqueue_subject("alice"),
                    b'{"task_id": "big-%d", "cmd": ["%s"]}' % (number, b"x" * 60_000),
                    msg_id=f"alice:big-{number}",
                )
                ids.append(f"big-{number}")
            except StreamFull:
                refused += 1
        worker = await FakeWorker(bus, "gpu0").start()
        results = await alice.results(*ids)
        states = [result.state for result in results.values()]
        assert states.count("done") >= 10
        assert set(states) <= {"done", "dead"}
        assert refused + states.count("dead") > 0
        assert await settled_books(bus, ids)
        assert (await alice.result(await alice.submit("after", cmd=["x" * 60_000]))).state == "done"
        await worker.stop()

    try:
        asyncio.run(main())
    finally:
        conductor.stop()


def test_a_shard_leaves_the_messages_of_another_alone(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        nc = await bus.connected("submitter", "bob")
        kept = await JetStream(nc).publish(_bus.enqueue_subject("bob", "0"), b'{"task_id": "kept", "cmd": ["true"]}')
        one = conductors("a", SHARD="one")
        await until(lambda: "leading shard one, epoch" in one.text())
        worker = ShardWorker(bus, "gpu0", "one")
        await worker.start()
        alice = await Submitter.connect(bus)
        ids = [f"job-{number}" for number in range(300)]
        for task_id in ids:
            payload = b'{"task_id": "%s", "cmd": ["true"]}' % task_id.encode()
            await alice.js.publish(_bus.enqueue_subject("alice", "one"), payload)
        await until(lambda: len(worker.started) == 300)
        books = await Books.read(bus)
        assert kept.seq in [stored.seq for stored in books.queue]
        one.stop()
        await worker.crash()
        worker.shard = "0"
        await worker.start()
        conductors("b")
        result = await alice_or(bus, "bob")
        assert result == "done"
        await worker.stop()

    async def alice_or(bus: BusServer, user: str) -> str:
        return (await (await Submitter.connect(bus, user)).result("kept")).state

    asyncio.run(main())


def test_logs_of_a_running_and_of_a_finished_job(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        await alice.submit("running")
        await until(lambda: worker.running)
        live = await alice.call("logs", task_id="running", offset=7)
        assert (live.data["text"], live.data["next_offset"]) == ("log of running", 12)
        await alice.call("cancel", task_id="running")
        worker.work = succeed
        await alice.result(await alice.submit("done"))
        first = await alice.call("logs", task_id="done")
        assert (first.data["text"], first.data["eof"], first.data["state"]) == ("ran done\n", True, "done")
        rest = await alice.call("logs", task_id="done", offset=4)
        assert rest.data["text"] == "done\n"
        waiting = await alice.submit("waiting", gpu="gpu1")
        await eventually(lambda: alice.state(waiting))
        reply = await alice.call("logs", task_id=waiting)
        assert (reply.ok, reply.data.get("text", ""), reply.data["state"]) == (True, "", "waiting_gpu")
        await worker.stop()

    asyncio.run(main())
