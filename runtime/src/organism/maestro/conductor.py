# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One term of leadership: which job goes where and when, and what time does to it.

Decisions are plain code between two awaits; each one is committed first (:mod:`organism.maestro.commit`) and takes
effect, here and for everybody else, when the server has confirmed it.
"""

from __future__ import annotations

import asyncio
import heapq
import logging

import msgspec

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.errors import BusError
from organism.bus.jetstream import JetStream
from organism.bus.messages import Control, TaskRef
from organism.core import _bus
from organism.maestro import outcome
from organism.maestro.alarm import Alarm
from organism.maestro.clock import Clock, stamp
from organism.maestro.commit import Fenced, Outcome
from organism.maestro.endings import Endings, Stored, Then
from organism.maestro.ledger import WAITING, Job, RunRecord
from organism.maestro.outcome import Final
from organism.maestro.site import Site
from organism.maestro.takeover import Fences, Inheritance
from organism.maestro.workers import Gpu

log = logging.getLogger(__name__)


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


class Conductor(Endings):
    """Construct it with what was inherited, then :meth:`start`; :attr:`ended` is set when the term is over."""

    def __init__(
        self, nc: BusClient, js: JetStream, site: Site, clock: Clock, epoch: int, fences: Fences, left: Inheritance
    ) -> None:
        super().__init__(nc, js, site, clock, epoch, fences, left)
        self._timer = Alarm(clock, self._on_timer)
        self._expiry = Alarm(clock, self._on_expiry)
        self._overruns: list[tuple[float, int, int]] = []
        self._overrun = Alarm(clock, self._on_overrun)
        self._pump_asked = False
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

    def start(self) -> None:
        super().start()
        self._timer.at(self.scheduler.next_timer())
        self._expiry.at(self.fleet.next_expiry())
        self._overrun.at(self._overruns[0][0] if self._overruns else None)

    async def stop(self, *, finish: bool) -> None:
        for alarm in (self._timer, self._expiry, self._overrun):
            alarm.stop()
        await super().stop(finish=finish)

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
