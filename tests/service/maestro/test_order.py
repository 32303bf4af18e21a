# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs that wait for others, must be alone of their kind, or must end in time: on a real bus, over a takeover too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from organism.bus.messages import Report, RunOrder
from service.maestro.books import settled_books
from service.maestro.stage import (
    ConductorProcess,
    FakeWorker,
    Submitter,
    eventually,
    fail,
    forever,
    succeed,
    until,
)
from service.support import BusServer

Conductors = Callable[..., ConductorProcess]


def after(task_id: str, on: str = "ok") -> list[dict[str, str]]:
    return [{"task_id": task_id, "on": on}]


async def info(user: Submitter, task_id: str) -> dict[str, Any]:
    reply = await user.call("status", task_id=task_id)
    job: dict[str, Any] = reply.data["job"]
    return job


def test_a_chain_runs_in_its_order_on_any_number_of_gpus(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        ran: list[str] = []

        async def note(worker: FakeWorker, order: RunOrder) -> Report:
            ran.append(order.task_id)
            return await succeed(worker, order)

        workers = [await FakeWorker(bus, f"gpu{number}", note).start() for number in range(2)]
        alice = await Submitter.connect(bus)
        await alice.submit(task_id="c0", delay=0.5)
        for number in range(1, 6):
            await alice.submit(task_id=f"c{number}", after=after(f"c{number - 1}"), priority=number)
        assert (await alice.result("c5")).state == "done"
        assert ran == [f"c{number}" for number in range(6)]
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


def test_the_end_of_one_decides_about_those_that_wait_for_it(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        alice = await Submitter.connect(bus)
        await alice.submit(task_id="first", max_retries=0)
        await alice.submit(task_id="ok", after=after("first"))
        await alice.submit(task_id="then", after=after("ok"))
        await alice.submit(task_id="bad", after=after("first", "failed"), max_retries=0)
        await alice.submit(task_id="any", after=after("first", "any"), max_retries=0)
        await eventually(lambda: _reason(alice, "ok", "waits for the end of first"))
        worker = await FakeWorker(bus, "gpu0", fail).start()
        results = {name: await alice.result(name) for name in ("first", "ok", "then", "bad", "any")}
        assert {name: (one.state, one.error) for name, one in results.items()} == {
            "first": ("failed", "exit"),
            "ok": ("cancelled", "dependency"),
            "then": ("cancelled", "dependency"),
            "bad": ("failed", "exit"),
            "any": ("failed", "exit"),
        }
        assert "first" in results["ok"].reason
        assert await settled_books(bus, list(results)) == {"failed": 3, "cancelled": 2}
        # one that ended long ago, one that never was, and one of somebody else
        late = await alice.result(await alice.submit(after=after("first", "any"), max_retries=0))
        assert late.state == "failed"
        never = await alice.result(await alice.submit(after=after("nobody")))
        assert (never.state, never.error) == ("cancelled", "dependency")
        bob = await Submitter.connect(bus, "bob")
        foreign = await bob.result(await bob.submit(after=after("first", "any")))
        assert "no such job" in foreign.reason
        await worker.stop()

    asyncio.run(main())


async def _reason(user: Submitter, task_id: str, text: str) -> bool:
    reply = await user.call("status", task_id=task_id)
    return text in str(reply.data.get("job", {}).get("reason"))


def test_a_successor_knows_who_waits_and_who_needs_wait_no_more(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors()
        alice = await Submitter.connect(bus)
        worker = await FakeWorker(bus, "gpu0").start()
        await alice.result(await alice.submit(task_id="ended"))
        await worker.stop()
        await alice.submit(task_id="open", delay=1.0)
        await alice.submit(task_id="held", after=[*after("open"), *after("ended")])
        await alice.submit(task_id="one", unique="k", delay=600)
        await eventually(lambda: _reason(alice, "held", "waits for the end of open"))
        first.kill9()
        # in the stream, and seen by no conductor: the second one must still lose against the first
        await alice.submit(task_id="two", unique="k")
        await alice.submit(task_id="free", after=after("ended"))
        conductors(name="b")
        worker = await FakeWorker(bus, "gpu0").start()
        assert (await alice.result("free")).state == "done"
        assert (await alice.result("held")).state == "done"
        two = await alice.result("two")
        assert (two.state, two.error) == ("cancelled", "unique")
        assert "one" in two.reason
        assert (await info(alice, "one"))["state"] == "enqueued"
        await worker.stop()

    asyncio.run(main())


def test_the_key_is_free_again_when_its_job_has_ended(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        for _ in range(3):
            assert (await alice.result(await alice.submit(unique="nightly"))).state == "done"
        await alice.submit(task_id="waits", unique="nightly", delay=600)
        loser = await alice.result(await alice.submit(unique="nightly"))
        assert (loser.state, loser.error) == ("cancelled", "unique")
        bob = await Submitter.connect(bus, "bob")
        assert (await bob.result(await bob.submit(unique="nightly"))).state == "done"
        await worker.stop()

    asyncio.run(main())


def test_a_deadline_ends_a_waiting_and_a_running_job(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        alice = await Submitter.connect(bus)
        waiting = await alice.result(await alice.submit(deadline=0.3))
        assert (waiting.state, waiting.error, waiting.attempts) == ("failed", "deadline", 0)
        worker = await FakeWorker(bus, "gpu0", forever).start()
        running = await alice.result(await alice.submit(deadline=2.0))
        assert (running.state, running.error, running.attempts) == ("failed", "deadline", 1)
        assert "2 s" in running.reason
        held = await alice.result(
            await alice.submit(task_id="h", after=after(await alice.submit(delay=600)), deadline=0.3)
        )
        assert (held.state, held.error) == ("failed", "deadline")
        worker.work = succeed
        await until(lambda: not worker.running)
        assert (await alice.result(await alice.submit(deadline=60))).state == "done"
        await worker.stop()

    asyncio.run(main())


def test_cancelling_one_that_waits_for_others_is_final(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        alice = await Submitter.connect(bus)
        await alice.submit(task_id="a", delay=600)
        await alice.submit(task_id="b", after=after("a"))
        await alice.submit(task_id="c", after=after("b", "any"))
        await eventually(lambda: _reason(alice, "c", "waits"))
        assert (await alice.call("cancel", task_id="b")).ok
        worker = await FakeWorker(bus, "gpu0").start()
        assert (await alice.result("c")).state == "done"
        assert (await alice.call("cancel", task_id="a")).ok
        assert await settled_books(bus, ["a", "b", "c"]) == {"cancelled": 2, "done": 1}
        await worker.stop()

    asyncio.run(main())
