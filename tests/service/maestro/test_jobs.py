# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs from submission to result, on a real bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from organism.bus.jetstream import JetStream
from organism.bus.messages import Report, RunOrder
from organism.core import _bus
from service.maestro.books import Books, settled_books
from service.maestro.stage import (
    ConductorProcess,
    FakeWorker,
    Submitter,
    eventually,
    fail,
    forever,
    lasting,
    succeed,
    until,
)
from service.support import HANG, BusServer

Conductors = Callable[..., ConductorProcess]


def test_a_job_runs_and_its_result_is_known(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductor = conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        result = await alice.result(task_id)
        assert (result.ok, result.state, result.user) == (True, "done", "alice")
        assert result.data["stdout"] == f"ran {task_id}\n"
        assert result.data["gpu_id"] == "gpu0"
        assert [event.state for event in result.history] == ["enqueued", "scheduled", "done"]
        assert await settled_books(bus, [task_id]) == {"done": 1}
        assert worker.verdicts[-1][1] == "recorded"
        await worker.stop()
        assert conductor.stop() == 0

    asyncio.run(main())


def test_a_failing_job_is_tried_elsewhere_until_its_tries_are_used_up(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        workers = [await FakeWorker(bus, gpu, fail).start() for gpu in ("gpu0", "gpu1")]
        alice = await Submitter.connect(bus)
        await eventually(lambda: _alive(alice, 2))
        result = await alice.result(await alice.submit(max_retries=2))
        assert (result.state, result.error, result.attempts) == ("failed", "exit", 3)
        assert result.data["returncode"] == 3
        assert "3 tries" in result.reason
        ran = [event.gpu for event in result.history if event.state == "scheduled"]
        assert ran[0] != ran[1]
        assert ran[1] != ran[2]
        assert [event.tries for event in result.history if event.state == "retry"] == [1, 2]
        assert await settled_books(bus, [result.task_id]) == {"failed": 1}
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


async def _alive(user: Submitter, count: int) -> bool:
    reply = await user.call("top")
    return sum(1 for gpu in reply.data.get("gpus", []) if gpu["state"] != "dead") >= count


def test_with_one_gpu_a_failed_job_is_tried_there_again(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        tries: list[int] = []

        async def second_time_lucky(worker: FakeWorker, order: RunOrder) -> Report:
            tries.append(order.attempt)
            return await (succeed if order.attempt == 2 else fail)(worker, order)

        worker = await FakeWorker(bus, "gpu0", second_time_lucky).start()
        alice = await Submitter.connect(bus)
        result = await alice.result(await alice.submit())
        assert (result.state, tries) == ("done", [1, 2])
        await worker.stop()

    asyncio.run(main())


def test_a_worker_that_stops_costs_its_job_no_try(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()

        async def stopping(worker: FakeWorker, order: RunOrder) -> Report:
            if order.attempt <= 3:
                return worker.report(order, error="shutdown")
            return worker.report(order, returncode=0)

        worker = await FakeWorker(bus, "gpu0", stopping).start()
        alice = await Submitter.connect(bus)
        result = await alice.result(await alice.submit(max_retries=0))
        assert (result.state, result.attempts) == ("done", 4)
        await worker.stop()

    asyncio.run(main())


def test_what_a_worker_refuses_is_dead_and_can_be_replayed(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()

        async def picky(worker: FakeWorker, order: RunOrder) -> Report:
            if order.spec.replay_of:
                return worker.report(order, returncode=0)
            return worker.report(order, error="refused", message="not with me")

        worker = await FakeWorker(bus, "gpu0", picky).start()
        alice = await Submitter.connect(bus)
        result = await alice.result(await alice.submit(labels={"run": "7"}))
        assert (result.state, result.error) == ("dead", "refused")
        assert "not with me" in result.reason
        listed = await alice.call("dead_list")
        assert [entry["task_id"] for entry in listed.data["dead"]] == [result.task_id]
        bob = await Submitter.connect(bus, "bob")
        assert (await bob.call("dead_list")).data.get("dead", []) == []
        refused = await bob.call("dead_replay", task_id=result.task_id)
        assert refused.error is not None
        assert refused.error.code == "not_found"
        replayed = await alice.call("dead_replay", task_id=result.task_id)
        again = await alice.result(replayed.data["task_id"])
        assert (again.state, again.labels, again.user) == ("done", {"run": "7"}, "alice")
        await worker.stop()

    asyncio.run(main())


def test_a_pinned_job_waits_for_its_gpu_and_says_so(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors(WAIT_GPU_SEC=0)
        first = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit(gpu="gpu1")
        info = await alice.in_state(task_id, "waiting_gpu")
        assert "gpu1" in info.reason
        other = await alice.result(await alice.submit())  # others are not held up
        assert other.data["gpu_id"] == "gpu0"
        second = await FakeWorker(bus, "gpu1").start()
        result = await alice.result(task_id)
        assert result.data["gpu_id"] == "gpu1"
        assert "waiting_gpu" in [event.state for event in result.history]
        assert await settled_books(bus, [task_id, other.task_id]) == {"done": 2}
        for worker in (first, second):
            await worker.stop()

    asyncio.run(main())


def test_memory_and_type_are_obeyed(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        small = await FakeWorker(bus, "gpu0", vram_mb=4096).start()
        large = await FakeWorker(bus, "gpu1", vram_mb=16384).start()
        small.types = ["cmd"]
        alice = await Submitter.connect(bus)
        await eventually(lambda: _alive(alice, 2))
        results = await alice.results(*[await alice.submit(min_vram_mb=8000) for _ in range(4)])
        assert {result.data["gpu_id"] for result in results.values()} == {"gpu1"}
        noop = await alice.result(await alice.submit(type="noop", cmd=None))
        assert noop.data["gpu_id"] == "gpu1"
        task_id = await alice.submit(min_vram_mb=99999)
        info = await alice.in_state(task_id, "waiting_gpu")
        assert "99999 MiB" in info.reason
        for worker in (small, large):
            await worker.stop()

    asyncio.run(main())


def test_priority_goes_first_and_equals_keep_their_order(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}", priority=10 if number == 3 else 0) for number in range(5)]
        await eventually(lambda: _known(alice, ids))
        worker = await FakeWorker(bus, "gpu0").start()
        await alice.results(*ids)
        assert [ref.task_id for ref in worker.started] == ["job-3", "job-0", "job-1", "job-2", "job-4"]
        await worker.stop()

    asyncio.run(main())


async def _known(user: Submitter, ids: list[str]) -> bool:
    return all([await user.state(task_id) for task_id in ids])


def test_a_hot_gpu_gets_no_job_and_a_drained_one_neither(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors(METRICS_TTL_SEC=600)
        workers = [await FakeWorker(bus, gpu).start() for gpu in ("gpu0", "gpu1")]
        olga = await Submitter.connect(bus, "olga", "operator")
        await eventually(lambda: _alive(olga, 2))
        await workers[0].measure(temp_c=79.0, gpu_busy_percent=0.0)
        await eventually(lambda: _gpu_is(olga, "gpu0", "hot"))
        ids = [await olga.submit() for _ in range(4)]
        assert {result.data["gpu_id"] for result in (await olga.results(*ids)).values()} == {"gpu1"}
        await workers[0].measure(temp_c=40.0, gpu_busy_percent=0.0)
        assert (await olga.call("drain", gpu="gpu1", on=True)).ok
        ids = [await olga.submit() for _ in range(4)]
        assert {result.data["gpu_id"] for result in (await olga.results(*ids)).values()} == {"gpu0"}
        forbidden = await (await Submitter.connect(bus)).call("drain", gpu="gpu0", on=True)
        assert forbidden.error is not None
        assert forbidden.error.code == "forbidden"
        assert (await olga.call("drain", gpu="gpu1", on=False)).ok
        assert await _gpu_is(olga, "gpu1", "idle", "stale")
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


async def _gpu_is(user: Submitter, gpu_id: str, *states: str) -> bool:
    reply = await user.call("top")
    return any(gpu["id"] == gpu_id and gpu["state"] in states for gpu in reply.data.get("gpus", []))


def test_cancel_is_final(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0", forever).start()
        alice = await Submitter.connect(bus)
        running = await alice.submit("running")
        await until(lambda: worker.running)
        waiting = await alice.submit("waiting")
        await eventually(lambda: alice.state(waiting))
        for task_id in (waiting, running):
            reply = await alice.call("cancel", task_id=task_id)
            assert reply.ok, reply.error
            assert reply.data["job"]["state"] == "cancelled"
        await until(lambda: not worker.running)
        again = await alice.call("cancel", task_id=running)
        assert again.error is not None
        assert again.error.code == "conflict"
        worker.work = succeed
        after = await alice.result(await alice.submit("after"))  # the GPU is free again
        assert after.state == "done"
        assert await settled_books(bus, [running, waiting, "after"]) == {"cancelled": 2, "done": 1}
        assert [ref.task_id for ref in worker.started] == ["running", "after"]
        await worker.stop()

    asyncio.run(main())


def test_a_cancel_that_races_with_the_end_has_one_winner(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        workers = [await FakeWorker(bus, gpu, lasting(0.01)).start() for gpu in ("gpu0", "gpu1")]
        alice = await Submitter.connect(bus)
        ids = [await alice.submit() for _ in range(40)]
        replies = await asyncio.gather(*(alice.call("cancel", task_id=task_id) for task_id in ids))
        results = await alice.results(*ids)
        for task_id, reply in zip(ids, replies, strict=True):
            if reply.ok:
                assert results[task_id].state == "cancelled"
            else:
                assert reply.error is not None
                assert reply.error.code in ("conflict", "not_found"), reply.error
                assert results[task_id].state == "done"
        assert (await settled_books(bus, ids)).total() == 40
        for worker in workers:
            await worker.stop()

    asyncio.run(main())


def test_others_jobs_are_not_to_be_seen(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        alice, bob = await Submitter.connect(bus), await Submitter.connect(bus, "bob")
        olga = await Submitter.connect(bus, "olga", "operator")
        task_id = await alice.submit()
        await eventually(lambda: alice.state(task_id))
        for operation in ("status", "cancel", "result", "logs"):
            reply = await bob.call(operation, task_id=task_id)
            assert reply.error is not None
            assert reply.error.code == "not_found"
        assert (await bob.call("list")).data.get("jobs", []) == []
        assert (await bob.call("list", user="alice")).error is not None
        assert [job["task_id"] for job in (await olga.call("list", all=True)).data["jobs"]] == [task_id]
        assert (await bob.call("wait", task_ids=[task_id])).data["unknown"] == [task_id]
        assert (await olga.call("cancel", task_id=task_id)).ok
        assert (await alice.result(task_id)).reason == "cancelled by olga"
        assert (await alice.call("nonsense")).error is not None
        bad = await alice.call("status", task="x")
        assert bad.error is not None
        assert bad.error.code == "bad_request"

    asyncio.run(main())


def test_bad_messages_are_answered_and_nothing_stops(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        payloads = (
            b"",
            b"{not json",
            b"\xff\xfe\x00",
            b"[" * 5000,
            b'{"task_id": "typed", "type": "cmd", "cmd": "true"}',
            b'{"task_id": "colour", "cmd": ["true"], "colour": "red"}',
            b'{"task_id": "../up", "cmd": ["true"]}',
            b'{"task_id": "late", "cmd": ["true"], "timeout": -1}',
            b'{"task_id": "sh", "type": "shell", "shell": "true"}',
            b'{"task_id": "alien", "type": "alien"}',
            b'{"v": 9, "task_id": "newer", "cmd": ["true"]}',
        )
        for payload in payloads:
            await alice.raw(payload)
        good = await alice.submit()
        assert (await alice.result(good)).state == "done"
        known = await alice.results("typed", "colour", "late", "sh", "alien", "newer")
        assert {result.state for result in known.values()} == {"dead"}
        assert "not allowed by this site's policy" in known["sh"].reason
        assert "colour" in known["colour"].reason

        async def all_buried() -> Books | None:
            books = await Books.read(bus)
            return books if len(books.letters) == len(payloads) and len(books.results) == len(payloads) + 1 else None

        books = await eventually(all_buried)
        assert all(letter.reason for letter in books.letters)
        assert await settled_books(bus, list(books.results)) == {"dead": len(payloads), "done": 1}
        await worker.stop()

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_so(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors(MAX_QUEUE=3)
        observer = await bus.connected("observer", "console")
        said: list[bytes] = []

        async def hear(message: object) -> None:
            said.append(message.data)  # type: ignore[attr-defined]  # a NATS message

        await observer.listen(_bus.MAESTRO_STATE, hear)
        alice = await Submitter.connect(bus)
        ids = [await alice.submit(f"job-{number}") for number in range(5)]
        for task_id in ids[3:]:
            result = await alice.result(task_id)
            assert (result.state, result.error) == ("dead", "refused")
            assert "MAX_QUEUE" in result.reason
        await until(lambda: any(b'"queue_full"' in one for one in said))
        assert (await alice.call("cancel", task_id="job-0")).ok
        await alice.submit("after")
        await alice.in_state("after", "enqueued", "waiting_gpu")
        replay = await alice.call("dead_replay", task_id="job-3")
        assert replay.ok
        assert (await alice.result(replay.data["task_id"])).state == "dead"  # full again

    asyncio.run(main())


def test_the_same_submission_twice_is_one_job(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductor = conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        same = b'{"task_id": "same", "cmd": ["true"]}'
        for payload in (same, same, b' { "cmd" : ["true"], "task_id":"same"}'):
            await alice.raw(payload)
        assert (await alice.result("same")).state == "done"
        await alice.raw(same)
        await alice.raw(b'{"task_id": "same", "cmd": ["false"]}')
        conductor.stop()
        await alice.raw(same)
        conductors("b")
        last = await alice.submit()
        await alice.result(last)
        assert [ref.task_id for ref in worker.started] == ["same", last]

        async def buried() -> list[str]:
            return [letter.reason for letter in (await Books.read(bus)).letters]

        letters = await eventually(buried)
        assert len(letters) == 1
        assert "another content" in letters[0]
        assert await settled_books(bus, ["same", last]) == {"done": 2}
        await worker.stop()

    asyncio.run(main())


def test_a_large_submission_travels_and_a_delayed_one_waits(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        await conductors().leading()
        seen: dict[str, int] = {}

        async def count(worker: FakeWorker, order: RunOrder) -> Report:
            seen[order.task_id] = len((order.spec.cmd or [""])[-1])
            return worker.report(order, returncode=0)

        worker = await FakeWorker(bus, "gpu0", count).start()
        alice = await Submitter.connect(bus)
        delayed = await alice.submit("delayed", delay=10)
        large = await alice.submit("large", cmd=["echo", "x" * 300_000])
        assert (await alice.result(large)).state == "done"
        assert seen["large"] == 300_000
        assert "delayed" not in seen
        assert "delayed" in (await alice.in_state(delayed, "enqueued")).reason
        result = await alice.result(delayed)
        assert result.state == "done"
        await worker.stop()

    asyncio.run(main())


def test_results_are_announced_to_their_user(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        heard: asyncio.Queue[str] = asyncio.Queue()

        async def hear(message: object) -> None:
            heard.put_nowait(message.subject)  # type: ignore[attr-defined]  # a NATS message

        await alice.nc.listen("maestro.notify.alice.*", hear)
        task_id = await alice.submit()
        async with asyncio.timeout(30):
            assert await heard.get() == f"maestro.notify.alice.{task_id}"
        await worker.stop()

    asyncio.run(main())


def test_an_answer_goes_to_the_inbox_of_its_asker_alone(bus: BusServer, conductors: Conductors) -> None:
    """nats-server lets anybody name any subject for an answer, and a conductor may write its own fence and lease."""

    async def main() -> None:
        conductor = conductors()
        await conductor.leading()
        js = JetStream(await bus.connected("admin", "setup"))

        async def ends() -> list[int]:
            return [(await js.info(stream))["state"]["last_seq"] for stream in (_bus.STREAM_WQ, _bus.STREAM_RESULTS)]

        before = await ends()
        alice, worker = await bus.connected("submitter", "alice"), await bus.connected("worker", "gpu0")
        wanted = [_bus.epoch_subject(), _bus.journal_subject(), _bus.result_subject("j"), "_INBOX.submitter.bob.x"]
        for reply in wanted:
            await alice.say(_bus.rpc_subject("alice", "top"), b"{}", reply=reply)
            for subject in (_bus.heartbeat_subject("gpu0"), _bus.done_subject("gpu0")):
                await worker.say(subject, b"{}", reply=reply)
        # heartbeats that are none are answered; of a GPU that was never heard no report is
        await until(lambda: conductor.text().count("is not in their own inbox") == 2 * len(wanted))
        assert (await alice.ask(_bus.rpc_subject("alice", "top"), b"{}", timeout=HANG)).data
        assert await ends() == before
        for nc in (alice, worker, js.nc):
            await nc.close()

    asyncio.run(main())
