# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conductor that gets no processor, or no server, keeps its term as long as nobody else has taken the lease."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from organism.bus import messages
from organism.bus.jetstream import JetStream, Outgoing
from organism.bus.keyvalue import KeyValue
from organism.bus.lease import Lease
from organism.bus.messages import JobSpec, Report, RunOrder
from organism.core import _bus
from service.maestro.books import settled_books
from service.maestro.stage import ConductorProcess, FakeWorker, Submitter, until
from service.support import HANG, BusServer

Conductors = Callable[..., ConductorProcess]
ON, OFF = 0.02, 0.48
"""Seconds that a starved conductor runs, and does not: a twenty-fifth of a processor."""


@asynccontextmanager
async def starved(conductor: ConductorProcess) -> AsyncIterator[None]:
    async def starve() -> None:
        while True:
            conductor.signal(signal.SIGSTOP)
            await asyncio.sleep(OFF)  # so little of a processor is the purpose
            conductor.signal(signal.SIGCONT)
            await asyncio.sleep(ON)

    starving = asyncio.create_task(starve())
    try:
        yield
    finally:
        starving.cancel()
        await asyncio.wait([starving])
        conductor.signal(signal.SIGCONT)


class Slow:
    """Work that ends when it is told to."""

    def __init__(self) -> None:
        self.began, self.end = asyncio.Event(), asyncio.Event()

    async def __call__(self, worker: FakeWorker, order: RunOrder) -> Report:
        self.began.set()
        await self.end.wait()
        return worker.report(order, returncode=0)


async def epochs(bus: BusServer) -> int:
    """The lease's present epoch: how often it was taken."""
    nc = await bus.connected("admin", "setup")
    entry = await KeyValue(JetStream(nc), _bus.BUCKET_CONTROL).get("shard.0")
    await nc.close()
    assert entry is not None
    return int(json.loads(entry.value)["epoch"])


def test_a_conductor_that_was_frozen_keeps_its_term_and_gives_nobody_up(bus: BusServer, conductors: Conductors) -> None:
    """Longer than its lease and than the silence after which a worker counts as dead: it was not the worker's."""

    async def main() -> None:
        conductor = conductors()
        await conductor.leading()
        work = Slow()
        worker = await FakeWorker(bus, "gpu0", work).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await work.began.wait()
        conductor.signal(signal.SIGSTOP)
        await asyncio.sleep(5)  # LEASE_TTL_SEC is 2, HEARTBEAT_TTL_SEC 3
        conductor.signal(signal.SIGCONT)
        await until(lambda: "nobody has taken it: epoch 1 goes on" in conductor.text())
        work.end.set()
        result = await alice.result(task_id)
        assert (result.state, result.attempts) == ("done", 1)
        assert await epochs(bus) == 1
        assert conductor.text().count("leading shard") == 1
        assert "no heartbeat" not in conductor.text()
        assert await settled_books(bus, [task_id]) == {"done": 1}
        await worker.stop()

    asyncio.run(main())


def test_a_term_outlasts_an_absence_of_the_server(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductor = conductors()
        await conductor.leading()
        work = Slow()
        worker = await FakeWorker(bus, "gpu0", work).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await work.began.wait()
        bus.kill9()
        await until(lambda: "decides nothing until it is known who holds it" in conductor.text())
        await asyncio.sleep(3)  # HEARTBEAT_TTL_SEC
        bus.start()
        await until(lambda: "epoch 1 goes on" in conductor.text())
        work.end.set()
        result = await alice.result(task_id)
        assert (result.state, result.attempts) == ("done", 1)
        assert await epochs(bus) == 1
        assert "no heartbeat" not in conductor.text()
        await worker.stop()

    asyncio.run(main())


def test_a_conductor_that_starves_while_it_takes_over_takes_over_once(bus: BusServer, conductors: Conductors) -> None:
    """It gets a twenty-fifth of a processor while it reads thousands of jobs, many times the lease's duration."""

    async def main() -> None:
        alice = await Submitter.connect(bus)
        noop = messages.encode(JobSpec(type="noop"))
        for _ in range(4):
            await alice.js.publish_batch([Outgoing(_bus.enqueue_subject("alice"), noop)] * 1000)
        conductor = conductors(LEASE_TTL_SEC=1)
        await until(lambda: "taken by" in conductor.text())
        async with starved(conductor):
            async with asyncio.timeout(4 * HANG):
                while "leading shard" not in conductor.text():  # noqa: ASYNC110 - a log tells nobody
                    await asyncio.sleep(0.1)
            assert "4000 unfinished jobs" in conductor.text()
        assert await epochs(bus) == 1, conductor.text()
        await alice.nc.close()

    asyncio.run(main())


def test_a_lease_that_another_took_ends_the_term(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors("a")
        await first.leading()
        second = conductors("b")
        work = Slow()
        worker = await FakeWorker(bus, "gpu0", work).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await work.began.wait()
        first.signal(signal.SIGSTOP)
        before = len(first.text())
        await second.leading()
        first.signal(signal.SIGCONT)
        await until(lambda: "the term is over" in first.text())
        assert "goes on" not in first.text()[before:]
        assert "taken by another" in first.text() or "wrong last sequence" in first.text()
        work.end.set()
        assert (await alice.result(task_id)).attempts == 1
        assert await epochs(bus) == 2
        assert await settled_books(bus, [task_id]) == {"done": 1}
        await worker.stop()

    asyncio.run(main())


def test_a_lapsed_lease_is_renewed_or_lost_by_what_the_bucket_says(bus: BusServer) -> None:
    async def main() -> None:
        nc, other_nc = await bus.connected("conductor", "a"), await bus.connected("conductor", "b")
        bucket = KeyValue(JetStream(nc), _bus.BUCKET_CONTROL)
        mine = Lease(bucket, "shard.0", "a", ttl=1, renew=0.3, margin=0.1)
        assert await mine.acquire() == 1
        bus.kill9()
        await until(lambda: not mine.valid())
        assert not mine.lost.is_set()
        bus.start()
        async with asyncio.timeout(HANG):
            assert await mine.confirmed()
        assert mine.epoch == 1
        bus.signal(signal.SIGSTOP)
        await until(lambda: not mine.valid())
        bus.signal(signal.SIGCONT)
        async with asyncio.timeout(HANG):
            assert await mine.confirmed()
        entry = await bucket.get("shard.0")
        assert entry is not None
        theirs = KeyValue(JetStream(other_nc), _bus.BUCKET_CONTROL)
        await theirs.put("shard.0", json.dumps({"owner": "b", "epoch": 2, "token": "x"}).encode())
        async with asyncio.timeout(HANG):
            await mine.lost.wait()
        assert not await mine.confirmed()
        await mine.release()
        entry = await bucket.get("shard.0")
        assert entry is not None and json.loads(entry.value)["owner"] == "b", "what is another's is not given back"
        await nc.close()
        await other_nc.close()

    asyncio.run(main())
