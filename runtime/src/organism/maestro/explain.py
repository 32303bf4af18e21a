# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a job is where it is, told in full from the scheduler's own judgements at the moment of the question. No I/O."""

from __future__ import annotations

from collections import Counter

from organism.bus.rpc_types import Candidate, ExplainReply, JobInfo
from organism.maestro.conductor import Conductor
from organism.maestro.ledger import Job
from organism.maestro.scheduler import Scheduler
from organism.maestro.workers import Gpu

SHOWN_NEEDS = 100


def ended(info: JobInfo) -> ExplainReply:
    """Of a job that is over."""
    place = f" on {info.gpu}" if info.gpu else ""
    return ExplainReply(
        task_id=info.task_id,
        state=info.state,
        summary=info.reason or f"it is {info.state}{place}",
        next={
            "dead": f"maestroctl dead list shows it; maestroctl dead replay {info.task_id} tries again",
            "failed": f"maestroctl result {info.task_id} shows its output",
        }.get(info.state, ""),
    )


async def explain(conductor: Conductor, job: Job, info: JobInfo, visible: dict[str, str]) -> ExplainReply:
    """Of an unfinished job. ``visible``: the states of the jobs it waits for, as far as the asker may know."""
    now, scheduler = conductor.clock.now(), conductor.scheduler
    reply = ExplainReply(
        task_id=job.task_id,
        state=info.state,
        summary=info.reason,
        queue=job.queue,
        steps=job.history(),
        deadline_in=None if job.deadline is None else round(job.deadline - now, 1),
    )
    if job.phase == "assigned":
        reply.summary = _placed(job)
        if job.gpu is not None:
            reply.gpus = [_candidate(scheduler, job, conductor.fleet.gpu(job.gpu), now)]
        reply.next = f"maestroctl logs -f {job.task_id} shows its output"
        return reply
    if job.busy:
        reply.summary = f"its {'order' if job.busy == 'dispatch' else 'end'} is being written to the bus"
        return reply
    reply.paused = job.queue in scheduler.paused
    reply.waits_for = dict(list(visible.items())[:SHOWN_NEEDS])
    reply.ready_in = round(max(0.0, job.not_before - now), 1)
    reply.limit = conductor.shares.bar(job.user)
    reply.gpus = [
        _candidate(scheduler, job, gpu, now) for gpu in sorted(conductor.fleet.gpus.values(), key=lambda gpu: gpu.id)
    ]
    ahead = await scheduler.ahead(job)
    reply.ahead, reply.ahead_by_user = len(ahead), dict(Counter(other.user for other in ahead).most_common(10))
    reply.order = _order(scheduler)
    reply.next = _next(reply, job)
    return reply


def _placed(job: Job) -> str:
    place = " with ".join(part for part in (job.gpu, ", ".join(job.also)) if part)
    text = f"attempt {job.attempt} is {'running' if job.state == 'running' else 'on its way'} on {place}"
    reasons = [step.reason for step in job.steps if step.state == "scheduled" and step.attempt == job.attempt]
    if reasons and reasons[-1]:
        text += f"; it went first because {reasons[-1]}"
    if job.tries or job.lost:
        text += f"; {job.tries} attempts failed before and {job.lost} were lost (last error: {job.err})"
    return text


def _candidate(scheduler: Scheduler, job: Job, gpu: Gpu, now: float) -> Candidate:
    fleet = scheduler.fleet
    misfit = scheduler.misfit(job, gpu)
    obstacle = fleet.obstacle(gpu, now)
    found = Candidate(gpu=gpu.id, suits=not misfit)
    if not obstacle and not gpu.busy:
        found.score = round(fleet.score(gpu, now), 2)
    if misfit:
        found.why = misfit
    elif obstacle:
        found.why = obstacle
    elif gpu.busy:
        running = next(iter(gpu.orders), None) or next(iter(gpu.stopping), None)
        found.why = f"it has {running.task_id}" if running else "it is kept for another job"
    elif job.excluded == gpu.id:
        found.free = scheduler.may_take(job, gpu, now)
        found.why = "the job failed there last: it is taken only when no other GPU would do"
    else:
        found.free = True
    if job.inputs and found.suits:
        warm = f"{gpu.warmth(job.inputs)} of {len(job.inputs)} inputs are in its cache"
        found.why = f"{found.why}; {warm}" if found.why else warm
    return found


def _order(scheduler: Scheduler) -> str:
    order = scheduler.order
    parts = ["priority, then arrival"]
    if order.half_life:
        parts.append("among equal priorities users who have used less go first")
    if order.aging:
        parts.append(f"an hour of waiting is worth {order.aging:g} points")
    return "; ".join(parts)


def _next(reply: ExplainReply, job: Job) -> str:
    """The first thing in the way decides."""
    if reply.waits_for:
        return f"maestroctl explain {next(iter(reply.waits_for))}"
    if reply.ready_in:
        return "wait: it is tried again by itself"
    if reply.paused:
        return f"an operator has to say maestroctl resume {job.queue}"
    if reply.limit:
        return "wait for your other jobs, or cancel some"
    if not any(candidate.suits for candidate in reply.gpus):
        return "no GPU is of the kind it wants: cancel it and submit it with less"
    if not any(candidate.free for candidate in reply.gpus):
        return "wait: every GPU that suits is taken or cannot be used at the moment"
    return ""


def needs_of(conductor: Conductor, user: str, job: Job, operator: bool) -> dict[str, str]:
    """States of the jobs that this one waits for."""
    found: dict[str, str] = {}
    for task_id in conductor.dependencies.needs(job):
        other = conductor.ledger.by_id.get(task_id)
        if other is not None and (operator or other.user == user):
            found[task_id] = other.state
        else:
            found[task_id] = "unknown"
    return found
