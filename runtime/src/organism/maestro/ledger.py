# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The unfinished jobs: a fold over the records of ORG_WQ and ORG_RESULTS, the same live and in a replay.

No clock, no I/O. Times are seconds since 1970 by the server's clock (:class:`organism.maestro.clock.Clock`). Live, each
record is applied when the server has confirmed it; a conductor that takes over applies the same records in the order
of the stream and arrives at the same set (tests/unit/maestro/test_ledger.py).
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import msgspec

from organism.bus import messages
from organism.bus.messages import After, JobSpec, Journal, Progress, StateEvent, TaskRef
from organism.maestro.clock import stamp

KEPT_SPEC = 4096
"""Bytes of a submission that are kept in memory; a larger one is fetched again when it is dispatched."""

NONE: dict[str, str] = {}
"""The labels of all jobs without any; nobody changes a job's labels."""
STEPS = 8
"""Positions in the history that an attempt may use: events of a replaying conductor get the numbers that those of its
predecessor had, whatever of the volatile ones (running, waiting_gpu) either of them saw."""
SCHEDULED, RUNNING, RETRY, WAITING, FINAL = 0, 1, 2, 3, 4

Phase = Literal["waiting", "assigned"]


class RunRecord(msgspec.Struct, kw_only=True):
    """What the ledger needs of a :class:`organism.bus.messages.RunOrder`; decoding one skips the specification."""

    ts: str
    task_id: str
    attempt: int
    gpu: str
    incarnation: str
    enq_seq: int
    reason: str = ""
    also: list[str] = []


@dataclass(frozen=True)
class Defaults:
    """What a submission gets that does not say (DEFAULT_TIMEOUT_SEC in seconds, MAX_RETRIES)."""

    timeout: float = 3600.0
    max_retries: int = 2


@dataclass(slots=True, eq=False)
class Job:
    """One unfinished job."""

    seq: int
    """Sequence of its submission in ORG_WQ: unique for ever, and the order of arrival."""
    task_id: str
    user: str
    submitted: float
    type: str
    requested_gpu: str | None
    min_vram_mb: int
    priority: int
    timeout: float
    max_retries: int
    labels: dict[str, str]
    command: str
    digest: str
    raw: bytes | None
    """The submission's JSON, or None when it is large."""
    size: int
    after: tuple[After, ...] = ()
    gpus: int = 1
    gpu_model: str | None = None
    inputs: tuple[str, ...] = ()
    level: int = 0
    """What a worker must know to read it (``messages.SPEC_LEVEL``)."""
    also: tuple[str, ...] = ()
    """The present attempt's GPUs beside ``gpu``."""
    queue: str = "default"
    unique: str | None = None
    deadline: float | None = None
    """When it has to have ended."""
    phase: Phase = "waiting"
    attempt: int = 0
    tries: int = 0
    lost: int = 0
    gpu: str | None = None
    """Where the present or last attempt went."""
    incarnation: str = ""
    on_disk: bool = False
    """An attempt found the cache in RAM full: the next ones work on disk."""
    excluded: str | None = None
    """Where it failed last: tried again there only when no other GPU would do."""
    not_before: float = 0.0
    err: str = ""
    reason: str = ""
    since: float = 0.0
    state: messages.State = "enqueued"
    steps: tuple[StateEvent, ...] = ()
    """Its history after `enqueued`."""
    records: tuple[int, ...] = ()
    """Sequences of its other records in ORG_WQ."""
    progress: Progress | None = None
    """Live only: what the present attempt said last."""
    states: Counter[messages.State] | None = None
    """Where the ledger counts its jobs by state."""
    busy: str = ""
    """Live only: the commit in flight (``dispatch``, ``outcome``); nothing else is decided about the job meanwhile."""

    def event(self, kind: int, state: messages.State, now: float, *, err: str = "", reason: str = "") -> StateEvent:
        """The next step of the history, remembered and returned for publication."""
        step = StateEvent(
            ts=stamp(now),
            task_id=self.task_id,
            n=STEPS * self.attempt + kind,
            state=state,
            user=self.user,
            gpu=self.gpu if kind != WAITING else self.requested_gpu,
            attempt=self.attempt,
            tries=self.tries,
            err=err or None,
            reason=reason or None,
        )
        self.steps = (*self.steps, step)
        self.enter(state, now, reason)
        return step

    def enter(self, state: messages.State, since: float, reason: str) -> None:
        """It is in this state now."""
        if self.states is not None:
            self.states[self.state] -= 1
            self.states[state] += 1
        self.state, self.since, self.reason = state, since, reason

    def running_event(self, now: float) -> StateEvent:
        return self.event(RUNNING, "running", now)

    def first_event(self) -> StateEvent:
        return StateEvent(ts=stamp(self.submitted), task_id=self.task_id, n=0, state="enqueued", user=self.user)

    def history(self) -> list[StateEvent]:
        return [self.first_event(), *self.steps]

    def lasting(self, steps: tuple[StateEvent, ...] | None = None) -> Iterator[StateEvent]:
        """The part of the history that a replay brings back: of that so far, or of what it was with ``steps``."""
        yield self.first_event()
        for step in self.steps if steps is None else steps:
            if step.n % STEPS in (SCHEDULED, RETRY, FINAL):
                yield step


class Lasting(Sequence[Sequence[StateEvent]]):
    """The lasting histories of many jobs as they are now, each made when it is looked at; behind them others.

    As they are now: what becomes of a job later is told by itself, in its order.
    """

    def __init__(self, jobs: Iterable[Job], more: Iterable[Sequence[StateEvent]] = ()) -> None:
        self._jobs = list(jobs)
        self._steps = [job.steps for job in self._jobs]
        self._more = [history for history in more if history]

    def __len__(self) -> int:
        return len(self._jobs) + len(self._more)

    @overload
    def __getitem__(self, at: int) -> Sequence[StateEvent]: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sequence[StateEvent]]: ...
    def __getitem__(self, at: int | slice) -> Sequence[StateEvent] | list[Sequence[StateEvent]]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        count = len(self._jobs)
        return list(self._jobs[at].lasting(self._steps[at])) if at < count else self._more[at - count]


def digest(user: str, spec: JobSpec) -> str:
    """Fingerprint of what was asked for, whatever the spelling of the JSON was."""
    return hashlib.blake2b(user.encode() + b"\0" + messages.encode(spec), digest_size=12).hexdigest()


def generated_id(submitted: float, seq: int) -> str:
    """The id of a submission without one: of what the stream says about it, so that any conductor finds the same."""
    return f"task-{int(submitted * 1000)}-{seq}"


def shown_command(spec: JobSpec) -> str:
    text = messages.shown_command(spec)
    return text if len(text) <= 200 else text[:199] + "…"


class Conflict(ValueError):
    """The id of an unfinished job, with another content."""


class Ledger:
    """All unfinished jobs, and which messages of ORG_WQ are still needed."""

    def __init__(self, defaults: Defaults | None = None) -> None:
        self.defaults = defaults or Defaults()
        self.jobs: dict[int, Job] = {}
        self.by_id: dict[str, Job] = {}
        self.by_key: dict[tuple[str, str], list[Job]] = {}
        """(user, `unique`) -> its unfinished jobs, in order of arrival."""
        self.by_user: Counter[str] = Counter()
        self.states: Counter[messages.State] = Counter()
        """How many are in each state."""
        self.refused: set[int] = set()
        """Submissions that will not become jobs, until that is written down."""
        self.bytes = 0
        """Of all unfinished submissions in the stream."""
        self.buried: set[tuple[str, str]] = set()
        """(GPU, incarnation) that lost an attempt: what they were told to run must never start."""
        self.orphans: dict[TaskRef, tuple[str, str, tuple[str, ...], float]] = {}
        """Lost attempts on several GPUs: (GPU, incarnation, the others, when its time limit has ended it)."""
        self.results_upto = 0
        """Results of ORG_RESULTS up to here are counted in by a retire record."""
        self._order: deque[int] = deque()

    # ---- records -----------------------------------------------------------------------------------------------------

    def submitted(self, seq: int, user: str, spec: JobSpec, raw: bytes, time: float) -> Job | None:
        """A submission that may run; None for one that is known already (same id, same content). Raises Conflict."""
        if seq in self.jobs:
            return None
        task_id = spec.task_id or generated_id(time, seq)
        fingerprint = digest(user, spec)
        known = self.by_id.get(task_id)
        if known is not None:
            if known.digest == fingerprint:
                return None
            raise Conflict(f"id {task_id} is that of an unfinished job with another content; choose another id")
        job = Job(
            seq=seq,
            task_id=task_id,
            user=user,
            submitted=time,
            type=spec.type,
            requested_gpu=spec.gpu,
            min_vram_mb=spec.min_vram_mb,
            priority=spec.priority,
            timeout=spec.timeout or self.defaults.timeout,
            max_retries=self.defaults.max_retries if spec.max_retries is None else spec.max_retries,
            labels=spec.labels or NONE,
            command=shown_command(spec),
            digest=fingerprint,
            raw=raw if len(raw) <= KEPT_SPEC else None,
            size=len(raw),
            after=tuple(spec.after),
            gpus=spec.gpus,
            gpu_model=spec.gpu_model,
            inputs=tuple(spec.inputs),
            level=messages.level_of(spec),
            queue=spec.queue,
            unique=spec.unique,
            deadline=time + spec.deadline if spec.deadline else None,
            not_before=time + spec.delay if spec.delay else 0.0,
            since=time,
            states=self.states,
        )
        self.jobs[seq] = job
        self.states[job.state] += 1
        self.by_id[task_id] = job
        self.by_user[user] += 1
        if job.unique is not None:
            self.by_key.setdefault((user, job.unique), []).append(job)
        self.bytes += job.size
        self._order.append(seq)
        return job

    def refuse(self, seq: int) -> None:
        """A submission that ends without having been a job; it is needed until its end is written (``drop``)."""
        self.refused.add(seq)
        self._order.append(seq)

    def dispatched(self, order: RunRecord, seq: int, time: float) -> Job | None:
        """A run order is in the stream."""
        job = self.jobs.get(order.enq_seq)
        if job is None or order.attempt != job.attempt + 1:
            return None
        job.records += (seq,)
        job.attempt, job.gpu, job.incarnation = order.attempt, order.gpu, order.incarnation
        job.phase, job.not_before, job.progress, job.also = "assigned", 0.0, None, tuple(order.also)
        job.event(SCHEDULED, "scheduled", time, reason=order.reason)
        return job

    def retried(self, journal: Journal, seq: int, time: float) -> Job | None:
        """An attempt ended without a final state."""
        job = self.jobs.get(journal.enq_seq)
        if job is None or journal.attempt != job.attempt or job.phase != "assigned":
            return None
        job.records += (seq,)
        if journal.lost:
            job.lost += 1
            if job.gpu is not None:
                self.buried.add((job.gpu, job.incarnation))
            if job.gpu is not None and job.also:
                ref = TaskRef(job.task_id, job.attempt)
                self.orphans[ref] = (job.gpu, job.incarnation, job.also, time + job.timeout)
        free = journal.err == "shutdown" or (journal.err == "cache_full" and not job.on_disk)
        if not journal.lost and not free:
            job.tries += 1
        job.on_disk = job.on_disk or journal.err == "cache_full"
        job.phase, job.also = "waiting", ()
        job.err = journal.err
        job.excluded = None if free else job.gpu
        job.not_before = messages.seconds_since_epoch(journal.not_before) if journal.not_before else 0.0
        job.event(RETRY, "retry", time, err=journal.err)
        return job

    def drop(self, seq: int) -> Job | None:
        """A submission is final (its result is stored), or was refused: nothing of it is needed any more."""
        self.refused.discard(seq)
        job = self.jobs.pop(seq, None)
        if job is not None:
            del self.by_id[job.task_id]
            self.states[job.state] -= 1
            job.states = None
            self.bytes -= job.size
            self.by_user[job.user] -= 1
            if not self.by_user[job.user]:
                del self.by_user[job.user]
            if job.unique is not None:
                same = self.by_key[job.user, job.unique]
                same.remove(job)
                if not same:
                    del self.by_key[job.user, job.unique]
        return job

    def retired(self, journal: Journal) -> None:
        """A retire record, in a replay."""
        self.results_upto = max(self.results_upto, journal.results_upto)
        for seq in journal.retired:
            self.drop(seq)

    # ---- questions ---------------------------------------------------------------------------------------------------

    def first_needed(self) -> int | None:
        """The oldest submission that is not final, or None."""
        order = self._order
        while order and order[0] not in self.jobs and order[0] not in self.refused:
            order.popleft()
        return order[0] if order else None

    def rival(self, job: Job) -> Job | None:
        """The unfinished job that has had this one's ``unique`` key for longer, or None."""
        first = self.by_key[job.user, job.unique][0] if job.unique is not None else job
        return None if first is job else first

    def waiting(self) -> Iterable[Job]:
        return (job for job in self.jobs.values() if job.phase == "waiting")

    def assigned(self) -> Iterable[Job]:
        return (job for job in self.jobs.values() if job.phase == "assigned")

    def __len__(self) -> int:
        return len(self.jobs)
