# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``maestroctl explain`` and ``maestroctl history``: why a job is where it is, and what has become of jobs."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta

from organism.bus import messages, rpc_types
from organism.cli._output import EXIT_OK, Output, clean, shorten, stamp
from organism.client import AsyncMaestro, ConflictError


async def explain(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    reply = await maestro.explain(arguments.task_id)
    fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
    output.answer(lines=explain_lines(output, reply), **fields)
    return EXIT_OK


def explain_lines(output: Output, reply: rpc_types.ExplainReply) -> list[str]:
    """For people: the sentence first, then what it rests on."""
    ahead = ""
    if reply.ahead:
        users = ", ".join(f"{user} {count}" for user, count in reply.ahead_by_user.items())
        ahead = f"{reply.ahead} waiting jobs ({users})"
    needs = ", ".join(f"{name} ({state})" for name, state in reply.waits_for.items())
    rows = [
        ("job", reply.task_id),
        ("state", output.paint(reply.state)),
        ("why", clean(reply.summary)),
        ("after", needs),
        ("queue", f"{reply.queue} (paused)" if reply.paused else "" if reply.queue == "default" else reply.queue),
        ("ready in", f"{reply.ready_in:g} s" if reply.ready_in else ""),
        ("limit", reply.limit),
        ("ahead", ahead),
        ("order", reply.order if reply.ahead else ""),
        ("deadline", "" if reply.deadline_in is None else f"in {reply.deadline_in:g} s"),
        ("next", reply.next),
    ]
    lines = [f"{name + ':':<10}{text}" for name, text in rows if text]
    if reply.gpus:
        table = [
            (one.gpu, "yes" if one.suits else "no", "yes" if one.free else "no", _score(one.score), clean(one.why))
            for one in reply.gpus
        ]
        lines += ["", *output.table(("GPU", "SUITS", "FREE", "SCORE", "WHY"), table)]
    return lines


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"


async def history(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    if arguments.history_id is not None:
        return await _story(maestro, arguments.history_id, output)
    since = None
    if arguments.since is not None:
        since = (datetime.now(UTC) - timedelta(seconds=arguments.since)).isoformat(timespec="milliseconds")
    jobs = await maestro.history(
        user=arguments.list_user,
        all=arguments.list_all,
        state=arguments.state,
        label=arguments.label,
        since=since,
        limit=arguments.limit,
    )
    rows = [
        (
            job.task_id,
            job.state,
            job.user,
            job.gpu or "",
            job.attempts or "",
            _seconds(job.wait),
            _seconds(job.run),
            stamp(job.ended),
            "" if job.returncode is None else job.returncode,
            shorten(job.reason, 60) if job.state != "done" else "",
        )
        for job in jobs
    ]
    heads = ("ID", "STATE", "USER", "GPU", "ATTEMPTS", "WAITED", "RAN", "ENDED", "CODE", "WHY")
    output.answer(lines=output.table(heads, rows) if rows else [], jobs=jobs)
    if not rows:
        output.hint("no such jobs have ended")
    return EXIT_OK


async def _story(maestro: AsyncMaestro, task_id: str, output: Output) -> int:
    """All steps of one job, finished or not."""
    try:
        found = await maestro.result(task_id)
    except ConflictError:
        reply = await maestro.explain(task_id)
        return _steps(output, task_id, reply.state, reply.steps)
    return _steps(output, task_id, found.state, found.history)


def _steps(output: Output, task_id: str, state: str, events: list[messages.StateEvent]) -> int:
    lines, before = [], None
    for event in events:
        lines.append(_step(output, event, before))
        before = event.ts
    output.answer(lines=lines, task_id=task_id, state=state, history=events)
    return EXIT_OK


def _step(output: Output, event: messages.StateEvent, before: str | None) -> str:
    later = 0.0
    if before is not None:
        later = messages.seconds_since_epoch(event.ts) - messages.seconds_since_epoch(before)
    parts = [
        stamp(event.ts),
        f"+{later:.3f} s" if before is not None else "",
        output.paint(event.state),
        f"on {event.gpu}" if event.gpu else "",
        f"attempt {event.attempt}" if event.attempt else "",
        f"({event.err})" if event.err else "",
        f"- {clean(event.reason)}" if event.reason else "",
    ]
    return "  ".join(part for part in parts if part)


def _seconds(value: float | None) -> str:
    """A duration as people read it."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.1f}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
