# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finished jobs as ORG_RESULTS keeps them (30 days by default), newest first."""

from __future__ import annotations

from datetime import datetime

from organism.bus import messages
from organism.bus.messages import Result
from organism.bus.rpc_types import CallError, HistoryEntry, HistoryReply, HistoryRequest
from organism.core import _bus
from organism.maestro.conductor import Conductor
from organism.maestro.lookup import block
from organism.maestro.takeover import readable

LOOKED_AT = 5_000
"""Results that one question goes back; the answer says where to go on."""
BLOCK = 500
"""Results read at a time."""
PATTERN = "gpu.task.result.*"


async def history(conductor: Conductor, user: str, request: HistoryRequest) -> HistoryReply:
    """Raises CallError."""
    operator = conductor.site.policy.is_operator(user)
    if (request.all or request.user not in (None, user)) and not operator:
        raise CallError("forbidden", f"{user} is no operator and may look at their own jobs only")
    whose = request.user or (None if request.all else user)
    since = _time(request.since) if request.since is not None else 0.0
    key, separator, value = (request.label or "").partition("=")
    if request.label is not None and not (key and separator):
        raise CallError("bad_request", f"a label looks like KEY=VALUE, not {request.label!r}")
    state = (await conductor.js.info(_bus.STREAM_RESULTS))["state"]
    first, last = int(state["first_seq"]), int(state["last_seq"])
    upper = min(last, request.before - 1) if request.before else last
    stop = max(first, upper - LOOKED_AT + 1)
    found: list[HistoryEntry] = []
    while upper >= stop:
        lower = max(stop, upper - BLOCK + 1)
        for stored in reversed(await block(conductor.js, _bus.STREAM_RESULTS, PATTERN, lower, upper)):
            result = readable(stored)
            if result is None:
                continue
            if stored.time < since:
                return HistoryReply(jobs=found)
            mine = whose in (None, result.user) and result.shard == conductor.site.shard
            fits = request.state in (None, result.state) and (not separator or result.labels.get(key) == value)
            if mine and fits:
                found.append(entry(result))
                if len(found) == request.limit:
                    return HistoryReply(jobs=found, next=stored.seq if stored.seq > first else 0)
        upper = lower - 1
    return HistoryReply(jobs=found, next=stop if stop > first else 0)


def _time(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CallError("bad_request", f"`since` is no time: {text!r}") from None
    if moment.tzinfo is None:
        raise CallError("bad_request", f"`since` needs a time zone, as in 2026-11-22T10:00:00Z, not {text!r}")
    return moment.timestamp()


def entry(result: Result) -> HistoryEntry:
    """One line of history; what cannot be computed is left out."""
    data = result.data
    starts = [step.ts for step in result.history if step.state == "scheduled"]
    started, finished = data.get("started"), data.get("finished")
    code = data.get("returncode")
    return HistoryEntry(
        task_id=result.task_id,
        state=result.state,
        user=result.user,
        type=str(data.get("type") or ""),
        gpu=data.get("gpu_id"),
        attempts=result.attempts,
        error=result.error,
        reason=result.reason,
        returncode=code if isinstance(code, int) else None,
        submitted=result.submitted,
        started=started,
        ended=result.ts,
        wait=_between(result.submitted, starts[0]) if starts else None,
        run=_between(started, finished),
        labels=result.labels,
    )


def _between(first: str | None, second: str | None) -> float | None:
    """Seconds; None when one of the two is not known."""
    if not first or not second:
        return None
    try:
        return max(0.0, round(messages.seconds_since_epoch(second) - messages.seconds_since_epoch(first), 3))
    except ValueError:
        return None
