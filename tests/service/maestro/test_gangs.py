# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on several GPUs and on chosen ones, on a real bus with real conductors, through deaths and takeovers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from organism.bus.messages import Report, RunOrder
from service.maestro.stage import ConductorProcess, FakeWorker, Submitter, eventually, until
from service.support import BusServer

Conductors = Callable[..., ConductorProcess]


class Gate:
    """Jobs wait until it is opened; ``orders`` are those that came."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.orders: list[RunOrder] = []

    async def __call__(self, worker: FakeWorker, order: RunOrder) -> Report:
        self.orders.append(order)
        if order.spec.labels.get("waits"):
            await self.open.wait()
        return worker.report(order, returncode=0)

    def ran(self) -> list[tuple[str, str]]:
        return [(order.task_id, order.gpu) for order in self.orders]


async def pair(bus: BusServer, gate: Gate) -> tuple[FakeWorker, FakeWorker]:
    return await FakeWorker(bus, "gpu0", gate).start(), await FakeWorker(bus, "gpu1", gate).start()


LARGE = {"gpus": 2, "labels": {"waits": "yes"}, "gpu": "gpu0"}


def test_a_job_has_both_gpus_or_none(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        gate = Gate()
        zero, one = await pair(bus, gate)
        alice = await Submitter.connect(bus)
        await alice.submit("first", labels={"waits": "yes"}, gpu="gpu1")
        await alice.in_state("first", "running")
        await alice.submit("large", **LARGE)
        await alice.submit("small")
        waiting = await eventually(lambda: _reason(alice, "large", "2 GPUs of one host at the same time"))
        assert "1 are free on rig" in waiting
        assert gate.ran() == [("first", "gpu1")]  # gpu0 is free, and kept
        gate.open.set()
        result = await alice.result("large")
        assert (result.state, result.data["gpu_ids"]) == ("done", ["gpu0", "gpu1"])
        assert (await alice.result("small")).state == "done"
        assert gate.ran()[:2] == [("first", "gpu1"), ("large", "gpu0")]
        assert gate.orders[1].also == ["gpu1"]
        for worker in (zero, one):
            await worker.stop()

    asyncio.run(main())


async def _reason(user: Submitter, task_id: str, words: str) -> str:
    info = await user.state(task_id)
    return info.reason if info is not None and words in info.reason else ""


def test_a_dead_workers_further_gpus_are_kept_until_it_is_back(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        gate = Gate()
        zero, one = await pair(bus, gate)
        alice = await Submitter.connect(bus)
        await alice.submit("large", **LARGE)
        await alice.in_state("large", "running")
        await alice.submit("small")
        await zero.crash()
        await alice.in_state("large", "retry", "waiting_gpu")
        info = await alice.in_state("small", "waiting_gpu", "enqueued")
        assert gate.ran() == [("large", "gpu0")], info
        await zero.start()
        await until(lambda: len(gate.orders) == 2)
        gate.open.set()
        result = await alice.result("large")
        assert (result.state, result.attempts) == ("done", 2)
        assert (await alice.result("small")).state == "done"
        assert [task for task, _ in gate.ran()] == ["large", "large", "small"]
        for worker in (zero, one):
            await worker.stop()

    asyncio.run(main())


def test_a_successor_gives_none_of_them_away(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors("a")
        gate = Gate()
        zero, one = await pair(bus, gate)
        alice = await Submitter.connect(bus)
        await alice.submit("large", **LARGE)
        await alice.in_state("large", "running")
        first.kill9()
        second = conductors("b")
        await second.leading()
        await alice.submit("small")
        info = await eventually(lambda: _reason(alice, "small", "busy"))
        assert "all suitable GPUs are busy" in info
        assert gate.ran() == [("large", "gpu0")]
        job = await alice.state("large")
        assert job is not None and (job.gpu, job.also) == ("gpu0", ["gpu1"])
        gate.open.set()
        assert (await alice.result("large")).attempts == 1
        assert (await alice.result("small")).state == "done"
        for worker in (zero, one):
            await worker.stop()

    asyncio.run(main())


def test_a_cancelled_one_gives_both_back(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        gate = Gate()
        zero, one = await pair(bus, gate)
        alice = await Submitter.connect(bus)
        await alice.submit("large", **LARGE)
        await alice.in_state("large", "running")
        assert (await alice.call("cancel", task_id="large")).ok
        await alice.submit("next", gpus=2)
        assert (await alice.result("next")).state == "done"
        for worker in (zero, one):
            await worker.stop()

    asyncio.run(main())


def test_models_are_obeyed_and_inputs_attract(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        gate = Gate()
        zero = await FakeWorker(bus, "gpu0", gate, model="AMD Radeon RX 580").start()
        one = await FakeWorker(bus, "gpu1", gate, model="NVIDIA GeForce RTX 3060").start()
        alice = await Submitter.connect(bus)
        for number in range(4):
            await alice.submit(f"m{number}", gpu_model="rtx 3060" if number % 2 else "radeon")
        await alice.results(*(f"m{number}" for number in range(4)))
        assert dict(gate.ran()) == {"m0": "gpu0", "m1": "gpu1", "m2": "gpu0", "m3": "gpu1"}
        for path, worker in (("data/a", zero), ("data/b", one)):
            await worker.measure(temp_c=50, warm=["data", path])
        for number in range(6):
            path = "data/b" if number % 2 else "data/a"
            await eventually(lambda path=path: _knows(alice, path))
            await alice.submit(f"i{number}", inputs=[path])
            await alice.result(f"i{number}")
        found = dict(gate.ran())
        assert [found[f"i{number}"] for number in range(6)] == ["gpu0", "gpu1"] * 3
        for worker in (zero, one):
            await worker.stop()

    asyncio.run(main())


async def _knows(user: Submitter, path: str) -> bool:
    """Whether the conductor has heard that some cache has this."""
    task_id = await user.submit(inputs=[path], delay=600)
    await user.in_state(task_id, "enqueued")
    reply = await user.call("explain", task_id=task_id)
    await user.call("cancel", task_id=task_id)
    return any("1 of 1 inputs" in gpu.get("why", "") for gpu in reply.data["gpus"])


def test_a_worker_of_an_earlier_version_is_asked_nothing_new(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        gate = Gate()
        old = FakeWorker(bus, "gpu0", gate)
        old.spec = 0
        await old.start()
        alice = await Submitter.connect(bus)
        await alice.submit("new", gpu_model="sim", priority=9)
        await alice.submit("plain")
        assert (await alice.result("plain")).state == "done"
        assert await eventually(lambda: _reason(alice, "new", "upgrade the workers"))
        assert gate.ran() == [("plain", "gpu0")]
        await old.stop()

    asyncio.run(main())
