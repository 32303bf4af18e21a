# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs on several GPUs: all or none, of one host, nobody starves, none is given away while it may be used."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from organism.bus import messages
from organism.bus.messages import Device, Heartbeat, HeartbeatReply, JobSpec, Journal, Metrics, TaskRef
from organism.maestro.ledger import Job, Ledger, RunRecord
from organism.maestro.scheduler import Scheduler
from organism.maestro.shares import Shares
from organism.maestro.workers import Fleet, Gang


class Stage:
    """A scheduler and a fleet whose decisions are carried out."""

    def __init__(self, hosts: dict[str, int], **device: Any) -> None:
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.scheduler = Scheduler(self.fleet)
        self.seq = itertools.count(1)
        self.now = 0.0
        self.started: list[tuple[str, list[str], str]] = []
        self.beats: dict[str, Heartbeat] = {}
        for host, count in hosts.items():
            for number in range(count):
                self.worker(f"{host}{number}", host, **device)

    def worker(self, name: str, host: str, *, spec: int = messages.SPEC_LEVEL, **device: Any) -> None:
        made = Device(
            **{"backend": "simulated", "address": f"sim:{name}", "vram_mb": 8192, "model": "RX 580", **device}
        )
        beat = Heartbeat(ts="", gpu_id=name, incarnation="i", host=host, pid=1, version="0", device=made, spec=spec)
        beat.types = ["cmd", "noop"]
        self.beats[name] = beat
        self.fleet.heartbeat(beat, self.now)

    def beat(self, name: str, **changes: Any) -> HeartbeatReply:
        for field, value in changes.items():
            setattr(self.beats[name], field, value)
        return self.fleet.heartbeat(self.beats[name], self.now).reply

    def add(self, **spec: Any) -> Job:
        job = self.ledger.submitted(next(self.seq), "alice", JobSpec(**{"cmd": ["true"], **spec}), b"{}", self.now)
        assert job is not None
        self.scheduler.add(job, self.now)
        return job

    def pump(self) -> list[list[str]]:
        """Starts what can be; the GPUs of each, in the order of the decisions."""
        made = []
        for job, gpu, reason in self.scheduler.decide(self.now):
            ref = TaskRef(job.task_id, job.attempt + 1)
            self.fleet.assign(gpu, ref, job.seq, self.now).committed = True
            if job.also:
                self.fleet.hold(ref, Gang(gpu.id, gpu.incarnation, job.also, self.now + job.timeout))
            self.started.append((job.task_id, [gpu.id, *job.also], reason))
            made.append([gpu.id, *job.also])
        return made

    def end(self, gpu: str) -> None:
        for ref in list(self.fleet.gpus[gpu].orders):
            self.fleet.reported(gpu, ref, self.now)
            self.fleet.settled(gpu, ref, stored=True)


def test_all_or_nothing_on_one_host() -> None:
    stage = Stage({"a": 2, "b": 3})
    stage.add(gpus=3)
    [gpus] = stage.pump()
    assert sorted(gpus) == ["b0", "b1", "b2"]
    stage.add(gpus=3)
    assert stage.pump() == []
    stage.add(gpus=2)
    assert [sorted(gpus) for gpus in stage.pump()] == [["a0", "a1"]]
    assert not stage.fleet.idle


def test_free_gpus_are_kept_so_that_small_jobs_do_not_go_first_for_ever() -> None:
    stage = Stage({"a": 3})
    stage.add()
    assert len(stage.pump()) == 1
    busy = stage.started[0][1][0]
    large = stage.add(gpus=3)
    small = stage.add()
    assert stage.pump() == []  # two are free, and kept
    blocked, why = stage.scheduler.why(large, 0.0)
    assert not blocked and why == "waits for 3 GPUs of one host at the same time; 2 are free on a"
    stage.end(busy)
    assert [sorted(gpus) for gpus in stage.pump()] == [["a0", "a1", "a2"]]
    stage.end(stage.started[1][1][0])
    assert len(stage.pump()) == 1
    assert stage.started[2][0] == small.task_id


def test_elsewhere_small_jobs_go_on_and_say_why() -> None:
    stage = Stage({"a": 2, "b": 1})
    stage.add(gpu="a0")
    stage.pump()
    large = stage.add(gpus=2)
    stage.add()
    assert stage.pump() == [["b0"]]  # a1 is kept, b0 can be no help
    assert stage.started[-1][2] == f"{large.task_id} would be first, but waits for 2 GPUs of one host at the same time"


def test_what_no_host_can_do_is_said_and_keeps_nothing() -> None:
    stage = Stage({"a": 2})
    impossible = stage.add(gpus=3)
    blocked, why = stage.scheduler.why(impossible, 0.0)
    assert blocked and why == "no host has 3 GPUs that suit (the most are 2 on a)"
    stage.add()
    assert len(stage.pump()) == 1


def test_each_of_them_has_to_suit() -> None:
    stage = Stage({"a": 2})
    stage.worker("a2", "a", vram_mb=24_576, model="RTX 3090")
    stage.worker("a3", "a", vram_mb=24_576, model="RTX 3090")
    stage.add(gpus=2, min_vram_mb=20_000)
    assert [sorted(gpus) for gpus in stage.pump()] == [["a2", "a3"]]
    stage.add(gpus=2, gpu_model="rx 580")
    assert [sorted(gpus) for gpus in stage.pump()] == [["a0", "a1"]]


def test_the_pinned_gpu_runs_it_and_others_help() -> None:
    stage = Stage({"a": 3})
    stage.add(gpus=2, gpu="a2")
    [gpus] = stage.pump()
    assert gpus[0] == "a2" and len(gpus) == 2
    again = stage.add(gpus=2, gpu="a2")
    assert stage.pump() == []
    assert stage.scheduler.why(again, 0.0) == (False, "waits for 2 GPUs of one host at the same time; 1 are free on a")


def test_a_model_is_part_of_its_name_in_any_case() -> None:
    stage = Stage({"a": 1})
    wanted = stage.add(gpu_model="rtx")
    assert stage.pump() == []
    assert stage.scheduler.why(wanted, 0.0) == (True, "no GPU is a rtx (there are: RX 580)")
    assert stage.scheduler.misfit(wanted, stage.fleet.gpus["a0"]) == "it is a RX 580, the job wants rtx"
    stage.worker("a1", "a", model="NVIDIA GeForce RTX 3060")
    assert stage.pump() == [["a1"]]


def test_a_worker_of_an_earlier_version_gets_nothing_that_it_cannot_read() -> None:
    stage = Stage({})
    stage.worker("old", "a", spec=0)
    plain, new = stage.add(), stage.add(gpu_model="RX")
    assert stage.pump() == [["old"]]
    assert stage.started[0][0] == plain.task_id
    stage.end("old")
    assert stage.pump() == []
    assert "upgrade the workers" in stage.scheduler.why(new, 0.0)[1]


def test_jobs_go_where_their_inputs_are_but_do_not_wait_for_it() -> None:
    stage = Stage({"a": 3})

    def warm(name: str, *paths: str) -> None:
        stage.fleet.measured(Metrics(ts="", gpu_id=name, backend="s", temp_c=60, warm=list(paths)), stage.now)

    warm("a0")
    warm("a1", "models", "models/llama")
    warm("a2", "models", "models/llama", "data/c4")
    inputs = ["models/llama", "data/c4/"]
    for expected in ("a2", "a1", "a0"):
        stage.add(inputs=inputs)
        assert stage.pump() == [[expected]]


# ---- when it ends ----------------------------------------------------------------------------------------------------


def gang(stage: Stage) -> TaskRef:
    job = stage.add(gpus=3)
    [gpus] = stage.pump()
    assert gpus == ["a0", "a1", "a2"]
    return TaskRef(job.task_id, 1)


def test_all_are_free_when_its_report_has_come() -> None:
    stage = Stage({"a": 3})
    gang(stage)
    stage.end("a0")
    assert set(stage.fleet.idle) == {"a0", "a1", "a2"}
    assert not stage.fleet.gangs


def test_after_a_cancel_they_are_busy_until_the_worker_lists_it_no_more() -> None:
    stage = Stage({"a": 3})
    ref = gang(stage)
    stage.beat("a0", running=[ref])
    stage.fleet.release("a0", ref, stage.now, stop=True)
    assert stage.beat("a0").revoked == [ref]
    assert not stage.fleet.idle
    stage.beat("a0", running=[])
    assert set(stage.fleet.idle) == {"a0", "a1", "a2"}


def test_a_dead_worker_keeps_them_until_it_speaks_anew() -> None:
    stage = Stage({"a": 3})
    ref = gang(stage)
    stage.now = 20.0
    stage.beat("a1")
    stage.beat("a2")
    [(dead, lost)] = stage.fleet.expire(stage.now)
    assert (dead.id, [order.ref for order in lost]) == ("a0", [ref])
    assert not stage.fleet.idle  # its processes may be alive
    assert stage.beat("a0").reset
    assert not stage.fleet.idle
    stage.beat("a0", incarnation="j", running=[ref])  # it still stops them, and takes nothing else before
    assert set(stage.fleet.idle) == {"a0"}
    stage.beat("a0", running=[])
    assert set(stage.fleet.idle) == {"a0", "a1", "a2"}


def test_a_worker_that_never_returns_keeps_them_until_the_time_limit() -> None:
    stage = Stage({"a": 3})
    gang(stage)
    stage.now = 20.0
    for name in ("a1", "a2"):
        stage.beat(name)
    stage.fleet.expire(stage.now)
    stage.now = 3599.0
    stage.beat("a1")
    assert not stage.fleet.idle
    stage.now = 3601.0
    stage.beat("a2")
    assert {"a1", "a2"} <= set(stage.fleet.idle)


def test_a_successor_knows_who_has_what() -> None:
    ledger = Ledger()
    job = ledger.submitted(1, "alice", JobSpec(cmd=["true"], gpus=2, task_id="t"), b"{}", 0.0)
    assert job is not None and job.gpus == 2
    record = RunRecord(ts="", task_id="t", attempt=1, gpu="a0", incarnation="i", enq_seq=1, also=["a1"])
    ledger.dispatched(record, 2, 10.0)
    assert job.also == ("a1",)
    ledger.retried(Journal(ts="", kind="retry", enq_seq=1, task_id="t", attempt=1, lost=True, err="lost"), 3, 20.0)
    assert job.also == ()
    assert ledger.orphans == {TaskRef("t", 1): ("a0", "i", ("a1",), 20.0 + job.timeout)}


def test_several_gpus_count_as_several() -> None:
    ledger, shares = Ledger(), Shares(half_life=0.0)
    job = ledger.submitted(1, "alice", JobSpec(cmd=["true"], gpus=4), b"{}", 0.0)
    assert job is not None
    shares.started(job, 0.0)
    assert shares.usage("alice", 10.0) == 40.0
    assert shares.stopped(1, 10.0) == 10.0
    assert shares.usage("alice", 10.0) == 40.0
    assert shares.running("alice") == 0


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(-2, 2)), min_size=1, max_size=25),
    st.lists(st.integers(0, 30), max_size=60),
)
def test_no_gpu_is_given_twice_and_every_job_gets_its_turn(jobs: list[tuple[int, int]], ends: list[int]) -> None:
    stage = Stage({"a": 4, "b": 2})
    wanted = {stage.add(gpus=count, priority=priority).task_id: count for count, priority in jobs}
    running: list[list[str]] = []
    for end in itertools.chain(ends, itertools.repeat(0)):
        running += stage.pump()
        names = [name for gpus in running for name in gpus]
        assert len(names) == len(set(names))
        for gpus in running:
            assert len({stage.fleet.gpus[name].host for name in gpus}) == 1
        if not running:
            break
        stage.end(running.pop(end % len(running))[0])
    assert {task_id: len(gpus) for task_id, gpus, _ in stage.started} == wanted
    assert set(stage.fleet.idle) == set(stage.fleet.gpus)
