# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing is lost and nothing ends twice, whatever is killed or frozen."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable

import pytest

from organism.bus.errors import WrongLastSequence
from organism.bus.jetstream import JetStream
from organism.bus.messages import Report, RunOrder, TaskRef
from organism.core import _bus
from organism.maestro import takeover
from organism.maestro.ledger import Ledger
from service.maestro.books import Books, settled_books
from service.maestro.stage import (
    ConductorProcess,
    FakeWorker,
    Submitter,
    eventually,
    forever,
    lasting,
    succeed,
    until,
)
from service.support import BusServer

Conductors = Callable[..., ConductorProcess]


async def two_workers(bus: BusServer, seconds: float = 0.005) -> list[FakeWorker]:
    return [await FakeWorker(bus, gpu, lasting(seconds)).start() for gpu in ("gpu0", "gpu1")]


async def end(workers: list[FakeWorker]) -> None:
    for worker in workers:
        await worker.stop()


def test_two_hundred_jobs_while_the_server_is_killed(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        await conductors().leading()
        workers = await two_workers(bus)
        alice = await Submitter.connect(bus)
        ids: list[str] = []

        async def submit() -> None:
            for number in range(200):
                task_id = await alice.submit(f"job-{number}")
                ids.append(task_id)

        submitting = asyncio.create_task(submit())
        for share in (40, 100):
            await until(lambda share=share: sum(len(worker.started) for worker in workers) >= share)
            bus.kill9()
            bus.start()
        await submitting
        results = await alice.results(*ids)
        assert len(results) == 200
        assert await settled_books(bus, ids) == {"done": 200}
        await end(workers)

    asyncio.run(main())


def test_a_standby_takes_over_from_a_killed_leader(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors("a")
        await first.leading()
        second = conductors("b")
        workers = await two_workers(bus, 0.01)
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(200)]
        await until(lambda: sum(len(worker.started) for worker in workers) > 50)
        assert second.text().count("leading shard") == 0
        first.kill9()
        await alice.results(*ids)
        assert await settled_books(bus, ids) == {"done": 200}
        assert second.text().count("leading shard 0, epoch") == 1
        await end(workers)

    asyncio.run(main())


def test_a_leader_that_was_frozen_can_write_no_more(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors("a")
        await first.leading()
        second = conductors("b")
        workers = await two_workers(bus, 0.02)
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(200)]
        await until(lambda: sum(len(worker.started) for worker in workers) > 20)
        first.signal(signal.SIGSTOP)
        await second.leading()
        first.signal(signal.SIGCONT)  # it wakes with decisions half made and answers in its buffers
        await until(lambda: "the term is over" in first.text())
        await alice.results(*ids)
        assert await settled_books(bus, ids) == {"done": 200}
        attempts = Counter(ref for worker in workers for ref in worker.started)
        assert set(attempts.values()) == {1}
        await end(workers)

    asyncio.run(main())


def test_a_stale_fence_is_refused_by_the_server(bus: BusServer, conductors: Conductors) -> None:
    """Not by luck of timing: a write with the former epoch's fence, after the takeover."""

    async def main() -> None:
        conductors("a")
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await eventually(lambda: alice.state(task_id))
        nc = await bus.connected("conductor", "b")
        js = JetStream(nc)
        fences = [
            (_bus.STREAM_WQ, _bus.epoch_subject(), _bus.run_subject("gpu0")),
            (_bus.STREAM_RESULTS, _bus.result_epoch_subject("*"), _bus.result_subject(task_id)),
        ]
        for stream, fence, subject in fences:
            last = await js.last(stream, fence)
            assert last is not None
            for wrong in (last.seq - 1, last.seq + 7):
                with pytest.raises(WrongLastSequence):
                    await js.publish(subject, b"{}", expect=(wrong, fence))
        await nc.close()

    asyncio.run(main())


def test_what_comes_in_behind_the_fence_is_left_to_the_new_conductors_ears(bus: BusServer) -> None:
    """Read twice it was taken for a repetition of itself, written down as final, and lost by the next takeover."""

    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        alice = await Submitter.connect(bus)
        await alice.submit("before")
        fences = await takeover.fence(js, "0", 1, "a")
        await alice.submit("behind")
        left = await takeover.replay(js, "0", fences, Ledger(), nc.max_payload)
        assert list(left.ledger.by_id) == ["before"]
        await nc.close()

    asyncio.run(main())


def test_jobs_run_on_while_the_conductor_restarts(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def held(worker: FakeWorker, order: RunOrder) -> Report:
            await release.wait()
            return worker.report(order, returncode=0)

        first = conductors("a")
        workers = [await FakeWorker(bus, gpu, held).start() for gpu in ("gpu0", "gpu1")]
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(6)]
        await until(lambda: all(worker.running for worker in workers))
        await alice.in_state("job-0", "running")
        assert first.stop() == 0
        release.set()  # two jobs end while nobody leads
        second = conductors("b")
        results = await alice.results(*ids)
        assert {result.attempts for result in results.values()} == {1}
        assert await settled_books(bus, ids) == {"done": 6}
        assert "2 of them given to a GPU" in second.text()
        assert sum(len(worker.started) for worker in workers) == 6
        await end(workers)

    asyncio.run(main())


def test_a_worker_that_dies_loses_its_job_to_another(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        first = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit(max_retries=0)
        await until(lambda: first.running)
        await first.crash()
        second = await FakeWorker(bus, "gpu1").start()
        result = await alice.result(task_id)
        assert (result.state, result.attempts, result.data["gpu_id"]) == ("done", 2, "gpu1")
        assert [event.err for event in result.history if event.state == "retry"] == ["lost"]
        assert await settled_books(bus, [task_id]) == {"done": 1}
        await second.stop()

    asyncio.run(main())


def test_a_restarted_worker_gives_its_job_back_at_once_and_keeps_its_outcomes(
    bus: BusServer, conductors: Conductors
) -> None:
    async def main() -> None:
        conductors(HEARTBEAT_TTL_SEC=600)  # nothing here waits for silence
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        running = await alice.submit("running")
        await until(lambda: worker.running)
        await worker.crash()
        worker.work = succeed
        await worker.start()
        result = await alice.result(running)
        assert (result.state, result.attempts) == ("done", 2)

        # an outcome on its disk is reported by the next start, and nothing runs again
        told = asyncio.Event()

        async def ends_as_the_worker_does(worker: FakeWorker, order: RunOrder) -> Report:
            report = worker.report(order, returncode=0)
            worker.outcomes[TaskRef(order.task_id, order.attempt)] = report
            told.set()
            return await forever(worker, order)

        worker.work = ends_as_the_worker_does
        finished = await alice.submit("finished")
        await told.wait()
        await worker.crash()
        worker.work = succeed
        await worker.start()
        result = await alice.result(finished)
        assert (result.state, result.attempts) == ("done", 1)
        assert await settled_books(bus, [running, finished]) == {"done": 2}
        await worker.stop()

    asyncio.run(main())


def test_a_frozen_worker_is_told_to_start_anew_and_its_report_is_not_wanted(
    bus: BusServer, conductors: Conductors
) -> None:
    async def main() -> None:
        conductors()
        slow = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await until(lambda: slow.running)
        ref = next(iter(slow.running))
        before = slow.incarnation
        slow.beat = 5.0  # longer than HEARTBEAT_TTL_SEC: as if it were frozen
        other = await FakeWorker(bus, "gpu1").start()
        result = await alice.result(task_id)
        assert result.data["gpu_id"] == "gpu1"
        await until(lambda: slow.incarnation != before)
        assert not slow.running
        slow.beat = 0.2
        slow.outcomes[ref] = Report(
            ts=result.ts,
            task_id=task_id,
            attempt=ref.attempt,
            gpu_id="gpu0",
            incarnation=before,
            type="cmd",
            returncode=0,
        )
        slow._outcome.set()
        await until(lambda: (ref, "stale") in slow.verdicts)
        books = await Books.read(bus)
        assert len(books.results[task_id]) == 1
        await end([slow, other])

    asyncio.run(main())


def test_an_outcome_of_another_start_of_the_worker_is_not_taken(bus: BusServer, conductors: Conductors) -> None:
    """Such as of an order that was delivered, lost with the server's power before it was on disk, and given anew."""

    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        await until(lambda: worker.running)
        ref = next(iter(worker.running))

        def outcome(incarnation: str) -> Report:
            return Report(
                ts="2026-11-22T10:00:00.000Z",
                task_id=task_id,
                attempt=ref.attempt,
                gpu_id="gpu0",
                incarnation=incarnation,
                type="cmd",
                returncode=0,
                stdout=f"of {incarnation}",
            )

        worker.outcomes[ref] = outcome("another")
        worker._outcome.set()
        await until(lambda: (ref, "stale") in worker.verdicts)
        worker.outcomes[ref] = outcome(worker.incarnation)
        worker._outcome.set()
        result = await alice.result(task_id)
        assert (result.data["stdout"], result.attempts) == (f"of {worker.incarnation}", ref.attempt)
        await end([worker])

    asyncio.run(main())


def test_an_order_that_its_worker_never_mentions_is_given_again(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        worker.listing = False
        task_id = await alice.submit()
        await until(lambda: len(worker.started) == 1)
        before = worker.incarnation
        await until(lambda: worker.incarnation != before)  # it was told to reset, and dropped what it ran
        worker.listing, worker.work = True, succeed
        result = await alice.result(task_id)
        assert (result.state, result.attempts) == ("done", 2)
        await worker.stop()

    asyncio.run(main())


def test_an_order_that_got_lost_on_its_way_is_handed_over_again(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        assert (await alice.result(await alice.submit())).state == "done"
        before, worker.deaf = worker.incarnation, 1
        result = await alice.result(await alice.submit())
        assert (result.state, result.attempts, worker.deaf) == ("done", 1, 0)
        assert worker.incarnation == before
        await worker.stop()

    asyncio.run(main())


def test_an_order_that_its_conductor_did_not_live_to_hand_over_comes_from_the_next(
    bus: BusServer, conductors: Conductors
) -> None:
    async def main() -> None:
        first = conductors("a")
        await first.leading()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        assert (await alice.result(await alice.submit())).state == "done"
        worker.deaf = 10**6
        task_id = await alice.submit()
        await until(lambda: worker.deaf < 10**6)  # it is stored, and was said; nobody heard it
        first.kill9()
        worker.deaf = 0
        conductors("b")
        result = await alice.result(task_id)
        assert (result.state, result.attempts) == ("done", 1)
        await worker.stop()

    asyncio.run(main())


def test_the_consumer_of_an_earlier_version_goes_when_nobody_reads_by_it(
    bus: BusServer, conductors: Conductors
) -> None:
    async def main() -> None:
        over = JetStream(await bus.connected("admin", "setup"))
        for gpu in ("gpu0", "gpu1"):
            name, subject = _bus.earlier_consumer(gpu), _bus.run_subject(gpu)
            durable = {"name": name, "durable_name": name, "filter_subject": subject, "ack_policy": "explicit"}
            body = {"stream_name": _bus.STREAM_WQ, "config": durable, "action": "create"}
            await over.api(f"CONSUMER.CREATE.{_bus.STREAM_WQ}.{name}.{subject}", body)
        conductors()
        worker = await FakeWorker(bus, "gpu0").start()

        async def gone() -> bool:
            listed = await over.api(f"CONSUMER.LIST.{_bus.STREAM_WQ}")
            names = {consumer["name"] for consumer in listed["consumers"]}
            assert _bus.earlier_consumer("gpu1") in names, "gpu1's worker may still be one of the earlier version"
            return _bus.earlier_consumer("gpu0") not in names

        await eventually(gone)
        await worker.stop()
        await over.nc.close()

    asyncio.run(main())


def test_a_job_lost_too_often_is_dead(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors(MAX_LOST=2)
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        for attempt in (1, 2, 3):
            await until(lambda attempt=attempt: any(ref.attempt == attempt for ref in worker.running))
            await worker.crash()
            await worker.start()
        result = await alice.result(task_id)
        assert (result.state, result.error, result.attempts) == ("dead", "lost", 3)
        assert [letter.task_id for letter in (await Books.read(bus)).letters] == [task_id]
        assert await settled_books(bus, [task_id]) == {"dead": 1}
        await worker.stop()

    asyncio.run(main())


def test_a_worker_that_overruns_is_overruled(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors(TIMEOUT_GRACE_SEC=1)
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        result = await alice.result(await alice.submit(timeout=0.5, max_retries=0))
        assert (result.state, result.error) == ("failed", "timeout")
        await until(lambda: not worker.running)  # revoked by heartbeat
        worker.work = succeed
        assert (await alice.result(await alice.submit())).state == "done"
        await worker.stop()

    asyncio.run(main())


def test_one_gpu_id_on_two_machines_is_refused(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        right = await FakeWorker(bus, "gpu0").start()
        await until(lambda: right.replies)
        wrong = FakeWorker(bus, "gpu0", address="sim:other")
        wrong.host = "elsewhere"
        await wrong.start()
        await until(lambda: wrong.replies)
        assert not wrong.replies[-1].ok
        assert not wrong.replies[-1].reset
        assert "already served by rig" in wrong.replies[-1].reason
        await wrong.stop()
        alice = await Submitter.connect(bus)
        assert (await alice.result(await alice.submit())).state == "done"
        await right.stop()

    asyncio.run(main())


def test_what_is_finished_is_removed_and_the_rest_is_found_again(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        first = conductors("a")
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(300)]
        await alice.results(*ids)

        async def purged() -> bool:
            return len((await Books.read(bus)).queue) < 50

        await eventually(purged)
        waiting = [await alice.submit(f"pinned-{number}", gpu="gpu1") for number in range(3)]
        more = [await alice.submit(f"more-{number}") for number in range(20)]
        await alice.results(*more)
        first.kill9()
        second = conductors("b")
        await second.leading()
        assert "3 unfinished jobs" in second.text()
        late = await FakeWorker(bus, "gpu1").start()
        await alice.results(*waiting)
        assert await settled_books(bus, [*ids, *waiting, *more]) == {"done": 323}
        await end([worker, late])

    asyncio.run(main())


def test_a_submission_nobody_has_read_survives_the_tidying(bus: BusServer, conductors: Conductors) -> None:
    """The leader is frozen just before it would remove a prefix; what comes in meanwhile must stay."""

    async def main() -> None:
        first = conductors("a")
        workers = await two_workers(bus)
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(250)]
        for round_ in range(6):
            first.signal(signal.SIGSTOP)
            ids += [await alice.submit(f"late-{round_}-{number}") for number in range(20)]
            first.signal(signal.SIGCONT)
            await alice.results(*ids[-5:])
        await alice.results(*ids)
        assert await settled_books(bus, ids) == {"done": len(ids)}
        await end(workers)

    asyncio.run(main())


def test_the_configuration_is_checked_without_a_bus(bus: BusServer, conductors: Conductors) -> None:
    conductor = conductors("a", MAX_QUEUE=0)
    assert conductor.wait() == 2
    assert "MAX_QUEUE" in conductor.text()
    old = conductors("b", SCHEDULE_TICK_SEC=0.05, CONSUMER_ENQ="MAESTRO_ENQ")
    asyncio.run(old.leading())
    assert "SCHEDULE_TICK_SEC is no longer used" in old.text()
