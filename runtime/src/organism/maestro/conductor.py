# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One term of leadership: what becomes of each job. Decisions are plain code between two awaits; each one is committed
first (:mod:`organism.maestro.commit`) and takes effect, here and for everybody else, when the server has confirmed it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.errors import BusError, StreamFull, SubjectFull, Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.messages import Control, Journal, Result, StateEvent, TaskRef
from organism.core import _bus
from organism.core._keyvalue import Settings
from organism.core._maestro_settings import worker_lease
from organism.core._policy import Policy
from organism.maestro import outcome
from organism.maestro.alarm import Alarm
from organism.maestro.archive import Archive
from organism.maestro.clock import Clock, stamp
from organism.maestro.commit import Fenced, Outcome, Writer
from organism.maestro.intake import Submission, letter
from organism.maestro.janitor import Janitor
from organism.maestro.ledger import FINAL, WAITING, Job, RunRecord
from organism.maestro.outbox import Outbox
from organism.maestro.outcome import Again, Final, Rules
from organism.maestro.projections import Projections
from organism.maestro.scheduler import Scheduler
from organism.maestro.takeover import Fences, Inheritance
from organism.maestro.workers import Fleet, Gpu, Limits, Order

log = logging.getLogger(__name__)

Stored = Literal["stored", "known", "not stored"]
"""Of a decision: written now, found written before, or to be asked for again."""
Then = Callable[[Stored], None]

FULL_PAUSE = 5.0
"""Seconds without dispatches after a stream turned out to be full."""
NOTIFY_LIMIT = 256 * 1024
"""Bytes; a larger result is announced without its output."""
AGAIN = 2.0
"""Seconds before a decision of the conductor's own is tried again that could not be stored."""


@dataclass(frozen=True)
class Site:
    """What this conductor was told."""

    settings: Settings
    policy: Policy
    name: str
    shard: str
    version: str

    @property
    def limits(self) -> Limits:
        settings = self.settings
        return Limits(
            heartbeat_ttl=settings.number("HEARTBEAT_TTL_SEC"),
            metrics_ttl=settings.number("METRICS_TTL_SEC"),
            lease=worker_lease(settings),
            max_temp=settings.number("MAX_TEMP_C"),
            max_busy=settings.number("MAX_BUSY_PERCENT"),
        )

    @property
    def rules(self) -> Rules:
        return Rules(self.settings.number("RETRY_BACKOFF_SEC"), self.settings.integer("MAX_LOST"))


class _Dispatch(msgspec.Struct, kw_only=True):
    """A :class:`organism.bus.messages.RunOrder` around a submission that need not be decoded again."""

    v: int = messages.VERSION
    ts: str
    task_id: str
    attempt: int
    gpu: str
    incarnation: str
    user: str
    timeout: float
    spec: msgspec.Raw
    enq_seq: int


class Conductor:
    """Construct it with what was inherited, then :meth:`start`; :attr:`ended` is set when the term is over."""

    def __init__(
        self, nc: BusClient, js: JetStream, site: Site, clock: Clock, epoch: int, fences: Fences, left: Inheritance
    ) -> None:
        self.nc, self.js, self.site, self.clock, self.epoch = nc, js, site, clock, epoch
        self.ended = asyncio.Event()
        self.why_ended = ""
        self.since = clock.now()
        self.ledger = left.ledger
        self.fleet = Fleet(site.limits, epoch)
        self.fleet.buried |= left.ledger.buried
        self.scheduler = Scheduler(self.fleet, announce_after=site.settings.number("WAIT_GPU_SEC"))
        self.archive = Archive()
        self.outbox = Outbox(nc)
        self.feed = Projections(js, self.complain)
        self.queue = Writer(js, _bus.STREAM_WQ, fence=fences.queue, on_fenced=self.end)
        self.results = Writer(js, _bus.STREAM_RESULTS, fence=fences.results, on_fenced=self.end)
        self.results.settled = fences.results[0]
        self.dead = Writer(js, _bus.STREAM_DLQ, fence=None, on_fenced=self.end)
        self.janitor = Janitor(self)
        self.watchers: dict[str, list[asyncio.Event]] = {}
        """Task id -> who waits for its result."""
        self.rules = site.rules
        self._timer = Alarm(clock, self._on_timer)
        self._expiry = Alarm(clock, self._on_expiry)
        self._overruns: list[tuple[float, int, int]] = []
        self._overrun = Alarm(clock, self._on_overrun)
        self._paused_until = 0.0
        self._pump_asked = False
        self._after: dict[int, list[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._inherit(left)

    def _inherit(self, left: Inheritance) -> None:
        now = self.clock.now()
        for result, size in left.finished:
            self.archive.add(result, size, counted=False)
        for job in self.ledger.assigned():
            assert job.gpu is not None
            self.fleet.restore(job.gpu, job.incarnation, TaskRef(job.task_id, job.attempt), job.seq, now)
            self._guard(job, now)
        for job in self.ledger.waiting():
            self.scheduler.add(job, now)
        for seq in left.retire:
            self.janitor.retire(seq)
        self._histories = [list(job.lasting()) for job in self.ledger.jobs.values()]
        self._histories += [result.history for result, _ in left.finished if result.history]

    # ---- the term ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        for part in (self.queue, self.results, self.dead, self.outbox, self.janitor):
            part.start()
        self.feed.start(self._histories)
        self._timer.at(self.scheduler.next_timer())
        self._expiry.at(self.fleet.next_expiry())
        self._overrun.at(self._overruns[0][0] if self._overruns else None)

    def end(self, why: str) -> None:
        """Lead no longer, from this moment."""
        if not self.ended.is_set():
            log.warning("leading shard %s ends: %s", self.site.shard, why)
            self.why_ended = why
            self.ended.set()

    async def stop(self, *, finish: bool) -> None:
        """End the term; with ``finish`` write first what is on its way."""
        if finish and not self.ended.is_set():
            await self.janitor.flush()
            for part in (self.queue, self.results, self.dead, self.feed, self.outbox):
                await part.drain()
        self.end("stopped")
        for alarm in (self._timer, self._expiry, self._overrun):
            alarm.stop()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        for writer in (self.queue, self.results, self.dead):
            await writer.close()
        await self.feed.stop()
        await self.outbox.drain() if self.nc.is_connected else None
        await self.outbox.stop()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run beside; an unexpected error ends the term, since nobody knows what was left undone."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, Fenced):
                log.error("%s failed", task.get_name(), exc_info=error)
            self.end(f"{task.get_name()}: {error}")

    def complain(self, event: str, text: str, **more: Any) -> None:
        """Say on ``maestro.state`` and in the log what an operator should know."""
        log.warning("%s: %s", event, text)
        body = {"ts": self.clock.stamp(), "event": event, "reason": text, "shard": self.site.shard, **more}
        self.outbox.send(_bus.MAESTRO_STATE, msgspec.json.encode(body))

    # ---- timers ------------------------------------------------------------------------------------------------------

    def _on_timer(self) -> float | None:
        now = self.clock.now()
        if self.scheduler.wake(now):
            self.pump()
        for job in self.scheduler.overdue(now):
            _, why = self.scheduler.why(job, now)
            if not any(step.state == "waiting_gpu" and step.attempt == job.attempt for step in job.steps):
                self.feed.event(job.event(WAITING, "waiting_gpu", now, reason=why))
        return self.scheduler.next_timer()

    def _on_expiry(self) -> float | None:
        now = self.clock.now()
        for gpu, lost in self.fleet.expire(now):
            ttl = self.fleet.limits.heartbeat_ttl
            self.complain("gpu_dead", f"GPU {gpu.id}: no heartbeat for {ttl:g} s", gpu=gpu.id)
            self.lose(gpu, lost, f"no heartbeat of {gpu.id} for {ttl:g} s")
        return self.fleet.next_expiry()

    def watch_expiry(self) -> None:
        self._expiry.at(self.fleet.next_expiry())

    def _guard(self, job: Job, now: float) -> None:
        """Overrule a worker that does not end the attempt in time."""
        when = now + job.timeout + self.site.settings.number("TIMEOUT_GRACE_SEC")
        heapq.heappush(self._overruns, (when, job.seq, job.attempt))
        self._overrun.at(when)

    def _on_overrun(self) -> float | None:
        now = self.clock.now()
        while self._overruns and self._overruns[0][0] <= now:
            _, seq, attempt = heapq.heappop(self._overruns)
            job = self.ledger.jobs.get(seq)
            if job is None or job.attempt != attempt or job.phase != "assigned" or job.gpu is None or job.busy:
                continue
            ref = TaskRef(job.task_id, attempt)
            if ref in self.fleet.gpu(job.gpu).unreported:
                heapq.heappush(self._overruns, (now + self.fleet.limits.heartbeat_ttl, seq, attempt))
                continue
            log.warning("job %s: its worker on %s did not end it in time", job.task_id, job.gpu)
            self.release(job.gpu, ref, stop=True)
            why = "not ended by its worker at its time limit"
            self.settle(job, outcome.of_failure(job, "timeout", why, self._bare(job), self.rules), self._own(job))
        return self._overruns[0][0] if self._overruns else None

    # ---- dispatch ----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Look for jobs to dispatch, once, after everything that has arrived by now is taken in."""
        if not self._pump_asked:
            self._pump_asked = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_asked = False
        now = self.clock.now()
        if self.ended.is_set() or now < self._paused_until:
            return
        for job, gpu in self.scheduler.decide(now):
            job.busy = "dispatch"
            self.fleet.assign(gpu, TaskRef(job.task_id, job.attempt + 1), job.seq, now)
            if job.raw is not None:
                self._dispatch(job, gpu, job.raw)
            else:
                self.spawn(self._fetch_and_dispatch(job, gpu), f"dispatch of {job.task_id}")
        self._timer.at(self.scheduler.next_timer())

    async def _raw(self, job: Job) -> bytes:
        """The submission's payload; a large one is read from the stream. Raises Unavailable no more than ever."""
        while job.raw is None:
            try:
                stored = await self.js.get(_bus.STREAM_WQ, job.seq)
            except Unavailable as problem:
                log.info("job %s: %s; reading its submission again", job.task_id, problem)
                await asyncio.sleep(AGAIN)  # the server is there, its streams are not yet: there is no event for it
                continue
            if stored is None:
                raise BusError(f"job {job.task_id}: its submission {job.seq} is gone from {_bus.STREAM_WQ}")
            return stored.data
        return job.raw

    async def _fetch_and_dispatch(self, job: Job, gpu: Gpu) -> None:
        self._dispatch(job, gpu, await self._raw(job))

    def _dispatch(self, job: Job, gpu: Gpu, raw: bytes) -> None:
        attempt, incarnation, now = job.attempt + 1, gpu.incarnation, self.clock.now()
        order = _Dispatch(
            ts=stamp(now),
            task_id=job.task_id,
            attempt=attempt,
            gpu=gpu.id,
            incarnation=incarnation,
            user=job.user,
            timeout=job.timeout,
            spec=msgspec.Raw(raw),
            enq_seq=job.seq,
        )

        def done(result: Outcome) -> None:
            self._dispatched(job, gpu, TaskRef(job.task_id, attempt), incarnation, now, result)

        self.queue.put(_bus.run_subject(gpu.id), messages.encode(order), f"run:{job.seq}:{attempt}", done)

    def _dispatched(self, job: Job, gpu: Gpu, ref: TaskRef, incarnation: str, now: float, result: Outcome) -> None:
        job.busy = ""
        if not isinstance(result, int):
            self.release(gpu.id, ref)
            if isinstance(result, Fenced):
                return
            self._trouble(result, f"run order of {job.task_id}")
            self.scheduler.add(job, self.clock.now())
            self._then_after(job)
            return
        record = RunRecord(
            ts="", task_id=job.task_id, attempt=ref.attempt, gpu=gpu.id, incarnation=incarnation, enq_seq=job.seq
        )
        self.ledger.dispatched(record, result, now)
        self.feed.event(job.steps[-1])
        self._guard(job, self.clock.now())
        order = gpu.orders.get(ref)
        if order is not None:
            order.committed, order.since = True, self.clock.now()
            if gpu.incarnation != incarnation or not gpu.alive:
                del gpu.orders[ref]
                self.release(gpu.id, ref)
                self.lose(gpu, [order], f"the worker of {gpu.id} started anew or died while it was given the job")
            elif order.running:
                # the heartbeat of a quick worker came before the server's answer to the dispatch
                self.feed.event(job.running_event(self.clock.now()))
        self._then_after(job)

    def release(self, gpu_id: str, ref: TaskRef, *, stop: bool = False) -> None:
        """The attempt is no longer the GPU's."""
        if self.fleet.release(gpu_id, ref, self.clock.now(), stop=stop):
            self.pump()

    # ---- the end of an attempt ---------------------------------------------------------------------------------------

    def lose(self, gpu: Gpu, orders: list[Order], why: str) -> None:
        """These attempts ended with their worker."""
        for order in orders:
            job = self.ledger.jobs.get(order.seq)
            if job is None or job.attempt != order.ref.attempt or job.phase != "assigned" or job.busy:
                continue
            log.warning("job %s attempt %d on %s is lost: %s", job.task_id, job.attempt, gpu.id, why)
            self.settle(job, self._with_data(job, outcome.of_loss(job, why, self.rules)), self._own(job))

    def _own(self, job: Job) -> Then:
        """For decisions of the conductor itself: nobody will ask again, so it must."""

        def then(verdict: Stored) -> None:
            if verdict == "not stored" and not self.ended.is_set():
                asyncio.get_running_loop().call_later(AGAIN, self._lose_again, job, job.attempt)

        return then

    def _lose_again(self, job: Job, attempt: int) -> None:
        gpu_id = job.gpu
        if gpu_id is not None and not self.ended.is_set():
            order = Order(job.seq, TaskRef(job.task_id, attempt), 0.0)
            self.lose(self.fleet.gpu(gpu_id), [order], "its end could not be stored before")

    def _bare(self, job: Job) -> dict[str, Any]:
        return {"task_id": job.task_id, "gpu_id": job.gpu, "type": job.type}

    def _with_data(self, job: Job, decision: Final | Again) -> Final | Again:
        if isinstance(decision, Final) and not decision.data:
            return Final(decision.state, decision.error, decision.reason, self._bare(job))
        return decision

    def settle(self, job: Job, decision: Final | Again, then: Then) -> None:
        """Commit what becomes of a job that nothing else is being decided about."""
        self.scheduler.remove(job)
        job.busy = "outcome"
        if isinstance(decision, Again):
            self._retry(job, decision, then)
        elif decision.state == "dead":
            self.spawn(self._die(job, decision, then), f"end of {job.task_id}")
        else:
            self._finish(job, decision, then)

    def when_settled(self, job: Job, call: Callable[[], None]) -> None:
        """Call when the commit in flight for the job is known."""
        self._after.setdefault(job.seq, []).append(call)

    def _then_after(self, job: Job) -> None:
        for call in self._after.pop(job.seq, []):
            call()

    def _retry(self, job: Job, decision: Again, then: Then) -> None:
        now = self.clock.now()
        journal = Journal(
            ts=stamp(now),
            kind="retry",
            enq_seq=job.seq,
            task_id=job.task_id,
            attempt=job.attempt,
            lost=decision.lost,
            gpu=job.gpu,
            err=decision.err,
            not_before=stamp(now + decision.wait) if decision.wait else "",
        )

        def done(result: Outcome) -> None:
            job.busy = ""
            if isinstance(result, int):
                self.ledger.retried(journal, result, now)
                self.feed.event(job.steps[-1])
                self.scheduler.add(job, self.clock.now())
                self.pump()
                self._timer.at(self.scheduler.next_timer())
                then("stored")
            else:
                self._trouble(result, f"retry of {job.task_id}")
                then("not stored")
            self._then_after(job)

        subject = _bus.journal_subject(self.site.shard)
        self.queue.put(subject, messages.encode(journal), f"end:{job.seq}:{job.attempt}", done)

    async def _die(self, job: Job, final: Final, then: Then) -> None:
        """A job that could not be run leaves a dead letter, then its result."""
        submission = Submission(job.seq, job.submitted, job.user, job.task_id, await self._raw(job))
        await self.bury(submission, final.reason)
        self._finish(job, final, then)

    async def bury(self, submission: Submission, reason: str) -> None:
        """Store a dead letter; waits while ORG_DLQ is full."""
        data = messages.encode(letter(submission, reason, self.clock.stamp(), self.nc.max_payload))
        while True:
            try:
                await self.dead.write(_bus.dead_subject(submission.task_id), data, f"dead:{submission.seq}")
                return
            except StreamFull:
                self.complain("dead_full", f"{_bus.STREAM_DLQ} is full: raise its size; dead letters wait")
                await asyncio.sleep(FULL_PAUSE)  # nothing tells when there is room

    def _finish(self, job: Job, final: Final, then: Then) -> None:
        now = self.clock.now()
        before = (job.state, job.since, job.reason)
        event = job.event(FINAL, final.state, now, err=final.error or "", reason=final.reason)
        result = Result(
            ts=stamp(now),
            task_id=job.task_id,
            ok=final.state == "done",
            state=final.state,
            user=job.user,
            data=final.data,
            error=final.error,
            reason=final.reason,
            attempts=job.attempt,
            submitted=stamp(job.submitted),
            labels=job.labels,
            history=job.history(),
            enq_seq=job.seq,
            digest=job.digest,
        )
        data = self.fitted(result)

        def done(stored: Outcome) -> None:
            if isinstance(stored, SubjectFull):
                self.spawn(self._existing(job, event, then), f"result of {job.task_id}")
                return
            job.busy = ""
            if isinstance(stored, int):
                self.finished(job.seq, result, len(data), event)
                then("stored")
            else:
                job.steps.remove(event)
                job.state, job.since, job.reason = before
                self._trouble(stored, f"result of {job.task_id}")
                if job.phase == "waiting":
                    self.scheduler.add(job, self.clock.now())
                then("not stored")
            self._then_after(job)

        self.results.put(_bus.result_subject(job.task_id), data, f"result:{job.seq}", done)

    def fitted(self, result: Result) -> bytes:
        """The result's message, without the returned value when that makes it too large for the bus."""
        data = messages.encode(result)
        if len(data) > self.nc.max_payload - 4096:
            result.data.pop("value", None)
            result.data["message"] = f"the returned value was left out: the result had {len(data)} bytes"
            data = messages.encode(result)
        return data

    async def _existing(self, job: Job, event: StateEvent, then: Then) -> None:
        """The server has a result of this id: ours, stored before an answer got lost, or that of an earlier job."""
        stored = await self.stored_result(job.task_id)
        job.busy = ""
        if stored is not None and stored[0].enq_seq == job.seq:
            self.finished(job.seq, stored[0], stored[1], event)
            then("stored")
        else:
            log.warning("job %s (%d): its id was used by an earlier job; it leaves no result", job.task_id, job.seq)
            self.ledger.drop(job.seq)
            self.janitor.retire(job.seq, *job.records)
            then("known")
        self._then_after(job)

    async def stored_result(self, task_id: str) -> tuple[Result, int] | None:
        """A job's result and its size, from ORG_RESULTS; waits while the server is away."""
        while True:
            try:
                stored = await self.js.last(_bus.STREAM_RESULTS, _bus.result_subject(task_id))
                break
            except Unavailable as problem:
                if self.nc.is_closed:
                    raise
                log.info("result of %s: %s; asking again", task_id, problem)
                await asyncio.sleep(AGAIN)  # the server is there, its streams are not yet: there is no event for it
        if stored is None:
            return None
        return messages.decode(stored.data, Result), len(stored.data)

    def finished(self, seq: int, result: Result, size: int, event: StateEvent | None) -> None:
        """A result is stored: now it may be known."""
        job = self.ledger.drop(seq)
        self.janitor.retire(seq, *(job.records if job else ()))
        self.archive.add(result, size)
        if event is not None:
            self.feed.event(event)
        for watcher in self.watchers.pop(result.task_id, []):
            watcher.set()
        self._notify(result, size)

    def _notify(self, result: Result, size: int) -> None:
        if size > NOTIFY_LIMIT:
            kept = {key: value for key, value in result.data.items() if key not in ("stdout", "stderr", "value")}
            result = msgspec.structs.replace(result, data=kept)
        self.outbox.send(_bus.notify_subject(result.user, result.task_id), messages.encode(result))

    def _trouble(self, problem: BusError | Fenced, what: str) -> None:
        """A write was refused for good."""
        if isinstance(problem, Fenced):
            return
        if isinstance(problem, StreamFull):
            if self.clock.now() >= self._paused_until:
                self.complain("stream_full", f"{what}: {problem}; no job is started for {FULL_PAUSE:g} s")
            self._paused_until = self.clock.now() + FULL_PAUSE
            asyncio.get_running_loop().call_later(FULL_PAUSE + 0.01, self.pump)
            self.janitor.hurry()
        else:
            self.complain("write_refused", f"{what}: {problem}")

    # ---- cancel ------------------------------------------------------------------------------------------------------

    def cancel(self, job: Job, reason: str, then: Then) -> None:
        """Final first, then the process is stopped; ``then("known")`` when the job ended by itself meanwhile."""
        if self.ledger.jobs.get(job.seq) is not job:
            then("known")
            return
        if job.busy:
            self.when_settled(job, lambda: self.cancel(job, reason, then))
            return
        ref, gpu_id = TaskRef(job.task_id, job.attempt), job.gpu if job.phase == "assigned" else None

        def settled(verdict: Stored) -> None:
            if verdict == "stored" and gpu_id is not None:
                self.release(gpu_id, ref, stop=True)
                self.spawn(self._stop_there(gpu_id, ref), f"stop of {job.task_id}")
            then(verdict)

        self.settle(job, Final("cancelled", None, reason, self._bare(job)), settled)

    async def _stop_there(self, gpu_id: str, ref: TaskRef) -> None:
        """Tell the worker at once; the answers to its heartbeats say it again."""
        order = Control(op="cancel", task_id=ref.task_id, attempt=ref.attempt)
        try:
            await self.nc.ask(_bus.control_subject(gpu_id), messages.encode(order), timeout=5.0)
        except BusError as problem:
            log.info("job %s: the worker of %s hears of its end by heartbeat: %s", ref.task_id, gpu_id, problem)
