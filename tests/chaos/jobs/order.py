# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Was the queue served in its order? Judged on first attempts of jobs that any GPU could have taken at any time.

A job's turn is decided before it is stored, and a conductor that dies may leave later decisions stored and an earlier
one not. So decisions count in the order in which one term made them; what a term decided and did not store, it may have
decided first, unless it demonstrably went on to decide about jobs of lower rank later than that.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chaos.jobs.history import History, Order
from chaos.jobs.plan import Job, Plan

_CAUSE = re.compile(
    r"^(?P<named>\S+) would be first(?:(?P<age> by priority, but this one has waited \d+ s)"
    r"|, but (?P<user>\S+) has used (?P<theirs>[\d.]+) GPU seconds and (?P<me>\S+) (?P<mine>[\d.]+))$"
)
"""The two causes that there are without limits and without jobs on several GPUs."""


@dataclass(frozen=True)
class _Turn:
    job: Job
    order: Order

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first."""
        return (-self.job.priority, self.order.enq_seq)


def inversions(history: History, plan: Plan) -> Iterator[str]:
    """Jobs that went before one that had been there when they came, was of higher rank, and could have run."""
    turns: dict[int, list[_Turn]] = defaultdict(list)
    first: dict[str, Order] = {}
    for order in history.orders:
        job = plan.jobs.get(order.task_id)
        if job is not None and job.plain and order.attempt == 1:
            first[order.task_id] = order
            if job.kind != "cancelled":
                turns[order.term].append(_Turn(job, order))
    places = {**history.accepted, **{order.task_id: order.enq_seq for order in history.orders}}
    ranks = {name: (-plan.jobs[name].priority, seq) for name, seq in places.items() if name in plan.jobs}
    for term, taken in turns.items():
        later = [turn for other, turns_ in turns.items() if other > term for turn in turns_]
        yield from _within(taken, ranks, plan.options.strict)
        yield from _left_over(taken, later, strict=plan.options.strict)
    if not plan.options.strict:
        yield from _bad_reasons(history, plan, first, ranks)
    else:
        for order in history.orders:
            if order.reason:
                yield f"{order.task_id} gives a reason for its turn, where the order is strict: {order.reason}"


def _within(taken: list[_Turn], ranks: Mapping[str, tuple[int, int]], strict: bool) -> Iterator[str]:
    """Of one term: submissions are read in their order, so whoever came before one that had its turn was there.

    A reason names the first of all who were passed over: nobody of a rank above that one's may be among them.
    """
    coming = sorted(taken, key=lambda turn: turn.order.enq_seq, reverse=True)
    waiting: list[tuple[tuple[int, int], int, _Turn]] = []
    served: set[int] = set()
    known = 0
    for turn in sorted(taken, key=lambda turn: (turn.order.at, turn.order.seq)):
        known = max(known, turn.order.enq_seq)
        while coming and coming[-1].order.enq_seq <= known:
            there = coming.pop()
            heapq.heappush(waiting, (there.rank, there.order.seq, there))
        served.add(turn.order.seq)
        named = "" if strict else _named(turn.order)
        best = _first(waiting, served, turn, ranks.get(named, turn.rank))
        if best is not None:
            yield (
                f"{turn.job.task_id} (priority {turn.job.priority}, {turn.order.enq_seq}) went before "
                f"{best.job.task_id} (priority {best.job.priority}, {best.order.enq_seq}) in term {turn.order.term}"
                + (f" and names {named}, whose rank is lower" if named else "")
            )


def _first(
    waiting: list[tuple[tuple[int, int], int, _Turn]], served: set[int], turn: _Turn, rank: tuple[int, int]
) -> _Turn | None:
    """Who waits before this rank and was decided about later than at this turn's moment."""
    same_moment = []
    found = None
    while waiting and waiting[0][0] < rank:
        entry = waiting[0]
        if entry[1] not in served and entry[2].order.at > turn.order.at:
            found = entry[2]
            break
        heapq.heappop(waiting)
        if entry[1] not in served:
            same_moment.append(entry)
    for entry in same_moment:
        heapq.heappush(waiting, entry)
    return found


def _left_over(taken: list[_Turn], later: list[_Turn], *, strict: bool) -> Iterator[str]:
    """Of two terms: a job that the earlier one passed over twice, at different times, was not in its last group."""
    moments = [turn.order.at for turn in taken]
    newest = max(turn.order.enq_seq for turn in taken)
    if max(moments) - min(moments) <= IN_FLIGHT:
        return
    for other in later:
        if other.order.enq_seq > newest:
            continue
        passed = [
            turn
            for turn in taken
            if other.rank < turn.rank and other.order.enq_seq < turn.order.enq_seq and (strict or not turn.order.reason)
        ]
        times = sorted({turn.order.at for turn in passed})
        if times and times[-1] - times[0] > IN_FLIGHT:
            turn = passed[0]
            yield (
                f"{turn.job.task_id} went before {other.job.task_id} in term {turn.order.term}, which decided about"
                f" others for {times[-1] - times[0]:.1f} s more and left that one to term {other.order.term}"
            )


IN_FLIGHT = 15.0
"""Seconds that a decision may take to be stored, or to be known as not stored, while the server is away."""


def _named(order: Order) -> str:
    found = _CAUSE.match(order.reason)
    return found["named"] if found else ""


def _bad_reasons(
    history: History, plan: Plan, first: dict[str, Order], ranks: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """A reason names a job of higher rank that had been there and had not run yet, and a cause that can be true."""
    again: dict[str, list[float]] = defaultdict(list)
    for order in history.orders:
        if order.attempt > 1:
            again[order.task_id].append(order.at)
    for order in history.orders:
        if not order.reason:
            continue
        cause = _CAUSE.match(order.reason)
        mine = plan.jobs.get(order.task_id)
        if cause is None or mine is None:
            yield f"{order.task_id}: its reason names no job and no cause: {order.reason}"
            continue
        named = cause["named"]
        other = plan.jobs.get(named)
        if other is None:
            yield f"{order.task_id}: its reason names {named}, which is no job"
            continue
        if other.priority < mine.priority:
            yield f"{order.task_id}: its reason names {named}, whose priority is lower"
        elif named in ranks and ranks[named] > ranks[order.task_id]:
            yield f"{order.task_id}: its reason names {named}, which came later"
        yield from _untrue(order, cause, mine, other, ranks)
        turn = first.get(named)
        if turn is not None and other.plain and turn.at < order.at and not any(at >= order.at for at in again[named]):
            yield f"{order.task_id}: its reason names {named}, which had been started before"


def _untrue(
    order: Order, cause: re.Match[str], mine: Job, other: Job, ranks: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Age lifts who came earlier over a higher priority; use holds back who has used more."""
    name = mine.task_id
    if cause["age"]:
        if other.priority <= mine.priority:
            yield f"{name}: its reason is its age, and {other.task_id} has no higher priority"
        if other.task_id in ranks and ranks[other.task_id][1] < order.enq_seq:
            yield f"{name}: its reason is its age, and {other.task_id} has waited for longer"
    elif (cause["me"], cause["user"]) != (mine.user, other.user) or mine.user == other.user:
        yield f"{name}: its reason compares {cause['me']} with {cause['user']}, not {mine.user} with {other.user}"
    elif float(cause["theirs"]) < float(cause["mine"]):
        yield f"{name}: its reason says that {other.user} has used less than {mine.user}: {order.reason}"
