# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who goes next, and where."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from organism.bus.messages import STARTS_NOTHING, Device, Heartbeat, JobSpec, Metrics, TaskRef
from organism.maestro.ledger import Job, Ledger
from organism.maestro.scheduler import Scheduler
from organism.maestro.workers import AHEAD, Fleet


def grow(fleet: Fleet, **gpus: int) -> Fleet:
    """Add GPUs, by name with their MiB of memory."""
    for name, vram in gpus.items():
        device = Device(backend="simulated", address=f"sim:{name}", vram_mb=vram)
        beat = Heartbeat(ts="", gpu_id=name, incarnation="i", host="rig", pid=1, version="0", device=device)
        beat.types = ["cmd", "noop"]
        fleet.heartbeat(beat, 0.0)
    return fleet


def fleet_of(**gpus: int) -> Fleet:
    return grow(Fleet(), **gpus)


class Queue:
    """A scheduler whose decisions are carried out."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ledger = Ledger()
        self.scheduler = Scheduler(fleet)
        self.seq = 0

    def add(self, now: float = 0.0, **spec: Any) -> Job:
        self.seq += 1
        job = self.ledger.submitted(self.seq, "alice", JobSpec(**{"cmd": ["true"], **spec}), b"{}", now)
        assert job is not None
        self.scheduler.add(job, now)
        return job

    def decide(self, now: float = 0.0) -> list[tuple[int, str]]:
        made = []
        for job, gpu, _ in self.scheduler.decide(now):
            self.fleet.assign(gpu, TaskRef(job.task_id, 1), job.seq, now, brief=job.type in STARTS_NOTHING)
            made.append((job.seq, gpu.id))
        return made

    def free(self, gpu: str, now: float = 0.0) -> None:
        for ref in list(self.fleet.gpus[gpu].orders):
            self.fleet.release(gpu, ref, now)


def test_priority_then_arrival() -> None:
    queue = Queue(fleet_of(g=0))
    for priority in (0, 5, 0, 5, -1):
        queue.add(priority=priority)
    order = []
    for _ in range(5):
        order += [seq for seq, _ in queue.decide()]
        queue.free("g")
    assert order == [2, 4, 1, 3, 5]


def test_one_job_a_gpu_and_the_fittest_first() -> None:
    fleet = fleet_of(a=0, b=0, c=0)
    for name, busy, temp in (("a", 50.0, 40.0), ("b", 0.0, 40.0), ("c", 0.0, 70.0)):
        fleet.measured(Metrics(ts="", gpu_id=name, backend="x", gpu_busy_percent=busy, temp_c=temp), 0.0)
    queue = Queue(fleet)
    for _ in range(4):
        queue.add()
    assert queue.decide() == [(1, "b"), (2, "c"), (3, "a")]
    assert queue.decide() == []


def test_equals_take_turns() -> None:
    queue = Queue(fleet_of(a=0, b=0))
    used = []
    for _ in range(4):
        queue.add()
        [(_, gpu)] = queue.decide()
        used.append(gpu)
        queue.free(gpu)
    assert used == ["a", "b", "a", "b"]


def test_a_pinned_job_waits_for_its_gpu_and_holds_up_nobody() -> None:
    queue = Queue(fleet_of(a=0))
    pinned = queue.add(gpu="z", priority=100)
    queue.add()
    assert queue.decide() == [(2, "a")]
    assert queue.scheduler.why(pinned, 0.0) == (True, "waits for GPU z: it is unknown")


def test_a_pin_does_not_get_past_heat_or_drain() -> None:
    """S1k-D05."""
    fleet = fleet_of(a=0)
    fleet.measured(Metrics(ts="", gpu_id="a", backend="x", temp_c=90.0), 0.0)
    queue = Queue(fleet)
    pinned = queue.add(gpu="a")
    assert queue.decide() == []
    assert "too hot" in queue.scheduler.why(pinned, 0.0)[1]
    fleet.measured(Metrics(ts="", gpu_id="a", backend="x", temp_c=50.0), 1.0)
    fleet.gpus["a"].drained = True
    assert queue.decide(1.0) == []
    fleet.gpus["a"].drained = False
    assert queue.decide(1.0) == [(1, "a")]


def test_memory_classes_are_exact_also_for_sizes_learned_later() -> None:
    fleet = fleet_of(small=4000, large=16000)
    queue = Queue(fleet)
    queue.add(min_vram_mb=4001)
    queue.add(min_vram_mb=4000)
    third = queue.add(min_vram_mb=20000)
    assert queue.decide() == [(1, "large"), (2, "small")]
    assert "no GPU has 20000 MiB" in queue.scheduler.why(third, 0.0)[1]
    grow(fleet, huge=24000)
    assert queue.decide() == [(3, "huge")]


def test_a_line_that_no_cut_goes_through_stays_as_it_is() -> None:
    """However many wait in it: a hundred thousand jobs without a wish need not be sorted anew."""
    fleet = fleet_of(small=4000)
    fleet.gpus["small"].drained = True
    queue = Queue(fleet)
    plain, wishing = queue.add(), queue.add(min_vram_mb=20_000)
    other = queue.add(min_vram_mb=9000)
    assert queue.decide() == []
    ready = queue.scheduler._ready
    line, cut = ready[plain.seq][1], ready[wishing.seq][1]
    assert ready[other.seq][1] is cut, "no GPU is known that tells them apart"
    grow(fleet, large=16000)
    assert queue.decide() == [(plain.seq, "large")]
    assert line.key.size == 0
    assert ready[other.seq][1].key.size == 1 and ready[wishing.seq][1].key.size == 2
    grow(fleet, huge=24000)
    assert queue.decide() == [(wishing.seq, "huge")]
    assert queue.scheduler._lines[None][ready[other.seq][1].key] is ready[other.seq][1]


def test_a_type_needs_a_worker_that_offers_it() -> None:
    queue = Queue(fleet_of(a=0))
    job = queue.add(type="embed", cmd=None)
    assert queue.decide() == []
    assert queue.scheduler.why(job, 0.0) == (True, "no worker offers jobs of type embed")


def test_the_gpu_where_it_failed_is_the_last_resort() -> None:
    """S1k-D04: another one is waited for while it is only busy; there is no other: it is tried there again."""
    queue = Queue(fleet_of(a=0, b=0))
    queue.add()
    assert queue.decide() == [(1, "a")]
    blocker = queue.add()
    assert queue.decide() == [(2, "b")]
    queue.free("a")
    failed = queue.ledger.jobs[1]
    failed.excluded = "a"
    queue.scheduler.add(failed, 0.0)
    assert queue.decide() == []
    queue.free("b")
    assert queue.decide() == [(1, "b")]
    queue.free("b")
    queue.scheduler.add(failed, 0.0)
    queue.fleet.gpus["b"].drained = True
    assert queue.decide() == [(1, "a")]
    assert blocker.seq == 2


def test_delayed_jobs_wait_for_their_time() -> None:
    queue = Queue(fleet_of(a=0))
    queue.add(delay=10)
    assert queue.decide(5.0) == []
    assert queue.scheduler.next_timer() == 10.0
    assert not queue.scheduler.wake(9.9)
    assert queue.scheduler.wake(10.0)
    assert queue.decide(10.0) == [(1, "a")]


def test_a_removed_job_is_never_handed_out() -> None:
    queue = Queue(fleet_of(a=0))
    jobs = [queue.add() for _ in range(3)]
    delayed = queue.add(delay=1)
    assert queue.scheduler.remove(jobs[0])
    assert queue.scheduler.remove(delayed)
    assert not queue.scheduler.remove(delayed)
    assert queue.decide() == [(2, "a")]
    assert queue.scheduler.next_timer() is not None
    queue.scheduler.wake(100.0)
    assert len(queue.scheduler) == 1


def test_waiting_is_announced_once_a_wait() -> None:
    queue = Queue(fleet_of())
    job = queue.add()
    assert queue.scheduler.overdue(4.9) == []
    assert queue.scheduler.overdue(5.0) == [job]
    assert queue.scheduler.overdue(50.0) == []


SPECS = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(-2, 2),
        "gpu": st.sampled_from(["a", "b", "c", "z"]),
        "min_vram_mb": st.sampled_from([0, 1, 4000, 8000, 9000]),
        "type": st.sampled_from(["cmd", "noop", "embed"]),
    },
)


HAPPENS = ("free a", "free b", "free c", "remove", "grow d", "grow e")
LATER = {"d": 6000, "e": 8500}
"""Memory sizes of GPUs that are heard of late: they cut the lines of those who wait."""


@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(SPECS, st.sampled_from([*HAPPENS])), max_size=40))
def test_decisions_are_those_of_a_plain_search(history: list[Any]) -> None:
    """Against the obvious rule: the first job in order that any idle GPU suits."""
    fleet = fleet_of(a=4000, b=8000, c=0)
    queue = Queue(fleet)
    waiting: dict[int, Job] = {}

    def suits(job: Job, gpu: str) -> bool:
        size = fleet.gpus[gpu].vram_mb
        return job.requested_gpu in (None, gpu) and job.type != "embed" and job.min_vram_mb <= size

    for event in history:
        if isinstance(event, dict):
            spec = dict(event)
            if spec.get("type", "cmd") != "cmd":
                spec["cmd"] = None
            job = queue.add(**spec)
            waiting[job.seq] = job
        elif event == "remove":
            if waiting:
                queue.scheduler.remove(waiting.pop(max(waiting)))
        elif event.startswith("grow"):
            name = event.split()[1]
            grow(fleet, **{name: LATER[name]})
        else:
            queue.free(event.split()[1])
        while True:
            idle = [name for name, gpu in fleet.gpus.items() if not gpu.busy]
            order = sorted(waiting.values(), key=lambda job: (-job.priority, job.seq))
            expected = next((job.seq for job in order if any(suits(job, gpu) for gpu in idle)), None)
            first = next(queue.scheduler.decide(0.0), None)
            assert (first[0].seq if first else None) == expected
            if first is None:
                break
            job, gpu, _ = first
            assert suits(job, gpu.id)
            fleet.assign(gpu, TaskRef(job.task_id, 1), job.seq, 0.0)
            del waiting[job.seq]
        assert len(queue.scheduler) == len(waiting)


def test_who_goes_before_whom_is_counted_among_rivals_only() -> None:
    queue = Queue(fleet_of(a=8192, b=16384))
    rival = queue.add(priority=5)
    queue.add(priority=5, min_vram_mb=99_999)  # wants no GPU that the others want
    queue.add(priority=5, gpu="b", queue="held")
    queue.scheduler.paused.add("held")
    mine = queue.add(min_vram_mb=10_000)
    later = queue.add()
    assert asyncio.run(queue.scheduler.ahead(mine)) == [rival]
    assert asyncio.run(queue.scheduler.ahead(rival)) == []
    assert asyncio.run(queue.scheduler.ahead(later)) == [rival, mine]


def test_why_a_gpu_does_not_suit_is_said_per_gpu() -> None:
    queue = Queue(fleet_of(a=8192, b=16384))
    gpus = queue.fleet.gpus
    assert queue.scheduler.misfit(queue.add(min_vram_mb=10_000), gpus["a"]) == (
        "it has 8192 MiB of memory, the job wants 10000"
    )
    assert queue.scheduler.misfit(queue.add(gpu="a"), gpus["b"]) == "the job wants a"
    assert queue.scheduler.misfit(queue.add(type="noop"), gpus["b"]) == ""


def test_jobs_that_start_nothing_go_several_to_a_gpu_in_their_order() -> None:
    queue = Queue(fleet_of(a=0, b=0))
    for _ in range(3 * AHEAD):
        queue.add(cmd=None, type="noop")
    taken = queue.decide()
    assert [seq for seq, _ in taken] == list(range(1, 2 * AHEAD + 1))
    assert [len(gpu.orders) for gpu in queue.fleet.gpus.values()] == [AHEAD, AHEAD]
    assert taken[:4] == [(1, "a"), (2, "b"), (3, "a"), (4, "b")], "by turns, not one GPU first"
    assert queue.decide() == []
    queue.fleet.reported("b", TaskRef("task-0-2", 1), 0.0)
    assert queue.decide() == [(2 * AHEAD + 1, "b")]


def test_nobody_is_passed_over_by_jobs_that_start_nothing() -> None:
    queue = Queue(fleet_of(a=0))
    first = [queue.add(cmd=None, type="noop") for _ in range(3)]
    queue.add()
    queue.add(cmd=None, type="noop")
    assert queue.decide() == [(1, "a"), (2, "a"), (3, "a")], "until the turn of another kind"
    for job in first[:-1]:
        queue.fleet.reported("a", TaskRef(job.task_id, 1), 0.0)
        assert queue.decide() == []
    queue.fleet.reported("a", TaskRef(first[-1].task_id, 1), 0.0)
    assert queue.decide() == [(4, "a")], "which has the GPU for itself"
    queue.free("a")
    assert queue.decide() == [(5, "a")]


def test_what_starts_nothing_goes_beside_nothing_that_does() -> None:
    queue = Queue(fleet_of(a=0))
    queue.add()
    queue.add(cmd=None, type="noop")
    assert queue.decide() == [(1, "a")]
    assert queue.decide() == []
