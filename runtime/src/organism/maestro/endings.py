# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How attempts and jobs end: every decision is committed first and takes effect when the server has confirmed it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from organism.bus import messages
from organism.bus.errors import BusError, StreamFull, SubjectFull, Unavailable
from organism.bus.messages import Control, Journal, Result, StateEvent, TaskRef
from organism.core import _bus
from organism.maestro import outcome
from organism.maestro.clock import stamp
from organism.maestro.commit import Fenced, Outcome
from organism.maestro.intake import Submission, letter
from organism.maestro.leading import Leading
from organism.maestro.ledger import FINAL, Job
from organism.maestro.outcome import Again, Final
from organism.maestro.workers import Gpu, Order

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


class Endings(Leading):
    """The end of attempts and of jobs."""

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
            self.lose(self.fleet.gpus.get(gpu_id) or Gpu(gpu_id), [order], "its end could not be stored before")

    def _bare(self, job: Job) -> dict[str, Any]:
        return {"task_id": job.task_id, "gpu_id": job.gpu, "type": job.type}

    def _with_data(self, job: Job, decision: Final | Again) -> Final | Again:
        if isinstance(decision, Final) and not decision.data:
            return Final(decision.state, decision.error, decision.reason, self._bare(job))
        return decision

    def settle(self, job: Job, decision: Final | Again, then: Then) -> None:
        """Commit what becomes of a job that nothing else is being decided about.

        One that waits for other jobs stays held meanwhile: the commit may fail.
        """
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
                self.tally.held(job, self.shares.stopped(job.seq, now))
                self.tally.retries.counts[decision.err] += 1
                self.feed.event(job.steps[-1])
                self.scheduler.add(job, self.clock.now())
                self.pump()
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
        dead = letter(submission, reason, self.clock.stamp(), self.nc.max_payload, self.site.shard)
        data = messages.encode(dead)
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
            group=self.site.group_of(job.user),
            data=final.data,
            error=final.error,
            reason=final.reason,
            attempts=job.attempt,
            submitted=stamp(job.submitted),
            labels=job.labels,
            history=job.history(),
            enq_seq=job.seq,
            digest=job.digest,
            shard=self.site.shard,
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
                job.steps = tuple(step for step in job.steps if step is not event)
                job.enter(*before)
                self._trouble(stored, f"result of {job.task_id}")
                self.wait(job)
                then("not stored")
            self._then_after(job)

        self.results.put(_bus.result_subject(job.task_id), data, f"result:{job.seq}", done)

    def wait(self, job: Job) -> None:
        """Let a waiting job have its turn, unless other jobs have to end first."""
        if job.phase == "waiting" and not job.busy and job not in self.dependencies:
            self.scheduler.add(job, self.clock.now())

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
            self._gone(job)
            self.janitor.retire(job.seq, *job.records)
            # whoever waits for this id must not wait for ever: what is known of it is the earlier job's end
            self._let_go(job.task_id, stored[0].state if stored is not None else "dead")
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
        if job is not None:
            self._gone(job)
        self.janitor.retire(seq, *(job.records if job else ()))
        self.archive.add(result, size)
        self._let_go(result.task_id, result.state)
        if event is not None:
            self.feed.event(event)
        for watcher in self.watchers.pop(result.task_id, []):
            watcher.set()
        self._notify(result, size)

    def _gone(self, job: Job) -> None:
        """Nothing waits or counts any more for a job that has left the ledger."""
        self.dependencies.release(job)
        self.tally.held(job, self.shares.stopped(job.seq, self.clock.now()))
        if self.shares.limit(job.user).rules:
            self.pump()  # its user may have been at a limit

    def _let_go(self, task_id: str, state: str) -> None:
        """Those that waited for this job may run, or never can."""
        ready, never = self.dependencies.ended(task_id, state)
        for job in ready:
            if job.busy:
                self.when_settled(job, lambda job=job: self.wait_if_unfinished(job))  # type: ignore[misc]  # bound now
            else:
                self.wait(job)
        for job, why in never:
            self.conclude(job, Final("cancelled", "dependency", why, self._bare(job)))
        if ready:
            self.pump()

    def wait_if_unfinished(self, job: Job) -> None:
        if self.ledger.jobs.get(job.seq) is job and job not in self.scheduler:
            self.wait(job)
            self.pump()

    def conclude(self, job: Job, final: Final) -> None:
        """End a job by the conductor's own decision, and insist until that is stored."""

        def then(verdict: Stored) -> None:
            if verdict == "not stored" and not self.ended.is_set():
                asyncio.get_running_loop().call_later(AGAIN, self.conclude, job, final)

        self.stop_job(job, final, then)

    def stop_job(self, job: Job, final: Final, then: Then) -> None:
        """Final first, then the process is stopped; ``then("known")`` when the job ended by itself meanwhile."""
        if self.ledger.jobs.get(job.seq) is not job:
            then("known")
            return
        if job.busy:
            self.when_settled(job, lambda: self.stop_job(job, final, then))
            return
        ref, gpu_id = TaskRef(job.task_id, job.attempt), job.gpu if job.phase == "assigned" else None

        def settled(verdict: Stored) -> None:
            if verdict == "stored" and gpu_id is not None:
                self.release(gpu_id, ref, stop=True)
                self.spawn(self._stop_there(gpu_id, ref), f"stop of {job.task_id}")
            then(verdict)

        self.settle(job, final, settled)

    async def _stop_there(self, gpu_id: str, ref: TaskRef) -> None:
        """Tell the worker at once; the answers to its heartbeats say it again."""
        order = Control(op="cancel", task_id=ref.task_id, attempt=ref.attempt)
        try:
            await self.nc.ask(_bus.control_subject(gpu_id), messages.encode(order), timeout=5.0)
        except BusError as problem:
            log.info("job %s: the worker of %s hears of its end by heartbeat: %s", ref.task_id, gpu_id, problem)

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
            self._paused_until = max(self._paused_until, self.clock.now() + FULL_PAUSE)
            asyncio.get_running_loop().call_later(FULL_PAUSE + 0.01, self.pump)
            self.janitor.hurry()
        else:
            self.complain("write_refused", f"{what}: {problem}")

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

    def release(self, gpu_id: str, ref: TaskRef, *, stop: bool = False) -> None:
        """The attempt is no longer the GPU's."""
        if self.fleet.release(gpu_id, ref, self.clock.now(), stop=stop):
            self.pump()
