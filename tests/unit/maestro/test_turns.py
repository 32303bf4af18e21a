# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits, fair turns, aging and queues in the order of dispatch; every departure from strict order says why."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.bus.messages import Device, Heartbeat, JobSpec, TaskRef
from organism.core import _limits
from organism.maestro.ledger import Job, Ledger
from organism.maestro.scheduler import Choice, Scheduler
from organism.maestro.shares import Order, Shares
from organism.maestro.workers import Fleet


class Site:
    """A pool whose decisions are carried out."""

    def __init__(self, gpus: int = 1, *, order: Order | None = None, limits: str = "") -> None:
        self.fleet = Fleet()
        for number in range(gpus):
            name = f"g{number}"
            device = Device(backend="simulated", address=f"sim:{name}")
            beat = Heartbeat(ts="", gpu_id=name, incarnation="i", host="rig", pid=1, version="0", device=device)
            beat.types = ["cmd", "noop"]
            self.fleet.heartbeat(beat, 0.0)
        order = order or Order()
        self.shares = Shares(_limits.parse(limits), order.half_life)
        self.scheduler = Scheduler(self.fleet, order=order, shares=self.shares)
        self.ledger = Ledger()
        self.seq = 0
        self.where: dict[int, tuple[str, TaskRef]] = {}

    def add(self, user: str = "alice", now: float = 0.0, **spec: Any) -> Job:
        self.seq += 1
        job = self.ledger.submitted(self.seq, user, JobSpec(**{"cmd": ["true"], **spec}), b"{}", now)
        assert job is not None
        self.scheduler.add(job, now)
        return job

    def decide(self, now: float = 0.0) -> list[Choice]:
        made = []
        for choice in self.scheduler.decide(now):
            ref = TaskRef(choice.job.task_id, 1)
            self.fleet.assign(choice.gpu, ref, choice.job.seq, now)
            self.shares.started(choice.job, now)
            self.where[choice.job.seq] = (choice.gpu.id, ref)
            made.append(choice)
        return made

    def end(self, seq: int, now: float) -> None:
        gpu, ref = self.where.pop(seq)
        self.fleet.release(gpu, ref, now)
        self.shares.stopped(seq, now)
        self.ledger.drop(seq)

    def run(self, now: float, seconds: float) -> Choice:
        """One decision on one GPU, carried out to its end."""
        [choice] = self.decide(now)
        self.end(choice.job.seq, now + seconds)
        return choice


def test_a_user_at_the_limit_waits_while_others_go() -> None:
    site = Site(3, limits="[users.alice]\nmax_running = 1\n")
    first, second = site.add(), site.add()
    bobs = site.add("bob")
    choices = site.decide()
    assert [choice.job for choice in choices] == [first, bobs]
    assert choices[1].reason == (
        f"{second.task_id} would be first, but the user has 1 running jobs (users.alice.max_running is 1)"
    )
    assert site.scheduler.why(second, 0.0) == (False, "the user has 1 running jobs (users.alice.max_running is 1)")
    site.end(first.seq, 5.0)
    assert [choice.job for choice in site.decide(5.0)] == [second]


def test_promised_gpu_seconds_are_bounded() -> None:
    site = Site(4, limits="[defaults]\nmax_gpu_seconds = 100\n")
    for _ in range(4):
        site.add(timeout=60)
    assert len(site.decide()) == 2  # the second is begun below the limit, and no third


def test_a_paused_queue_gives_nothing_out_until_it_goes_on() -> None:
    site = Site(2)
    slow, quick = site.add(queue="bulk", priority=50), site.add()
    site.scheduler.paused.add("bulk")
    assert [choice.job for choice in site.decide()] == [quick]
    assert "paused" in site.scheduler.why(slow, 0.0)[1]
    site.scheduler.paused.clear()
    assert [choice.job for choice in site.decide()] == [slow]


def test_among_equals_the_one_who_used_less_goes_first_and_the_reason_says_so() -> None:
    site = Site(order=Order(half_life=3600))
    for _ in range(3):
        site.add("alice")
    bobs = site.add("bob")
    assert site.run(0, 100).job.user == "alice"
    choice = site.run(100, 10)
    assert choice.job is bobs
    assert "alice has used 100 GPU seconds and bob 0" in choice.reason
    assert site.run(110, 1).reason == ""


def test_users_take_turns_with_jobs_that_take_no_time() -> None:
    site = Site(order=Order(half_life=3600))
    for _ in range(6):
        site.add("alice")
    for _ in range(6):
        site.add("bob")
    users = [site.run(float(step), 0).job.user for step in range(12)]
    assert users.count("alice") == users.count("bob") == 6
    assert abs(users[:6].count("alice") - 3) <= 1


def test_many_gpus_at_once_are_divided_fairly() -> None:
    site = Site(6, order=Order(half_life=3600))
    for user in ("alice", "alice", "alice", "alice", "alice", "alice", "bob", "bob", "carol", "carol"):
        site.add(user)
    users = [choice.job.user for choice in site.decide()]
    assert sorted(users) == ["alice", "alice", "bob", "bob", "carol", "carol"]


def test_fairness_does_not_overrule_priority() -> None:
    site = Site(order=Order(half_life=3600))
    site.add("alice")
    site.run(0, 10_000)
    urgent = site.add("alice", 10_000, priority=1)
    site.add("bob", 10_000)
    assert site.run(10_000, 1).job is urgent


def test_use_fades() -> None:
    shares = Shares(half_life=100)
    ledger = Ledger()
    job = ledger.submitted(1, "alice", JobSpec(cmd=["true"]), b"{}", 0.0)
    assert job is not None
    shares.started(job, 0.0)
    assert shares.usage("alice", 50.0) == 50
    shares.stopped(1, 100.0)
    shares.stopped(1, 500.0)
    assert shares.usage("alice", 100.0) == 100
    assert shares.usage("alice", 200.0) == 50
    assert shares.running("alice") == 0


def test_with_aging_a_job_that_has_waited_long_enough_passes_a_higher_priority() -> None:
    site = Site(order=Order(aging=2))  # an hour is worth two points
    site.add("alice", 0.0)
    old = site.add("alice", 0.0)
    site.run(0.0, 1)
    new = site.add("bob", 3600.0 * 3, priority=5)
    newer = site.add("bob", 3600.0 * 3, priority=7)
    first, second = site.run(3600.0 * 3, 1), site.run(3600.0 * 3 + 1, 1)
    assert (first.job, second.job) == (newer, old)
    assert "has waited" in second.reason
    assert site.run(3600.0 * 3 + 2, 1).job is new


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3)), min_size=1, max_size=30),
    st.sampled_from([Order(), Order(half_life=100), Order(aging=1), Order(aging=1, half_life=100)]),
)
def test_strict_order_or_a_reason(jobs: list[tuple[str, int]], order: Order) -> None:
    site = Site(order=order)
    for at, (user, priority) in enumerate(jobs):
        site.add(user, float(at), priority=priority)
    now = float(len(jobs))
    while site.ledger.jobs:
        strict = min(site.ledger.jobs.values(), key=lambda job: (-job.priority, job.seq))
        choice = site.run(now, 3)
        assert (choice.job is strict) == (choice.reason == "")
        assert order != Order() or choice.job is strict
        now += 3


def test_aging_says_why_also_among_the_jobs_of_one_user() -> None:
    site = Site(order=Order(aging=2))
    old = site.add(now=0.0)
    urgent = site.add(now=3600.0 * 3, priority=5)
    choice = site.run(3600.0 * 3, 1)
    assert choice.job is old
    assert choice.reason == f"{urgent.task_id} would be first by priority, but this one has waited 10800 s"
    assert site.run(3600.0 * 3 + 1, 1).reason == ""


def test_a_reason_names_age_where_age_decides_and_use_where_it_does_not() -> None:
    site = Site(order=Order(aging=2, half_life=10**9))
    site.add("bob")
    site.run(0.0, 100)
    site.add("alice", 1000.0)
    site.add("bob", 3600.0 * 4, priority=5)
    assert "has waited" in site.run(3600.0 * 4, 1).reason, "alice's job is before bob's whatever he has used"
    assert site.run(3600.0 * 5, 1).reason == ""
    site.add("bob", 20_000.0)
    site.add("alice", 20_001.0)
    assert "bob has used 101 GPU seconds and alice 1" in site.run(20_001.0, 1).reason


def test_each_cause_is_named() -> None:
    site = Site(3, order=Order(aging=2), limits="[users.bob]\nmax_running = 1\n")
    site.add("bob", priority=9)
    site.add("alice", priority=9)
    barred = site.add("bob", 3600.0 * 3, priority=9)
    old, urgent = site.add("alice", 0.0), site.add("alice", 3600.0 * 3, priority=5)
    last = site.decide(3600.0 * 3)[-1]
    assert last.job is old
    assert last.reason == (
        f"{barred.task_id} would be first, but the user has 1 running jobs (users.bob.max_running is 1); "
        f"{urgent.task_id} would be first by priority, but this one has waited 10800 s"
    )


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=25),
    st.sampled_from([Order(), Order(half_life=9000), Order(aging=1), Order(aging=1, half_life=9000)]),
    st.sampled_from(["", "[users.a]\nmax_running = 1\n"]),
    st.integers(1, 3),
)
def test_every_inversion_is_explained(jobs: list[tuple[str, int, int]], order: Order, limits: str, gpus: int) -> None:
    """By the first in strict order of those who may not start, and by the first of those who may."""
    site = Site(gpus, order=order, limits=limits)
    waiting: dict[str, Job] = {}
    now = 0.0
    for user, priority, hours in jobs:
        now += 3600.0 * hours
        job = site.add(user, now, priority=priority)
        waiting[job.task_id] = job
    while waiting:
        now += 600.0
        for choice in site.scheduler.decide(now):
            del waiting[choice.job.task_id]
            mine = (-choice.job.priority, choice.job.seq)
            passed = sorted((-job.priority, job.seq, job.task_id) for job in waiting.values())
            passed = [one for one in passed if one[:2] < mine]
            barred = [one[2] for one in passed if site.shares.bar(waiting[one[2]].user)]
            free = [one[2] for one in passed if one[2] not in barred]
            named = re.findall(r"(\S+) would be first", choice.reason)
            assert set(named) == {*barred[:1], *free[:1]}
            for other in (waiting[name] for name in free[:1]):
                if "has waited" in choice.reason:
                    assert choice.job.submitted <= other.submitted
                    assert choice.job.priority < other.priority
                else:
                    assert site.shares.usage(choice.job.user, now) < site.shares.usage(other.user, now)
                    assert choice.job.user != other.user
            ref = TaskRef(choice.job.task_id, 1)
            site.fleet.assign(choice.gpu, ref, choice.job.seq, now)
            site.shares.started(choice.job, now)
            site.where[choice.job.seq] = (choice.gpu.id, ref)
        site.end(next(iter(site.where)), now + 300.0)


@pytest.mark.parametrize("aging", [0.0, 2.0])
def test_the_order_of_one_users_jobs_is_not_touched_by_fairness(aging: float) -> None:
    site = Site(order=Order(aging=aging, half_life=60))
    for priority in (0, 2, 1, 2):
        site.add(priority=priority)
    assert [site.run(float(step), 10).job.seq for step in range(4)] == [2, 4, 3, 1]
