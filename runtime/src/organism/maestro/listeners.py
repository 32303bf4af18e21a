# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What reaches a leading conductor: submissions from the stream, workers' heartbeats, metrics and reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from organism.bus import messages
from organism.bus.errors import BusError, NotFound, SubjectFull, Unavailable
from organism.bus.jetstream import Stored
from organism.bus.lease import Lease
from organism.bus.messages import (
    After,
    BadMessage,
    Heartbeat,
    HeartbeatReply,
    Metrics,
    Report,
    ReportReply,
    Result,
    StateEvent,
    TaskRef,
)
from organism.bus.tail import StreamTail
from organism.core import _bus
from organism.maestro import intake, outcome
from organism.maestro.archive import outline
from organism.maestro.clock import stamp
from organism.maestro.commit import Fenced
from organism.maestro.conductor import Conductor
from organism.maestro.dependencies import Ended
from organism.maestro.endings import Stored as Verdict
from organism.maestro.intake import Submission
from organism.maestro.ledger import FINAL, Conflict, digest
from organism.maestro.lookup import last_many
from organism.maestro.slices import sliced
from organism.maestro.takeover import readable
from organism.maestro.wishes import Wishes

log = logging.getLogger(__name__)

REFUSALS = 64
"""Refusals that are written at the same time; the reading of submissions waits for them beyond that."""
RETRY = 0.5
FILL = 0.8
"""Share of ORG_WQ that unfinished submissions may use; the rest is for run orders and the journal."""

Respond = Callable[[ReportReply], None]


class Listeners:
    """Everything that comes in during one term."""

    def __init__(self, conductor: Conductor, lease: Lease) -> None:
        self.conductor = conductor
        self.lease = lease
        self.wishes = Wishes(conductor)
        self._refusing = asyncio.Semaphore(REFUSALS)
        self._subscriptions: list[Subscription] = []
        self._attended: dict[str, list[Subscription]] = {}
        """By GPU of this shard."""
        self._over = False
        self._room = 0

    async def start(self, after: int) -> None:
        """Listen; submissions are read from the one after sequence ``after`` on."""
        conductor, nc = self.conductor, self.conductor.nc
        info = await conductor.js.info(_bus.STREAM_WQ)
        self._room = int(max(0, int(info["config"].get("max_bytes", 0))) * FILL)
        conductor.janitor.taken_in = after
        await self.wishes.known(self._last)
        conductor.spawn(self._submissions(after + 1), "intake")
        self.wishes.follow()
        for gpu_id in list(conductor.fleet.gpus):
            await self._attend(gpu_id)
        for subject, handler in (("gpu.worker.heartbeat.*", self._heartbeat), ("gpu.worker.up.*", self._up)):
            self._subscriptions.append(await nc.listen(subject, self._guarded(handler)))

    async def stop(self) -> None:
        self._over = True
        for subscriptions in (self._subscriptions, *self._attended.values()):
            await self._leave(subscriptions)

    async def _leave(self, subscriptions: Iterable[Subscription]) -> None:
        if not self.conductor.nc.is_closed:
            for subscription in subscriptions:
                await subscription.unsubscribe()

    async def _attend(self, gpu_id: str) -> None:
        """Hear what the worker of a GPU of this shard reports; those of other shards cost this conductor nothing.

        A report that comes before finds nobody, and its worker sends it again.
        """
        if gpu_id in self._attended:
            return
        heard = self._attended[gpu_id] = []
        for subject, handler in (
            (_bus.metrics_subject(gpu_id), self._metrics),
            (_bus.done_subject(gpu_id), self._report),
            (_bus.err_subject(gpu_id), self._report),
        ):
            heard.append(await self.conductor.nc.listen(subject, self._guarded(handler)))
        if self._over or self._attended.get(gpu_id) is not heard:
            await self._leave(heard)  # the term ended, or the GPU went, while the server was told

    def leading(self) -> bool:
        """A conductor that was frozen must not speak before it has looked at its lease."""
        return self.lease.valid() and not self.conductor.ended.is_set()

    def _guarded(self, handler: Callable[[Msg], None]) -> Callable[[Msg], Awaitable[None]]:
        async def guarded(message: Msg) -> None:
            try:
                handler(message)
            except BadMessage as problem:
                self.conductor.complain("bad_message", f"{message.subject}: {problem}")
            except Exception as problem:
                log.exception("a message on %s", message.subject)
                self.conductor.end(f"a message on {message.subject}: {problem}")
                raise

        return guarded

    # ---- submissions -------------------------------------------------------------------------------------------------

    async def _submissions(self, start: int) -> None:
        conductor = self.conductor
        subject = f"gpu.task.enqueue.*.{conductor.site.shard}"
        tail = StreamTail(conductor.js, _bus.STREAM_WQ, start_seq=start, filter_subjects=[subject])
        try:
            async for batch in tail:
                if batch:
                    await self._take_in(batch)
        finally:
            await tail.close()

    async def _take_in(self, batch: list[Stored]) -> None:
        conductor = self.conductor
        submissions = [intake.read(message, conductor.nc.max_payload) async for message in sliced(batch)]
        asked = [one.task_id for one in submissions if one.spec is not None]
        needed = [need.task_id for one in submissions if one.spec is not None for need in one.spec.after]
        known = await self.known_results(
            [task_id for task_id in dict.fromkeys(asked + needed) if task_id not in conductor.ledger.by_id]
        )
        async for submission in sliced(submissions):
            await self._admit(submission, known)
            conductor.janitor.taken_in = submission.seq
        conductor.pump()

    async def known_results(self, task_ids: list[str]) -> dict[str, Result]:
        """The results that some ids have already."""
        subjects = {_bus.result_subject(task_id): task_id for task_id in task_ids}
        found = await self._last(_bus.STREAM_RESULTS, subjects)
        return {subjects[key]: result for key, one in found.items() if (result := readable(one)) is not None}

    async def _last(self, stream: str, subjects: Collection[str]) -> dict[str, Stored]:
        """The last messages of these; asks until the stream answers."""
        while subjects:
            try:
                return await last_many(self.conductor.js, stream, subjects)
            except Unavailable as problem:
                log.info("%s: %s; asking again", stream, problem)
                await asyncio.sleep(RETRY)  # the server is there, its streams are not yet: there is no event for it
        return {}

    def ended(self, needs: Iterable[After], known: Mapping[str, Result]) -> dict[str, Ended]:
        """Of jobs that others are to run after: how those ended that have."""
        recent = self.conductor.archive.recent
        found: dict[str, Ended] = {}
        for task_id in (need.task_id for need in needs):
            if task_id in recent:
                found[task_id] = (recent[task_id].info.state, recent[task_id].info.user)
            elif task_id in known:
                found[task_id] = (known[task_id].state, known[task_id].user)
        return found

    async def _admit(self, submission: Submission, known: Mapping[str, Result]) -> None:
        conductor = self.conductor
        ledger, spec, result = conductor.ledger, submission.spec, known.get(submission.task_id)
        if spec is None:
            await self.refuse(submission, submission.problem, "bad_submit")
            return
        earlier = outline(result) if result is not None else conductor.archive.recent.get(submission.task_id)
        if earlier is not None and submission.task_id not in ledger.by_id:
            if earlier.digest == digest(submission.user, spec):
                log.info("job %s was submitted again after its end: nothing to do", submission.task_id)
                conductor.janitor.retire(submission.seq)
            else:
                why = f"id {submission.task_id} is that of a finished job with another content; choose another id"
                await self.refuse(submission, why, "bad_submit", leave_result=False)
            return
        if submission.task_id not in ledger.by_id:
            why = intake.refusal(
                spec,
                conductor.site.policy,
                conductor.standing(submission.user),
                jobs=len(ledger),
                max_jobs=conductor.site.settings.integer("MAX_QUEUE"),
                size=len(submission.raw),
                used=ledger.bytes,
                room=self._room,
            )
            if why:
                await self.refuse(submission, why, intake.event_of(why))
                return
        try:
            job = ledger.submitted(submission.seq, submission.user, spec, submission.raw, submission.time)
        except Conflict as problem:
            await self.refuse(submission, str(problem), "bad_submit", leave_result=False)
            return
        if job is None:
            conductor.janitor.retire(submission.seq)
            return
        conductor.newcomer(job, self.ended(job.after, known))

    async def refuse(self, submission: Submission, why: str, event: str, *, leave_result: bool = True) -> None:
        """End a submission that becomes no job; the id of another job keeps its own result."""
        conductor = self.conductor
        leave_result = leave_result and submission.task_id not in conductor.ledger.by_id
        conductor.ledger.refuse(submission.seq)
        conductor.complain(event, why, task_id=submission.task_id, user=submission.user)
        await self._refusing.acquire()
        conductor.spawn(self._refused(submission, why, leave_result), f"refusal of {submission.task_id}")

    async def _refused(self, submission: Submission, why: str, leave_result: bool) -> None:
        conductor = self.conductor
        try:
            await conductor.bury(submission, why)
            if leave_result:
                await self._dead_result(submission, why)
            if submission.seq in conductor.ledger.refused:
                conductor.ledger.drop(submission.seq)
                conductor.janitor.retire(submission.seq)
        except Fenced:
            return
        finally:
            self._refusing.release()

    async def _dead_result(self, submission: Submission, why: str) -> None:
        conductor = self.conductor
        now = conductor.clock.now()
        task_id, user = submission.task_id, submission.user
        first = StateEvent(ts=stamp(submission.time), task_id=task_id, n=0, state="enqueued", user=user)
        event = StateEvent(ts=stamp(now), task_id=task_id, n=FINAL, state="dead", user=user, err="refused", reason=why)
        result = Result(
            ts=stamp(now),
            task_id=submission.task_id,
            ok=False,
            state="dead",
            user=submission.user,
            group=conductor.site.group_of(submission.user),
            data={"task_id": submission.task_id},
            error="refused",
            reason=why,
            submitted=stamp(submission.time),
            history=[first, event],
            enq_seq=submission.seq,
            digest=digest(submission.user, submission.spec) if submission.spec else "",
            shard=conductor.site.shard,
        )
        data = messages.encode(result)
        while True:
            try:
                subject = _bus.result_subject(submission.task_id)
                await conductor.results.write(subject, data, f"result:{submission.seq}")
            except SubjectFull:
                return  # the id has a result: this one's from before, or that of an earlier job
            except BusError as problem:
                conductor.complain("write_refused", f"result of {submission.task_id}: {problem}")
                await asyncio.sleep(5.0)  # nothing tells when there is room
                continue
            break
        conductor.feed.event(first)
        conductor.finished(submission.seq, result, len(data), event)

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _up(self, message: Msg) -> None:
        beat = messages.decode(message.data, Heartbeat)
        if beat.shard != self.conductor.site.shard:
            return
        log.info("GPU %s: worker %s started on %s (%s)", beat.gpu_id, beat.version, beat.host, beat.device.model)

    def _heartbeat(self, message: Msg) -> None:
        conductor = self.conductor
        if not self.leading():
            return
        try:
            beat = messages.decode(message.data, Heartbeat)
            if beat.gpu_id != message.subject.rsplit(".", 1)[-1]:
                raise BadMessage(f"a heartbeat of {beat.gpu_id}")
        except BadMessage as problem:
            reply = HeartbeatReply(ok=False, epoch=conductor.epoch, reason=f"bad heartbeat: {problem}")
            self._answer(message, reply)
            raise
        now = conductor.clock.now()
        if beat.shard != conductor.site.shard:
            self._elsewhere(beat, now)
            return
        if beat.gpu_id not in self._attended:
            conductor.spawn(self._attend(beat.gpu_id), f"subscription to {beat.gpu_id}")
        known = conductor.fleet.gpu(beat.gpu_id)
        was_alive, heard = known.alive, known.hears
        found = conductor.fleet.heartbeat(beat, now)
        if beat.hears and not heard and found.reply.ok:
            conductor.spawn(self._make_room(beat.gpu_id), f"earlier consumer of {beat.gpu_id}")
        self._answer(message, found.reply)
        gpu = conductor.fleet.gpu(beat.gpu_id)
        if not found.reply.ok:
            log.warning("GPU %s: heartbeat of %s refused: %s", beat.gpu_id, beat.host, found.reply.reason)
        elif not was_alive:
            log.info("GPU %s is served by %s (%s %s)", gpu.id, gpu.host, beat.device.backend, beat.device.address)
        for order in found.started:
            job = conductor.ledger.jobs.get(order.seq)
            if job is not None and job.attempt == order.ref.attempt and job.phase == "assigned" and not job.busy:
                conductor.feed.event(job.running_event(now))
        for told in beat.progress if found.reply.ok else ():
            job = conductor.ledger.by_id.get(told.task_id)
            if job is not None and (job.attempt, job.gpu, job.phase) == (told.attempt, gpu.id, "assigned"):
                job.progress = told
        for order in found.unheard:
            conductor.spawn(conductor.hand_over_again(gpu, order), f"order of {order.ref.task_id}")
        conductor.lose(gpu, found.lost, f"the worker of {gpu.id} does not know of it")
        conductor.watch_expiry()
        if conductor.fleet.idle:
            conductor.pump()

    def _answer(self, message: Msg, reply: HeartbeatReply | ReportReply) -> None:
        gpu_id = message.subject.rsplit(".", 1)[-1]
        self.conductor.outbox.answer(message.reply, messages.encode(reply), gpu_id, ("worker",))

    async def _make_room(self, gpu_id: str) -> None:
        """Nobody reads a GPU's orders by a consumer any more: an earlier version's would count them for ever."""
        try:
            await self.conductor.js.api(f"CONSUMER.DELETE.{_bus.STREAM_WQ}.{_bus.earlier_consumer(gpu_id)}")
        except NotFound:
            return
        except BusError as problem:
            log.info("GPU %s: its earlier consumer stays until the next conductor's term: %s", gpu_id, problem)
            return
        log.info("GPU %s: the consumer of an earlier version's worker is removed", gpu_id)

    def _elsewhere(self, beat: Heartbeat, now: float) -> None:
        """A GPU of another shard, whose conductor answers; if it was ours until now it has moved."""
        conductor = self.conductor
        found = conductor.fleet.depart(beat, now)
        if found is None:
            return
        gpu, lost = found
        log.info("GPU %s has moved to shard %s", gpu.id, beat.shard)
        conductor.lose(gpu, lost, f"the worker of {gpu.id} serves shard {beat.shard} now")
        conductor.spawn(self._leave(self._attended.pop(gpu.id, [])), f"farewell to {gpu.id}")
        conductor.watch_expiry()
        conductor.pump()

    def _ours(self, message: Msg) -> bool:
        """Something may still come of a GPU that has just moved to another shard."""
        return message.subject.rsplit(".", 1)[-1] in self.conductor.fleet.gpus

    def _metrics(self, message: Msg) -> None:
        metrics = messages.decode(message.data, Metrics)
        if metrics.gpu_id != message.subject.rsplit(".", 1)[-1]:
            raise BadMessage(f"metrics of {metrics.gpu_id}")
        if self._ours(message) and self.conductor.fleet.measured(metrics, self.conductor.clock.now()):
            self.conductor.pump()

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _report(self, message: Msg) -> None:
        if not self._ours(message):
            return  # its present conductor answers

        def respond(reply: ReportReply) -> None:
            self._answer(message, reply)

        if not self.leading():
            respond(ReportReply(verdict="retry", reason="not leading"))
            return
        try:
            report = messages.decode(message.data, Report)
            if report.gpu_id != message.subject.rsplit(".", 1)[-1]:
                raise BadMessage(f"a report of {report.gpu_id}")
        except BadMessage as problem:
            respond(ReportReply(verdict="unknown", reason=f"bad report: {problem}"))
            raise
        self.report(report, respond)

    def report(self, report: Report, respond: Respond) -> None:
        """Settle the attempt if it is the present one; the answer follows the commit."""
        conductor = self.conductor
        job = conductor.ledger.by_id.get(report.task_id)
        ref = TaskRef(report.task_id, report.attempt)
        if job is not None and job.busy:
            conductor.when_settled(job, lambda: self.report(report, respond))
            return
        if job is None or job.attempt != report.attempt or job.phase != "assigned" or job.gpu != report.gpu_id:
            conductor.release(report.gpu_id, ref)
            if job is None:
                self._late(report, respond)
            else:
                respond(ReportReply(verdict="stale", reason=f"attempt {job.attempt} of {job.task_id} counts"))
            return
        if job.incarnation != report.incarnation:
            # of an order that reached the worker and then was lost with the server's power: the attempt was given anew
            why = f"attempt {job.attempt} of {job.task_id} was given to another start of the worker"
            respond(ReportReply(verdict="stale", reason=why))
            return
        if (
            conductor.fleet.reported(report.gpu_id, ref, conductor.clock.now())
            or conductor.fleet.gpu(report.gpu_id).roomy
        ):
            conductor.pump()

        def then(verdict: Verdict) -> None:
            conductor.fleet.settled(report.gpu_id, ref, stored=verdict != "not stored")
            if verdict == "not stored":
                reason = conductor.why_ended or "it could not be stored"
                respond(ReportReply(verdict="retry", reason=reason))
            else:
                respond(ReportReply(verdict="recorded" if verdict == "stored" else "stale"))

        conductor.settle(job, outcome.of_report(job, report, conductor.rules), then)

    def _late(self, report: Report, respond: Respond) -> None:
        finished = self.conductor.archive.recent.get(report.task_id)
        if finished is not None:
            respond(_verdict(finished.info.state, finished.info.attempt, report))
        else:
            self.conductor.spawn(self._look_up(report, respond), f"late report of {report.task_id}")

    async def _look_up(self, report: Report, respond: Respond) -> None:
        stored = await self.conductor.stored_result(report.task_id)
        if stored is None:
            respond(ReportReply(verdict="unknown", reason=f"no job {report.task_id}"))
        else:
            respond(_verdict(stored[0].state, stored[0].attempts, report))


def _verdict(state: str, attempts: int, report: Report) -> ReportReply:
    if attempts == report.attempt and state in ("done", "failed"):
        return ReportReply(verdict="duplicate")
    return ReportReply(verdict="stale", reason=f"{report.task_id} is {state}")
