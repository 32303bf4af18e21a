# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real worker process on a real bus: from order to report, and everything that can come between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus import messages
from organism.bus.messages import TaskRef
from organism.core import _bus
from service.support import HANG, BusServer
from service.worker.double import Conductor, WorkerProcess, await_file, await_gone

Workers = Callable[..., WorkerProcess]


def conducted(bus: BusServer, test: Callable[[Conductor], Any]) -> None:
    async def main() -> None:
        conductor = await Conductor.start(bus)
        try:
            await test(conductor)
        finally:
            await conductor.close()

    asyncio.run(main())


def script(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_an_order_becomes_a_report(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("job1", cmd=script("echo out; echo err >&2; pwd"), env={"A": "b"})
        assert (report.returncode, report.error, report.gpu_id, report.type) == (0, None, "gpu0", "cmd")
        work = worker.cache / "tasks/job1/1/work"
        assert report.stdout == f"out\n{work}\n"
        assert report.stderr == "err\n"
        assert report.cwd == str(work)
        assert report.incarnation == await conductor.incarnation()
        await conductor.settled()
        outcome = json.loads((worker.cache / "tasks/job1/1/outcome.json").read_text())
        assert outcome["returncode"] == 0
        beat = conductor.beats[-1]
        assert beat.device.backend == "simulated"
        assert beat.types == ["cmd", "noop", "python"]

    conducted(bus, test)


def test_a_failed_job_is_an_error_with_its_returncode(bus: BusServer, workers: Workers) -> None:
    workers()

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("fails", cmd=script("echo bad >&2; exit 3"))
        assert (report.returncode, report.error, report.stderr) == (3, "exit", "bad\n")
        report = await conductor.run("dies", cmd=script("kill -TERM $$"))
        assert (report.returncode, report.error) == (-15, "signal")
        report = await conductor.run("missing", cmd=["no-such-program"])
        assert (report.returncode, report.error) == (None, "start")
        assert report.message == "cannot run 'no-such-program': No such file or directory"

    conducted(bus, test)


def test_a_noop_starts_nothing_and_leaves_nothing(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        incarnation = await conductor.incarnation()
        orders = [conductor.order(f"n{n}", incarnation=incarnation, type="noop") for n in range(50)]
        await asyncio.gather(*orders)
        reports = [await conductor.report(f"n{n}") for n in range(50)]
        assert [(report.returncode, report.error) for report in reports] == [(0, None)] * 50
        assert not (worker.cache / "tasks").exists()

    conducted(bus, test)


def test_noops_are_taken_while_earlier_ones_are_reported(bus: BusServer, workers: Workers) -> None:
    workers()

    async def test(conductor: Conductor) -> None:
        incarnation = await conductor.incarnation()
        conductor.taking_reports = False
        for n in range(3):
            await conductor.order(f"n{n}", incarnation=incarnation, type="noop")
        # all three have run, and none of them is forgotten for as long as its report is not taken
        names = {f"n{n}" for n in range(3)}
        await conductor.until(lambda: names <= {ref.task_id for ref in conductor.beats[-1].unreported})
        conductor.taking_reports = True
        for name in sorted(names):
            await conductor.report(name)
        await conductor.until(lambda: not conductor.beats[-1].unreported)
        # one that comes again is known
        again = await conductor.order("n0", incarnation=incarnation, type="noop", attempt=2)
        await conductor.report("n0", 2)
        await conductor.nc.say(_bus.order_subject("gpu0", 1), messages.encode(again))
        await conductor.run("behind-it", incarnation=incarnation, type="noop")
        assert len([report for report in conductor.reports if report.attempt == 2]) == 1

    conducted(bus, test)


def test_a_killed_worker_leaves_no_process_and_reports_what_it_had(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        # an outcome that is on disk, but that no conductor has taken
        conductor.taking_reports = False
        first = await conductor.order("first", cmd=script("echo kept"))
        outcome = worker.cache / "tasks/first/1/outcome.json"
        await asyncio.to_thread(await_file, outcome, 0)
        worker.signal(signal.SIGKILL)
        await worker.ended()
        conductor.taking_reports = True
        again = worker.start()
        incarnation = await conductor.incarnation(other_than=first.incarnation)
        report = await conductor.report("first")
        assert (report.stdout, report.incarnation) == ("kept\n", first.incarnation)
        beat = next(beat for beat in conductor.beats if beat.incarnation == incarnation)
        assert beat.unreported == [TaskRef("first", 1)]
        # and a job that dies with its worker, grandchildren in sessions of their own included
        pids = worker.cache / "tasks/second/1/work/pids"
        await conductor.order(
            "second",
            incarnation=incarnation,
            cmd=script("setsid sh -c 'sleep 300 & echo $! >>pids; exec sleep 300' & echo $! $$ >>pids; wait"),
        )
        await conductor.running("second")
        found = [int(pid) for pid in (await asyncio.to_thread(await_file, pids, 2)).split()]
        assert len(found) == 3
        again.signal(signal.SIGKILL)
        await again.ended()
        await_gone(found)
        again.start()
        newest = await conductor.incarnation(other_than=incarnation)
        assert await conductor.event("leftover")
        # the order of the earlier incarnation is dropped: the conductor alone decides about another attempt
        report = await conductor.run("third", incarnation=newest, cmd=["true"])
        assert report.returncode == 0
        await conductor.settled()
        assert [r.task_id for r in conductor.reports if r.task_id == "second"] == []
        assert (worker.cache / "tasks/second/1/abandoned").exists()

    conducted(bus, test)


def test_a_reset_ends_the_job_and_makes_a_new_incarnation(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        old = await conductor.incarnation()
        await conductor.order("zombie", cmd=script("echo $$ >pid; sleep 300"))
        pid = int(await asyncio.to_thread(await_file, worker.cache / "tasks/zombie/1/work/pid"))
        conductor.dead.add(old)
        new = await conductor.incarnation(other_than=old)
        await asyncio.to_thread(await_gone, [pid])
        # what was meant for the one that was declared dead is not run
        await conductor.order("late", incarnation=old, cmd=["true"])
        assert (await conductor.run("fresh", incarnation=new, cmd=["true"])).returncode == 0
        await conductor.settled()
        assert {report.task_id for report in conductor.reports} == {"fresh"}
        assert "late" in {event.get("task_id") for event in conductor.events if event["event"] == "dropped"}

    conducted(bus, test)


def test_a_frozen_worker_asks_before_it_starts_what_it_was_given_meanwhile(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        conductor.lease_s = 1.0
        old = await conductor.incarnation()
        assert (await conductor.run("before", cmd=["true"])).returncode == 0
        worker.signal(signal.SIGSTOP)
        conductor.dead.add(old)  # its time-to-live ran out while it was frozen
        await conductor.order("meanwhile", incarnation=old, cmd=["true"])
        await asyncio.sleep(1.5)  # the lease runs out while nothing can happen in the worker
        worker.signal(signal.SIGCONT)
        new = await conductor.incarnation(other_than=old)
        assert (await conductor.run("after", incarnation=new, cmd=["true"])).returncode == 0
        await conductor.settled()
        assert {report.task_id for report in conductor.reports} == {"before", "after"}

    conducted(bus, test)


def test_a_revoked_attempt_is_stopped_without_a_report(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        await conductor.order("gone", cmd=script("echo $$ >pid; sleep 300"))
        pid = int(await asyncio.to_thread(await_file, worker.cache / "tasks/gone/1/work/pid"))
        conductor.revoked = [TaskRef("gone", 1), TaskRef("never", 2)]
        await asyncio.to_thread(await_gone, [pid])
        await conductor.order("never", attempt=2, cmd=["true"])
        assert (await conductor.run("next", cmd=["true"])).returncode == 0
        await conductor.settled()
        assert [report.task_id for report in conductor.reports] == ["next"]

    conducted(bus, test)


def test_cancel_and_timeout_end_the_whole_tree(bus: BusServer, workers: Workers) -> None:
    worker = workers()
    stubborn = script('trap "" TERM; (trap "" TERM; sleep 300) & echo $! $$ >pids; while :; do sleep 300; done')

    async def test(conductor: Conductor) -> None:
        await conductor.order("cancelled", cmd=stubborn)
        pids = await asyncio.to_thread(await_file, worker.cache / "tasks/cancelled/1/work/pids")
        reply = await conductor.control(op="cancel", task_id="cancelled", attempt=1)
        assert reply.ok, reply.reason
        report = await conductor.report("cancelled")
        assert (report.error, report.returncode) == ("cancelled", -9)
        await asyncio.to_thread(await_gone, [int(pid) for pid in pids.split()])
        report = await conductor.run("slow", cmd=stubborn, timeout=0.5)
        assert (report.error, report.returncode) == ("timeout", -9)
        assert report.message == "stopped after its time-out of 0.5 s"
        pids = (worker.cache / "tasks/slow/1/work/pids").read_text()
        await asyncio.to_thread(await_gone, [int(pid) for pid in pids.split()])
        reply = await conductor.control(op="cancel", task_id="slow", attempt=1)
        assert (reply.ok, reply.reason) == (False, "slow does not run on gpu0")

    conducted(bus, test)


def test_a_daemonised_child_ends_with_its_job(bus: BusServer, workers: Workers) -> None:
    worker = workers()
    double_fork = (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        open('pid', 'w').write(f'{os.getpid()}\\n')\n"
        "        os.execvp('sleep', ['sleep', '300'])\n"  # keeps the job's pipes open
        "    os._exit(0)\n"
        "os.wait()\n"
        "while not os.path.exists('pid'): pass\n"
    )

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("daemon", cmd=[sys.executable, "-c", double_fork])
        assert (report.returncode, report.message) == (0, "")
        await asyncio.to_thread(await_gone, [int((worker.cache / "tasks/daemon/1/work/pid").read_text())])

    conducted(bus, test)


def test_a_flood_of_output_is_bounded_and_kept_on_disk(bus: BusServer, workers: Workers) -> None:
    worker = workers(LOG_MAX_MB=2)
    flood = "import sys; sys.stdout.write('BEGIN' + 'x' * 5_000_000 + 'END'); sys.stderr.write('\\u20ac' * 70_000)"

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("flood", cmd=[sys.executable, "-X", "utf8", "-c", flood])
        assert report.returncode == 0, report.stderr
        assert (report.stdout_bytes, report.stderr_bytes) == (5_000_008, 210_000)
        assert len(report.stdout.encode()) <= 64_000
        assert report.stdout.startswith("BEGINxxx")
        assert report.stdout.endswith("xxxEND")
        assert "bytes left out" in report.stdout
        log = worker.cache / "tasks/flood/1/stdout.log"
        assert 2 * 1024 * 1024 < log.stat().st_size < 2 * 1024 * 1024 + 200
        # by offset over the bus, also now that it is finished
        seen, offset, eof = "", 0, False
        while not eof:
            reply = await conductor.control(op="logs", task_id="flood", stream="stderr", offset=offset)
            assert reply.ok, reply.reason
            assert reply.next_offset > offset
            seen, offset, eof = seen + reply.text, reply.next_offset, reply.eof
        assert seen == "\u20ac" * 70_000
        reply = await conductor.control(op="logs", task_id="../../etc/passwd")
        assert not reply.ok

    conducted(bus, test)


def test_bad_orders_are_told_and_forgotten(bus: BusServer, workers: Workers) -> None:
    workers()

    async def test(conductor: Conductor) -> None:
        incarnation = await conductor.incarnation()
        good = {
            "v": 1, "ts": "2026-11-22T10:00:00.000Z", "task_id": "x", "attempt": 1, "gpu": "gpu0", "timeout": 5,
            "incarnation": incarnation, "user": "alice", "spec": {"cmd": ["true"]}, "enq_seq": 1,
        }  # fmt: skip
        bad: list[bytes] = [
            b"not json",
            b"\xff\xfe",
            b"[]",
            json.dumps({**good, "task_id": "../escape"}).encode(),
            json.dumps({**good, "attempt": 0}).encode(),
            json.dumps({**good, "gpu": "gpu1"}).encode(),
            json.dumps({**good, "spec": {"cmd": "true"}}).encode(),
        ]
        for payload in bad:
            await conductor.nc.say(_bus.order_subject("gpu0", 1), payload)
        # well-formed orders for jobs that must not run here
        report = await conductor.run("shell", type="shell", shell="echo no")
        assert (report.error, report.returncode) == ("refused", None)
        assert "not allowed" in report.message
        report = await conductor.run("unknown", type="embed")
        assert report.error == "refused"
        report = await conductor.run("outside", cmd=["true"], cwd="../../..")
        assert report.error == "refused"
        assert (await conductor.run("good", cmd=["true"])).returncode == 0
        await conductor.settled()
        refusals = [event["text"] for event in conductor.events if event["event"] == "bad_order"]
        assert len(refusals) == len(bad)
        assert refusals[-2] == "meant for gpu1 - at `$.gpu`"

    conducted(bus, test)


def test_an_order_that_is_handed_over_again_runs_once(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        work = worker.cache / "tasks/once/1/work"
        order = await conductor.order("once", cmd=script("echo $$ >>ran; while ! test -e go; do sleep 0.1; done"))
        await asyncio.to_thread(await_file, work / "ran")
        await conductor.nc.say(_bus.order_subject("gpu0", 1), messages.encode(order))
        (work / "go").touch()
        await conductor.report("once")
        await conductor.nc.say(_bus.order_subject("gpu0", 1), messages.encode(order))
        assert (await conductor.run("next", cmd=["true"])).returncode == 0
        assert len((work / "ran").read_text().split()) == 1
        assert [report.task_id for report in conductor.reports] == ["once", "next"]

    conducted(bus, test)


def test_what_a_conductor_says_that_leads_no_more_is_not_heard(bus: BusServer, workers: Workers) -> None:
    """It was frozen between the commit of an order and its word, and the job may be over for long."""
    worker = workers()

    async def test(conductor: Conductor) -> None:
        conductor.epoch = 7
        order = await conductor.order("old", cmd=["true"])
        await conductor.report("old")
        seen = len(conductor.beats)
        await conductor.until(lambda: len(conductor.beats) > seen + 1)  # the answer to the one before has come
        worker.signal(signal.SIGSTOP)  # so that its heartbeats do not come between
        conductor.epoch = 6
        await conductor.order("older", incarnation=order.incarnation, cmd=["true"])
        conductor.epoch = 8
        worker.signal(signal.SIGCONT)
        assert (await conductor.run("new", incarnation=order.incarnation, cmd=["true"])).returncode == 0
        assert [report.task_id for report in conductor.reports] == ["old", "new"]
        assert "of epoch 6, which leads no more" in (await conductor.event("dropped"))["text"]

    conducted(bus, test)


def test_no_jobs_are_wanted_of_a_conductor_that_hands_no_orders_over(bus: BusServer, workers: Workers) -> None:
    async def test(conductor: Conductor) -> None:
        conductor.hands = False
        worker = workers()
        await conductor.until(lambda: len(conductor.beats) > 3)
        assert all(beat.draining for beat in conductor.beats)
        conductor.hands = True
        await conductor.until(lambda: not conductor.beats[-1].draining)
        assert "the conductor is of an earlier version" in worker.log.read_text()

    conducted(bus, test)


def test_a_worker_says_at_once_what_it_has_when_its_connection_is_back(bus: BusServer, workers: Workers) -> None:
    worker = workers(HEARTBEAT_SEC=60)  # as long as the hang guard

    async def test(conductor: Conductor) -> None:
        await conductor.until(lambda: conductor.beats and not conductor.beats[-1].draining)
        seen = len(conductor.beats)
        worker.signal(signal.SIGSTOP)  # so that the conductor is there first
        await asyncio.to_thread(bus.restart)
        await conductor.nc.wait_connected(HANG)
        worker.signal(signal.SIGCONT)
        async with asyncio.timeout(HANG / 2):
            await conductor.until(lambda: len(conductor.beats) > seen)

    conducted(bus, test)


def test_a_worker_whose_key_may_not_hear_its_orders_says_so_and_ends(
    bus: BusServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as permissions:
        permissions.setattr(_bus, "order_subject", lambda gpu: f"gpu.task.earlier.{gpu}.*")
        bus.restart()
    worker = workers()
    assert asyncio.run(worker.ended()) == 1
    assert f"this key may not listen to {_bus.order_subject('gpu0')}" in worker.log.read_text()


@pytest.mark.parametrize("how", ["reload", "restart"])
def test_a_worker_whose_key_may_not_hear_its_orders_any_more_ends(
    bus: BusServer, workers: Workers, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It would lose each job that it is given, and be the first to be given the next."""
    worker = workers()

    async def test(conductor: Conductor) -> None:
        assert (await conductor.run("before", cmd=["true"])).returncode == 0

    conducted(bus, test)
    with monkeypatch.context() as permissions:
        permissions.setattr(_bus, "order_subject", lambda gpu: f"gpu.task.earlier.{gpu}.*")
        getattr(bus, how)()
    assert asyncio.run(worker.ended()) == 1
    assert f"this key may not listen to {_bus.order_subject('gpu0')} any more" in worker.log.read_text()


def test_sigterm_lets_the_job_finish_and_takes_no_other(bus: BusServer, workers: Workers) -> None:
    worker = workers(STOP_GRACE_SEC=60)

    async def test(conductor: Conductor) -> None:
        await conductor.order(
            "last", cmd=script("echo started >here; while ! test -e go; do sleep 0.1; done; echo end")
        )
        await asyncio.to_thread(await_file, worker.cache / "tasks/last/1/work/here")
        await conductor.order("queued", cmd=["true"])
        worker.signal(signal.SIGTERM)
        await conductor.until(lambda: conductor.beats[-1].draining)
        (worker.cache / "tasks/last/1/work/go").touch()
        report = await conductor.report("last")
        assert (report.returncode, report.stdout) == (0, "end\n")
        # given before the conductor could know: handed back without costing a try
        report = await conductor.report("queued")
        assert (report.error, report.returncode) == ("shutdown", None)
        assert await worker.ended() == 0

    conducted(bus, test)


def test_sigterm_ends_a_job_that_outstays_its_grace(bus: BusServer, workers: Workers) -> None:
    worker = workers(STOP_GRACE_SEC=0.3)

    async def test(conductor: Conductor) -> None:
        await conductor.order("long", cmd=script("echo $$ >pid; sleep 300"))
        pid = int(await asyncio.to_thread(await_file, worker.cache / "tasks/long/1/work/pid"))
        worker.signal(signal.SIGTERM)
        report = await conductor.report("long")
        assert report.error == "shutdown"
        assert await worker.ended() == 0
        await asyncio.to_thread(await_gone, [pid])

    conducted(bus, test)


def test_the_worker_goes_on_without_a_conductor_and_without_a_server(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        await conductor.order(
            "through", cmd=script("echo $$ >pid; while ! test -e go; do sleep 0.1; done; echo survived")
        )
        await asyncio.to_thread(await_file, worker.cache / "tasks/through/1/work/pid")
        conductor.answering = conductor.taking_reports = False
        await asyncio.to_thread(bus.kill9)
        (worker.cache / "tasks/through/1/work/go").touch()
        outcome = worker.cache / "tasks/through/1/outcome.json"
        await asyncio.to_thread(await_file, outcome, 0)
        await asyncio.to_thread(bus.start)
        conductor.answering = conductor.taking_reports = True
        report = await conductor.report("through")
        assert (report.returncode, report.stdout) == (0, "survived\n")
        await conductor.settled()

    conducted(bus, test)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: jobs change their user")
def test_a_roots_worker_runs_jobs_as_the_unprivileged_user(bus: BusServer, workers: Workers, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o001 == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o001)  # pytest's own directories are private to root
    worker = workers(JOB_USER="nobody")

    async def test(conductor: Conductor) -> None:
        report = await conductor.run(
            "who", cmd=script("id -un; umask; touch mine ../forged; cat ../order.json; exit 0")
        )
        assert report.stdout == "nobody\n0022\n"
        assert "forged" in report.stderr
        assert (worker.cache / "tasks/who/1/work/mine").exists()
        assert not (worker.cache / "tasks/who/1/forged").exists()
        report = await conductor.run(
            "root", cmd=script("grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status")
        )
        assert report.stdout == "NoNewPrivs:\t1\nCapEff:\t0000000000000000\n"

    conducted(bus, test)
