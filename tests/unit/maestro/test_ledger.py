# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conductor that replays the streams knows what the one before it knew, wherever that one was cut off."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.bus import messages
from organism.bus.jetstream import Stored
from organism.bus.messages import JobSpec, Journal, Result, RunOrder
from organism.core import _bus
from organism.maestro import janitor, takeover
from organism.maestro.clock import stamp
from organism.maestro.ledger import FINAL, SCHEDULED, Conflict, Job, Lasting, Ledger, RunRecord
from organism.maestro.takeover import Inheritance

MAX_PAYLOAD = 1_000_000


class Server:
    """Two streams, the commits of one conductor to them, and the ledger that it keeps."""

    def __init__(self) -> None:
        self.queue: list[Stored] = []
        self.results: list[Stored] = []
        self.seq = 0
        self.result_seq = 0
        self.now = 1_800_000_000.0
        self.ledger = Ledger()
        self.pending: list[int] = []
        self.upto = 0
        self.recorded = 0
        self.answered: set[str] = set()

    def _write(self, subject: str, payload: bytes) -> Stored:
        self.seq += 1
        self.now += 0.25
        stored = Stored(self.seq, subject, payload, {}, self.now)
        self.queue.append(stored)
        return stored

    # ---- what may happen; each returns without effect when it is not possible ----------------------------------------

    def submit(self, number: int) -> None:
        """Ids repeat, sometimes with another content."""
        task_id = f"job-{number % 7}"
        if task_id in self.answered:
            return  # the conductor looks into ORG_RESULTS before it admits: not the ledger's part
        spec = JobSpec(task_id=task_id, cmd=["true"], priority=number % 2)
        stored = self._write(_bus.enqueue_subject("alice"), messages.encode(spec))
        try:
            job = self.ledger.submitted(stored.seq, "alice", spec, stored.data, stored.time)
        except Conflict:
            job = None
        if job is None:
            self.pending.append(stored.seq)

    def _pick(self, number: int, phase: str) -> Job | None:
        jobs = [job for job in self.ledger.jobs.values() if job.phase == phase]
        return jobs[number % len(jobs)] if jobs else None

    def dispatch(self, number: int) -> None:
        job = self._pick(number, "waiting")
        if job is None:
            return
        order = RunOrder(
            ts=stamp(self.now),
            task_id=job.task_id,
            attempt=job.attempt + 1,
            gpu=f"gpu{number % 3}",
            incarnation=f"i{number % 2}",
            user=job.user,
            timeout=1,
            spec=JobSpec(cmd=["true"]),
            enq_seq=job.seq,
        )
        stored = self._write(_bus.run_subject(order.gpu), messages.encode(order))
        self.ledger.dispatched(messages.decode(stored.data, RunRecord), stored.seq, self.now)

    def retry(self, number: int) -> None:
        job = self._pick(number, "assigned")
        if job is None:
            return
        kind = number % 4
        journal = Journal(
            ts=stamp(self.now),
            kind="retry",
            enq_seq=job.seq,
            task_id=job.task_id,
            attempt=job.attempt,
            lost=kind == 0,
            gpu=job.gpu,
            err=("lost", "exit", "shutdown", "cache_full")[kind],
            not_before=stamp(self.now + 5) if kind == 1 else "",
        )
        stored = self._write(_bus.journal_subject(), messages.encode(journal))
        self.ledger.retried(journal, stored.seq, self.now)

    def finish(self, number: int) -> None:
        job = self._pick(number, "assigned") or self._pick(number, "waiting")
        if job is None:
            return
        result = Result(
            ts=stamp(self.now),
            task_id=job.task_id,
            ok=True,
            state="done",
            user=job.user,
            data={},
            enq_seq=job.seq,
            digest=job.digest,
        )
        self.result_seq += 1
        self.results.append(
            Stored(self.result_seq, _bus.result_subject(job.task_id), messages.encode(result), {}, self.now)
        )
        self.answered.add(job.task_id)
        self.ledger.drop(job.seq)
        self.pending.append(job.seq)

    def retire(self, number: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(janitor, "RECORD", 1 + number % 5)
            batch, self.upto = janitor.next_record(self.pending, self.result_seq, self.upto)
        if not batch:
            return
        journal = Journal(ts=stamp(self.now), kind="retire", retired=batch, results_upto=self.upto)
        self.recorded = self._write(_bus.journal_subject(), messages.encode(journal)).seq
        del self.pending[: len(batch)]

    def purge(self, _number: int) -> None:
        upto = janitor.prefix_end(self.seq, self.recorded, self.ledger.first_needed(), self.seq, unread=False)
        self.queue = [stored for stored in self.queue if stored.seq >= upto]

    def delete(self, number: int) -> None:
        """Single messages of finished jobs."""
        finished = [
            stored
            for stored in self.queue
            if stored.subject.startswith("gpu.task.enqueue")
            and stored.seq not in self.ledger.jobs
            and stored.seq not in self.pending
        ]
        if finished:
            self.queue.remove(finished[number % len(finished)])

    # ---- the successor -----------------------------------------------------------------------------------------------

    def replayed(self) -> Inheritance:
        left = Inheritance(Ledger())
        for stored in self.queue:
            takeover.apply(left, stored, _bus.DEFAULT_SHARD, MAX_PAYLOAD)
        if left.ledger.jobs:
            for stored in self.results:
                if stored.seq > left.ledger.results_upto:
                    takeover.apply_result(left, stored)
        # what a conductor asks ORG_RESULTS about each unfinished id before it begins
        stored = {stored.subject: messages.decode(stored.data, Result) for stored in self.results}
        for job in list(left.ledger.jobs.values()):
            if takeover.known(job, stored.get(_bus.result_subject(job.task_id))) is not None:
                left.ledger.drop(job.seq)
        return left


def essence(ledger: Ledger) -> dict[int, tuple[Any, ...]]:
    return {
        seq: (
            job.task_id, job.phase, job.attempt, job.tries, job.lost, job.gpu, job.incarnation, job.on_disk,
            job.excluded, job.digest, round(job.not_before, 2), [event.n for event in job.lasting()],
        )
        for seq, job in ledger.jobs.items()
    }  # fmt: skip


OPERATIONS = (
    "submit",
    "submit",
    "submit",
    "dispatch",
    "dispatch",
    "retry",
    "finish",
    "finish",
    "retire",
    "purge",
    "delete",
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1000)), max_size=60))
def test_a_replay_knows_what_the_predecessor_knew(history: list[tuple[str, int]]) -> None:
    server = Server()
    for operation, number in history:
        getattr(server, operation)(number)
        left = server.replayed()
        assert essence(left.ledger) == essence(server.ledger), operation
        assert left.ledger.buried <= server.ledger.buried
        for job in server.ledger.jobs.values():
            if job.lost and job.phase == "waiting" and job.err == "lost":
                assert (job.gpu, job.incarnation) in left.ledger.buried


def test_the_first_attempt_that_finds_the_cache_full_costs_nothing_and_the_next_ones_work_on_disk() -> None:
    server = Server()
    server.submit(0)
    (job,) = server.ledger.jobs.values()
    for tries, excluded in ((0, None), (1, "gpu0")):
        server.dispatch(0)
        server.retry(3)
        assert (job.on_disk, job.tries, job.excluded, job.lost) == (True, tries, excluded, 0)


def submitted(ledger: Ledger, seq: int = 1, **spec: Any) -> Job:
    job = ledger.submitted(seq, "alice", JobSpec(**{"task_id": "a", "cmd": ["true"], **spec}), b"{}", 1000.0)
    assert job is not None
    return job


def test_the_same_submission_is_known_and_another_content_is_refused() -> None:
    ledger = Ledger()
    submitted(ledger)
    assert ledger.submitted(2, "alice", JobSpec(task_id="a", cmd=["true"]), b" {}", 1001.0) is None
    with pytest.raises(Conflict, match="choose another id"):
        ledger.submitted(3, "alice", JobSpec(task_id="a", cmd=["false"]), b"{}", 1002.0)
    with pytest.raises(Conflict):  # ids are unique among all users
        ledger.submitted(4, "bob", JobSpec(task_id="a", cmd=["true"]), b"{}", 1003.0)


def test_an_id_is_made_of_the_stream_when_none_is_given() -> None:
    assert submitted(Ledger(), seq=77, task_id=None).task_id == "task-1000000-77"


def test_defaults_are_filled_in_and_zero_retries_mean_zero() -> None:
    ledger = Ledger()
    assert (submitted(ledger).timeout, ledger.by_id["a"].max_retries) == (3600.0, 2)
    other = submitted(Ledger(), max_retries=0, timeout=5.0)
    assert (other.timeout, other.max_retries) == (5.0, 0)


def test_large_submissions_are_not_kept() -> None:
    ledger = Ledger()
    job = ledger.submitted(1, "alice", JobSpec(cmd=["true"]), b"x" * 5000, 1.0)
    assert job is not None
    assert (job.raw, job.size, ledger.bytes) == (None, 5000, 5000)
    ledger.drop(1)
    assert ledger.bytes == 0


def test_an_order_or_retry_that_is_not_the_next_one_changes_nothing() -> None:
    ledger = Ledger()
    job = submitted(ledger)

    def order(attempt: int) -> RunRecord:
        return RunRecord(ts="", task_id="a", attempt=attempt, gpu="gpu0", incarnation="x", enq_seq=1)

    assert ledger.dispatched(order(2), 5, 1.0) is None
    assert ledger.dispatched(order(1), 6, 1.0) is job
    assert ledger.dispatched(order(1), 7, 1.0) is None
    stale = Journal(ts="", kind="retry", enq_seq=1, attempt=2, err="exit")
    assert ledger.retried(stale, 8, 1.0) is None
    assert ledger.retried(Journal(ts="", kind="retry", enq_seq=1, attempt=1, err="exit"), 9, 1.0) is job
    assert (job.tries, job.excluded, job.phase, job.records) == (1, "gpu0", "waiting", (6, 9))


def test_the_oldest_needed_message_is_the_oldest_unfinished_or_unrefused_submission() -> None:
    ledger = Ledger()
    for seq in (3, 5, 9):
        submitted(ledger, seq, task_id=f"job-{seq}")
    ledger.refuse(11)
    found = []
    for seq in (3, 9, 5, 11):
        found.append(ledger.first_needed())
        ledger.drop(seq)
    assert [*found, ledger.first_needed()] == [3, 5, 5, 11, None]


def test_histories_are_those_of_the_moment_in_which_they_were_asked_for() -> None:
    """Made later, they would tell of what the queue of events still has to tell, and in another order."""
    ledger = Ledger()
    jobs = [submitted(ledger, seq, task_id=f"job-{seq}") for seq in (1, 2, 3)]
    jobs[0].attempt = 1
    jobs[0].event(SCHEDULED, "scheduled", 1.0)
    known = [jobs[1].first_event()]
    histories = Lasting(ledger.jobs.values(), [known, []])
    jobs[0].event(FINAL, "done", 2.0)
    ledger.drop(2)
    assert len(histories) == 4
    assert [[event.n for event in history] for history in histories] == [[0, 8], [0], [0], [0]]
    assert [event.state for event in histories[0]] == ["enqueued", "scheduled"]
    assert [history[0].task_id for history in histories[1:3]] == ["job-2", "job-3"]
    assert histories[-1] is known
    assert [event.n for event in jobs[0].lasting()] == [0, 8, 12]
