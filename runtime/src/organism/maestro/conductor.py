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
from collections.abc import Hashable, Mapping

import msgspec

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.errors import BusError
from organism.bus.jetstream import JetStream
from organism.bus.messages import TaskRef
from organism.core import _bus
from organism.maestro import outcome
from organism.maestro.alarm import Alarm
from organism.maestro.clock import Clock, stamp
from organism.maestro.commit import Fenced, Outcome
from organism.maestro.dependencies import Ended, sort_out
from organism.maestro.endings import Endings, Then
from organism.maestro.intake import Standing
from organism.maestro.ledger import WAITING, Job, RunRecord
from organism.maestro.outcome import Final
from organism.maestro.scheduler import Choice
from organism.maestro.site import Site
from organism.maestro.slices import sliced
from organism.maestro.takeover import Fences, Inheritance
from organism.maestro.workers import Gang, Gpu, Order

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
    group: str
    timeout: float
    spec: msgspec.Raw
    enq_seq: int
    reason: str
    also: list[str]
    on_disk: bool


class Conductor(Endings):
    """:meth:`inherit` what a former one left, then :meth:`start`; :attr:`ended` is set when the term is over."""

    def __init__(
        self, nc: BusClient, js: JetStream, site: Site, clock: Clock, epoch: int, fences: Fences, left: Inheritance
    ) -> None:
        super().__init__(nc, js, site, clock, epoch, fences, left)
        self._timer = Alarm(clock, self._on_timer)
        self._expiry = Alarm(clock, self._on_expiry)
        self._overruns: list[tuple[float, int, int]] = []
        self._overrun = Alarm(clock, self._on_overrun)
        self._deadlines: list[tuple[float, int]] = []
        self._deadline = Alarm(clock, self._on_deadline)
        self._pump_asked = False

    async def inherit(self, left: Inheritance) -> None:
        """Take over what was left; call it before :meth:`start`, which sets the alarms."""
        now = self.clock.now()
        async for result, size in sliced(left.finished):
            self.archive.add(result, size, counted=False)
        async for job in sliced(self.ledger.jobs.values()):
            self._watch_deadline(job)
            if job.phase == "waiting":
                # of those that were never started and wait for others it is not known yet whether they may run
                # (organism.maestro.term)
                if job.attempt or not (job.after or job.unique):
                    self.scheduler.add(job, now)
                continue
            assert job.gpu is not None
            self.fleet.restore(job.gpu, job.incarnation, TaskRef(job.task_id, job.attempt), job.seq, now)
            self.shares.started(job, now)
            self._guard(job, now)
            self._hold(job, TaskRef(job.task_id, job.attempt), job.gpu, job.incarnation, now)
        for ref, (gpu_id, incarnation, others, until) in left.ledger.orphans.items():
            grace = self.site.settings.number("TIMEOUT_GRACE_SEC")
            self.fleet.hold(ref, Gang(gpu_id, incarnation, others, until + grace, orphan=True))
        async for seq in sliced(left.retire):
            self.janitor.retire(seq)

    def start(self) -> None:
        super().start()
        self._set_alarms()

    def _set_alarms(self) -> None:
        self._timer.at(self.scheduler.next_timer())
        self._expiry.at(self.fleet.next_expiry())
        self._overrun.at(self._overruns[0][0] if self._overruns else None)
        self._deadline.at(self._deadlines[0][0] if self._deadlines else None)

    async def stop(self, *, finish: bool) -> None:
        for alarm in (self._timer, self._expiry, self._overrun, self._deadline):
            alarm.stop()
        await super().stop(finish=finish)

    # ---- timers ------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """The lease had lapsed and is ours again: who was not heard meanwhile may have spoken in vain.

        It was we who had no processor or no connection. So every silence begins anew, as after a takeover, and who is
        late gets the time to say so.
        """
        now = self.clock.now()
        ttl = self.fleet.limits.heartbeat_ttl
        for gpu in self.fleet.gpus.values():
            gpu.expected_since = now
        self._overruns = [(max(when, now + ttl), seq, attempt) for when, seq, attempt in self._overruns]
        heapq.heapify(self._overruns)
        self._set_alarms()
        self.pump()

    def _on_timer(self) -> float | None:
        if not self.leads():
            return None  # see resume
        now = self.clock.now()
        if self.scheduler.wake(now):
            self.pump()
        whys: dict[Hashable, str] = {}
        for job in self.scheduler.overdue(now):
            kind = self.scheduler.kind(job)
            why = whys.get(kind)
            if why is None:
                _, why = self.scheduler.why(job, now)
                whys[kind] = why
            if not any(step.state == "waiting_gpu" and step.attempt == job.attempt for step in job.steps):
                self.feed.event(job.event(WAITING, "waiting_gpu", now, reason=why))
        return self.scheduler.next_timer()

    def _on_expiry(self) -> float | None:
        if not self.leads():
            return None
        now = self.clock.now()
        for gpu, lost in self.fleet.expire(now):
            ttl = self.fleet.limits.heartbeat_ttl
            self.complain("gpu_dead", f"GPU {gpu.id}: no heartbeat for {ttl:g} s", gpu=gpu.id)
            self.lose(gpu, lost, f"no heartbeat of {gpu.id} for {ttl:g} s")
        return self.fleet.next_expiry()

    def watch_expiry(self) -> None:
        self._expiry.at(self.fleet.next_expiry())

    def _hold(self, job: Job, ref: TaskRef, gpu_id: str, incarnation: str, now: float) -> None:
        """Reserve the further GPUs of a job that has several."""
        if job.also:
            until = now + job.timeout + self.site.settings.number("TIMEOUT_GRACE_SEC")
            self.fleet.hold(ref, Gang(gpu_id, incarnation, job.also, until))

    def _guard(self, job: Job, now: float) -> None:
        """Overrule a worker that does not end the attempt in time."""
        when = now + job.timeout + self.site.settings.number("TIMEOUT_GRACE_SEC")
        heapq.heappush(self._overruns, (when, job.seq, job.attempt))
        self._overrun.at(when)

    def _on_overrun(self) -> float | None:
        if not self.leads():
            return None
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

    def _watch_deadline(self, job: Job) -> None:
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.seq))
            self._deadline.at(job.deadline)

    def _on_deadline(self) -> float | None:
        if not self.leads():
            return None
        now = self.clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, seq = heapq.heappop(self._deadlines)
            job = self.ledger.jobs.get(seq)
            if job is not None and job.deadline is not None:
                why = f"not ended {job.deadline - job.submitted:g} s after its submission, its deadline"
                self.conclude(job, Final("failed", "deadline", why, self._bare(job)))
        return self._deadlines[0][0] if self._deadlines else None

    # ---- admission ---------------------------------------------------------------------------------------------------

    def admit(self, job: Job, ended: Mapping[str, Ended]) -> None:
        """Let a job that was never started wait for its turn: for others first, or not at all.

        ``ended``: of the jobs it is to run after, those that are not unfinished any more.
        """
        rival = self.ledger.rival(job)
        if rival is not None:
            why = f"job {rival.task_id} has the same unique key {job.unique} and is not finished"
            self.conclude(job, Final("cancelled", "unique", why, self._bare(job)))
            return
        needs, never = sort_out(job, self.ledger.by_id, ended, self._may_see)
        if never:
            self.conclude(job, Final("cancelled", "dependency", never, self._bare(job)))
        elif needs:
            self.dependencies.hold(job, needs)
        else:
            self.scheduler.add(job, self.clock.now())

    def newcomer(self, job: Job, ended: Mapping[str, Ended]) -> None:
        """A submission that became a job."""
        self.feed.event(job.first_event())
        self._watch_deadline(job)
        self.admit(job, ended)

    def standing(self, user: str, queued: int | None = None) -> Standing:
        """What a user may have and has."""
        count = self.ledger.by_user[user] if queued is None else queued
        return Standing(self.shares.limit(user), count, self.ledger.defaults.timeout)

    def _may_see(self, user: str, owner: str) -> bool:
        return user == owner or self.site.policy.is_operator(user)

    # ---- dispatch ----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Look for jobs to dispatch, once, after everything that has arrived by now is taken in."""
        if not self._pump_asked:
            self._pump_asked = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_asked = False
        now = self.clock.now()
        if self.ended.is_set() or now < self._paused_until or not self.leads():
            return
        for choice in self.scheduler.decide(now):
            job, gpu, _ = choice
            job.busy = "dispatch"
            ref = TaskRef(job.task_id, job.attempt + 1)
            self.fleet.assign(gpu, ref, job.seq, now, brief=job.type in messages.STARTS_NOTHING)
            self._hold(job, ref, gpu.id, gpu.incarnation, now)
            self.shares.started(job, now)
            if job.raw is not None:
                self._dispatch(choice, job.raw)
            else:
                self.spawn(self._fetch_and_dispatch(choice), f"dispatch of {job.task_id}")
        self._timer.at(self.scheduler.next_timer())

    async def _fetch_and_dispatch(self, choice: Choice) -> None:
        self._dispatch(choice, await self._raw(choice.job))

    def _dispatch(self, choice: Choice, raw: bytes) -> None:
        job, gpu, reason = choice
        attempt, incarnation, now = job.attempt + 1, gpu.incarnation, self.clock.now()
        ready = max(job.submitted, job.not_before)
        order = _Dispatch(
            ts=stamp(now),
            task_id=job.task_id,
            attempt=attempt,
            gpu=gpu.id,
            incarnation=incarnation,
            user=job.user,
            group=self.site.group_of(job.user),
            timeout=job.timeout,
            spec=msgspec.Raw(raw),
            enq_seq=job.seq,
            reason=reason,
            also=list(job.also),
            on_disk=job.on_disk,
        )
        data = messages.encode(order)

        def done(result: Outcome) -> None:
            self._dispatched(choice, TaskRef(job.task_id, attempt), incarnation, now, result, data)
            if isinstance(result, int):
                self.tally.dispatched(job, ready, now, self.clock.now())

        self.queue.put(_bus.run_subject(gpu.id), data, f"run:{job.seq}:{attempt}", done)

    def _dispatched(
        self, choice: Choice, ref: TaskRef, incarnation: str, now: float, result: Outcome, data: bytes
    ) -> None:
        job, gpu, reason = choice
        job.busy = ""
        if not isinstance(result, int):
            self.shares.stopped(job.seq, now)
            job.also = ()
            self.release(gpu.id, ref)
            if isinstance(result, Fenced):
                return
            self._trouble(result, f"run order of {job.task_id}")
            self.wait(job)
            self._then_after(job)
            return
        record = RunRecord(
            ts="",
            task_id=job.task_id,
            attempt=ref.attempt,
            gpu=gpu.id,
            incarnation=incarnation,
            enq_seq=job.seq,
            reason=reason,
            also=list(job.also),
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
                # the heartbeat of a quick worker of an earlier version came before the server's answer to the dispatch
                self.feed.event(job.running_event(self.clock.now()))
            elif gpu.hears:
                order.handed = order.since
                self.outbox.send(_bus.order_subject(gpu.id, self.epoch), data)
        self._then_after(job)

    async def hand_over_again(self, gpu: Gpu, order: Order) -> None:
        """The worker does not know of an order: it got lost with a connection, or with an earlier conductor."""
        job = self.ledger.jobs.get(order.seq)
        if job is None or job.attempt != order.ref.attempt or job.phase != "assigned":
            return
        try:
            stored = await self.js.get(_bus.STREAM_WQ, job.records[-1])
        except BusError as problem:
            log.info("job %s: its order cannot be read, the next heartbeat asks again: %s", job.task_id, problem)
            return
        if stored is not None and gpu.orders.get(order.ref) is order and self.leads():
            log.info("job %s: %s does not know of attempt %d: told again", job.task_id, gpu.id, job.attempt)
            self.outbox.send(_bus.order_subject(gpu.id, self.epoch), stored.data)

    # ---- cancel ------------------------------------------------------------------------------------------------------

    def cancel(self, job: Job, reason: str, then: Then) -> None:
        """On somebody's word."""
        self.stop_job(job, Final("cancelled", None, reason, self._bare(job)), then)
