# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lease, heartbeat, reports and control requests against a bus that answers what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from organism.bus import messages
from organism.bus.errors import Unavailable
from organism.bus.messages import Control, Device, Heartbeat, HeartbeatReply, Report, ReportReply, TaskRef
from organism.worker import reporter
from organism.worker.bus import Complaint
from organism.worker.cache_use import CacheUse
from organism.worker.control import Controller
from organism.worker.heart import Heart
from organism.worker.lease import Lease
from organism.worker.reporter import Reporter
from organism.worker.runner import Stop
from organism.worker.state import REMEMBERED, WorkerState
from organism.worker.store import TaskStore


class FakeBus:
    """Answers by a function, which may raise; takes so many seconds of the test's clock for it."""

    def __init__(self, answer: Callable[[str, bytes], msgspec.Struct]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, bytes]] = []

    async def ask(self, subject: str, payload: bytes = b"", *, timeout: float) -> Any:
        self.asked.append((subject, payload))
        return SimpleNamespace(data=messages.encode(self.answer(subject, payload)))

    async def say(self, subject: str, payload: bytes) -> None:
        self.asked.append((subject, payload))


def state() -> WorkerState:
    device = Device(backend="simulated", address="sim:0")
    return WorkerState(gpu="gpu0", host="h", device=device, workdir="/w", nats_url="n", types=["cmd"])


def make(
    answer: Callable[[str, bytes], msgspec.Struct], clock: Callable[[], float]
) -> tuple[Heart, WorkerState, Lease, list[Any]]:
    told: list[Any] = []
    mine, lease = state(), Lease(clock)

    def reset(reason: str) -> None:
        told.append(reason)
        mine.renew()

    heart = Heart(FakeBus(answer), mine, lease, 5, on_reset=reset, on_revoked=told.append, clock=clock)
    return heart, mine, lease, told


def test_the_lease_runs_from_the_moment_of_sending() -> None:
    now = [100.0]

    def answer(subject: str, payload: bytes) -> HeartbeatReply:
        now[0] += 3  # the road to the conductor and back
        return HeartbeatReply(ok=True, lease_s=10)

    heart, _, lease, _ = make(answer, lambda: now[0])
    assert asyncio.run(heart.beat())
    assert lease.left == 7
    now[0] = 109.9
    assert lease.fresh
    now[0] = 110.0
    assert not lease.fresh


def test_an_older_answer_never_shortens_the_lease() -> None:
    now = [0.0]
    lease = Lease(lambda: now[0])
    lease.renew(5, 10)
    lease.renew(1, 10)
    assert lease.left == 15
    lease.void()
    assert not lease.fresh


def test_a_rejected_worker_gets_no_lease() -> None:
    heart, _, lease, _ = make(lambda s, p: HeartbeatReply(ok=False, lease_s=10, reason="unknown GPU"), lambda: 0.0)
    assert not asyncio.run(heart.beat())
    assert not lease.fresh


def test_silence_is_no_lease_and_no_end() -> None:
    def answer(subject: str, payload: bytes) -> HeartbeatReply:
        raise Unavailable("nobody")

    heart, _, lease, _ = make(answer, lambda: 0.0)
    assert not asyncio.run(heart.beat())
    assert not lease.fresh


def test_a_reset_voids_the_lease_and_makes_a_new_incarnation() -> None:
    replies = [HeartbeatReply(ok=True, lease_s=10), HeartbeatReply(ok=False, reset=True, reason="too long silent")]
    heart, mine, lease, told = make(lambda s, p: replies.pop(0), lambda: 0.0)
    before = mine.incarnation
    asyncio.run(heart.beat())
    assert not asyncio.run(heart.beat())
    assert mine.incarnation != before
    assert told == ["too long silent"]
    assert not lease.fresh


def test_an_answer_to_the_earlier_incarnation_renews_nothing() -> None:
    mine: list[WorkerState] = []

    def answer(subject: str, payload: bytes) -> HeartbeatReply:
        mine[0].renew()  # a reset came while this one was on its way
        return HeartbeatReply(ok=True, lease_s=10)

    heart, its_state, lease, _ = make(answer, lambda: 0.0)
    mine.append(its_state)
    assert not asyncio.run(heart.beat())
    assert not lease.fresh


def test_a_stopping_worker_says_so_whatever_the_conductor_thinks() -> None:
    heart, mine, _, _ = make(lambda s, p: HeartbeatReply(ok=True, lease_s=10, drain=False), lambda: 0.0)
    mine.stopping = True
    asyncio.run(heart.beat())
    assert mine.heartbeat().draining
    mine.stopping, mine.stuck = False, "a process in state D"
    assert mine.heartbeat().draining


def test_a_heartbeat_lists_what_is_in_hand_unless_it_will_never_begin() -> None:
    mine = state()
    mine.coming = {TaskRef("b", 1), TaskRef("a", 2), TaskRef("runs", 1)}
    mine.running[TaskRef("runs", 1)] = Stop()
    assert mine.heartbeat().coming == [TaskRef("a", 2), TaskRef("b", 1)]
    mine.stuck = "a process in state D"
    assert mine.heartbeat().coming == []


def test_a_worker_wants_no_jobs_before_a_conductor_hands_orders_over() -> None:
    replies = [HeartbeatReply(ok=True, lease_s=10, hands=hands) for hands in (False, True, False)]
    heart, mine, _, _ = make(lambda s, p: replies.pop(0), lambda: 0.0)
    found = [mine.heartbeat().draining]
    while replies:
        asyncio.run(heart.beat())
        found.append(mine.heartbeat().draining)
    assert found == [True, True, False, True]
    assert mine.heartbeat().hears


def test_a_heartbeat_lists_what_runs_and_what_is_not_yet_reported() -> None:
    mine = state()
    mine.unreported = {TaskRef("b", 1), TaskRef("a", 2)}
    beat = messages.decode(messages.encode(mine.heartbeat()), Heartbeat)
    assert beat.unreported == [TaskRef("a", 2), TaskRef("b", 1)]


def test_only_so_many_finished_attempts_are_remembered() -> None:
    mine = state()
    for number in range(REMEMBERED + 1):
        mine.finished(TaskRef("job", number))
    assert not mine.is_finished(TaskRef("job", 0))
    assert mine.is_finished(TaskRef("job", REMEMBERED))
    mine.renew()
    assert not mine.is_finished(TaskRef("job", REMEMBERED))


@pytest.mark.parametrize(
    ("returncode", "error", "subject"),
    [(0, None, "gpu.task.done.gpu0"), (3, "exit", "gpu.task.err.gpu0"), (0, "timeout", "gpu.task.err.gpu0")],
)
def test_a_report_is_asked_until_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, returncode: int, error: str | None, subject: str
) -> None:
    monkeypatch.setattr(reporter, "FIRST_PAUSE", 0.0)
    answers: list[Any] = [
        Unavailable("nobody"),
        ReportReply(verdict="retry"),
        HeartbeatReply(ok=True),  # nonsense
        ReportReply(verdict="stale", reason="attempt 2 runs"),
    ]

    def answer(_subject: str, _payload: bytes) -> Any:
        following = answers.pop(0)
        if isinstance(following, Exception):
            raise following
        return following

    bus = FakeBus(answer)
    report = Report(
        ts="t", task_id="j", attempt=1, gpu_id="gpu0", incarnation="i", type="cmd", returncode=returncode, error=error
    )
    reply = asyncio.run(Reporter(bus).deliver(report))
    assert (reply.verdict, reply.reason) == ("stale", "attempt 2 runs")
    assert [asked for asked, _ in bus.asked] == [subject] * 4


def controller(tmp_path: Path) -> tuple[Controller, WorkerState]:
    mine = state()
    return Controller(mine, TaskStore(tmp_path), CacheUse(None, mine.gpu)), mine


def test_control_requests_are_answered_whatever_they_are(tmp_path: Path) -> None:
    control, mine = controller(tmp_path)
    assert not control.answer(b"junk").ok
    assert not control.answer(b'{"op": "format"}').ok
    assert control.answer(messages.encode(Control(op="ping"))).reason == mine.incarnation
    assert control.answer(messages.encode(Control(op="drain"))).ok
    assert mine.draining
    control.answer(messages.encode(Control(op="drain", on=False)))
    assert not mine.draining
    for task in ("absent", "../../etc", ""):
        assert not control.answer(messages.encode(Control(op="logs", task_id=task))).ok


def test_cancel_stops_the_named_attempt_alone(tmp_path: Path) -> None:
    async def main() -> None:
        control, mine = controller(tmp_path)
        stop = mine.running[TaskRef("job", 2)] = Stop()
        assert not control.answer(messages.encode(Control(op="cancel", task_id="job", attempt=1))).ok
        assert stop.why is None
        assert TaskRef("job", 1) in mine.revoked
        assert control.answer(messages.encode(Control(op="cancel", task_id="job", attempt=2))).ok
        assert stop.why == "cancelled"
        stop.ask("shutdown", "later")
        assert stop.why == "cancelled"
        stop.ask("discard", "revoked")  # nobody wants the report any more
        assert stop.why == "discard"

    asyncio.run(main())


def test_a_lasting_trouble_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaint = Complaint("no conductor", clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        complaint.note("nobody")
    assert [record.getMessage() for record in caplog.records] == [
        f"no conductor for {second} s: nobody; trying again" for second in (0, 30, 60, 90)
    ]
