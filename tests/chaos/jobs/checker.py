# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every history must satisfy, whatever was killed, cut, filled or frozen meanwhile. Pure: history in, faults out.

Each rule is shown to catch what it is there for by tests/unit/chaos/test_checker.py, which injects violations.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from chaos.jobs.faults import FORGED
from chaos.jobs.history import History, Order
from chaos.jobs.order import inversions
from chaos.jobs.plan import MAX_LOST, MAX_RETRIES, Job, Plan

from organism.bus.messages import FINAL_STATES, Result

Rule = Callable[[History, Plan], Iterator[str]]


def check(history: History, plan: Plan) -> list[str]:
    """All violations, each naming its rule and its job."""
    return [f"{rule.__name__.strip('_').replace('_', ' ')}: {found}" for rule in RULES for found in rule(history, plan)]


def _one_result(history: History, plan: Plan) -> Iterator[str]:
    """Every acknowledged submission reaches exactly one final state; nothing else has a result."""
    count = Counter(name for name, _ in history.results)
    for task_id in history.accepted:
        if count[task_id] != 1:
            yield f"{task_id} was acknowledged and has {count[task_id]} results"
    for task_id in count:
        if task_id not in history.sent:
            yield f"{task_id} has a result and was never submitted"
    for name, result in history.results:
        if name != result.task_id:
            yield f"the result of {result.task_id} lies under {name}"
    if set(plan.jobs) != set(history.accepted):
        yield f"{len(set(plan.jobs) - set(history.accepted))} jobs of the plan were never acknowledged"


def _same_place(history: History, plan: Plan) -> Iterator[str]:
    """A repetition within the server's memory is the submission that was acknowledged before, and so is its job."""
    for name, result in history.results:
        told = {seq for task_id, seq in [*history.repeated, *history.accepted.items()] if task_id == name}
        if told and result.enq_seq not in told:
            yield f"{name} ended for submission {result.enq_seq}, its submitter was told {sorted(told)}"


def _expected_end(history: History, plan: Plan) -> Iterator[str]:
    """A job ends as what it does says it must: no outcome of another attempt, job or forger was taken for its own."""
    results = dict(history.results)
    for name, result in history.results:
        job = plan.jobs.get(name)
        if job is None:
            continue
        allowed = _ends(job, results)
        if result.state not in allowed:
            yield f"{name} ({job.kind}) is {result.state} ({result.error}: {result.reason}), not {' or '.join(allowed)}"
        if result.state == "dead" and result.error != "lost":
            yield f"{name} is dead: {result.error}: {result.reason}"


def _ends(job: Job, results: dict[str, Result]) -> tuple[str, ...]:
    if job.kind == "cancelled":
        return ("cancelled", "done", "dead")
    if job.fails:
        return ("failed", "dead")
    if job.after:
        need = results.get(job.after)
        return ("done", "dead") if need is None or need.state == "done" else ("cancelled",)
    return ("done", "dead")


def _cancel_is_final(history: History, plan: Plan) -> Iterator[str]:
    results = dict(history.results)
    for task_id, verdict in history.cancels.items():
        result = results.get(task_id)
        if result is None:
            continue
        if (verdict == "cancelled") != (result.state == "cancelled"):
            yield f"{task_id}: its user was told {verdict!r}, and it is {result.state}"
    for name, result in history.results:
        if result.state == "cancelled" and result.error == "cancelled" and name not in history.cancelling:
            yield f"{name} is cancelled, and nobody asked for it"


def _fenced(history: History, plan: Plan) -> Iterator[str]:
    """Each attempt is given out once, to one incarnation; attempts of a job are numbered without a gap."""
    orders: dict[str, list[Order]] = defaultdict(list)
    for order in history.orders:
        orders[order.task_id].append(order)
    for task_id, given in orders.items():
        numbers = [order.attempt for order in given]
        if numbers != sorted(set(numbers)):
            yield f"{task_id}: attempts were given out as {numbers}"
        if len({order.enq_seq for order in given}) > 1:
            yield f"{task_id}: run orders for submissions {sorted({order.enq_seq for order in given})}"
    for name, result in history.results:
        numbers = [order.attempt for order in orders.get(name, [])]
        if numbers and max(numbers) != result.attempts and not _unread(history, orders[name][-1], result):
            yield f"{name}: attempt {max(numbers)} was the last one given out, the result is of {result.attempts}"
    begun = Counter((run.task_id, run.attempt) for run in history.runs if run.step == "begun")
    for (task_id, attempt), count in begun.items():
        if count > 1:
            yield f"{task_id}: attempt {attempt} was run {count} times"


def _unread(history: History, last: Order, result: Result) -> bool:
    """Was the order purged before the recorder could read it? The job's own history must tell of it then."""
    told = {event.attempt for event in result.history if event.state == "scheduled"}
    later = set(range(last.attempt + 1, result.attempts + 1))
    return bool(later) and later <= told and any(first > last.seq for first, _last in history.missed)


def _no_zombie(history: History, plan: Plan) -> Iterator[str]:
    """The outcome is that of the last attempt, from the GPU that it was given to, and really ran to its end there."""
    given = {(order.task_id, order.attempt): order for order in history.orders}
    ended = {(run.task_id, run.attempt, run.gpu) for run in history.runs if run.step == "ended"}
    for name, result in history.results:
        output = str(result.data.get("stdout", ""))
        if FORGED in output:
            yield f"{name}: a forged outcome was taken"
        if result.state not in ("done", "failed"):
            continue
        order = given.get((name, result.attempts))
        gpu = result.data.get("gpu_id")
        if order is not None and order.gpu != gpu:
            yield f"{name}: attempt {result.attempts} was given to {order.gpu}, the outcome is {gpu}'s"
        job = plan.jobs.get(name)
        if job is None or job.kind == "noop":
            continue
        if output != f"ran {name} {result.attempts} {gpu}\n":
            yield f"{name}: the outcome of attempt {result.attempts} on {gpu} says {output!r}"
        if (name, result.attempts, str(gpu)) not in ended:
            yield f"{name}: attempt {result.attempts} has an outcome of {gpu} and never ran to its end there"
    for task_id, attempt, verdict in history.forged:
        if verdict == "recorded":
            yield f"{task_id}: a forged outcome of attempt {attempt} was recorded"


def _bounded(history: History, plan: Plan) -> Iterator[str]:
    """No more tries than allowed, no more losses than allowed, and each attempt is accounted for."""
    for name, result in history.results:
        job = plan.jobs.get(name)
        if job is None:
            continue
        steps = [event for event in result.history if event.state == "retry"]
        lost = sum(event.err == "lost" for event in steps)
        stopped = sum(event.err == "shutdown" for event in steps)
        failed = len(steps) - lost - stopped
        if lost > MAX_LOST:
            yield f"{name} was lost {lost} times (MAX_LOST is {MAX_LOST})"
        if failed > MAX_RETRIES:
            yield f"{name} was tried again {failed} times (max_retries is {MAX_RETRIES})"
        if failed and not job.fails:
            yield f"{name} ({job.kind}) failed {failed} times: {[event.err for event in steps]}"
        if result.state == "failed" and failed != MAX_RETRIES:
            yield f"{name} failed for good after {failed} retries, not {MAX_RETRIES}"
        if result.state in ("done", "failed") and result.attempts != 1 + len(steps):
            yield f"{name}: {result.attempts} attempts, {len(steps)} of them ended in a retry"


def _events_match(history: History, plan: Plan) -> Iterator[str]:
    """The events tell each job's end; the key-value bucket holds the last event; both agree with the result."""
    finals: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, set[tuple[int, str]]] = defaultdict(set)
    last = {}
    for event in history.events:
        if event.state in FINAL_STATES:
            finals[event.task_id].append(event.state)
        seen[event.task_id].add((event.n, event.state))
        last[event.task_id] = event
    for name, result in history.results:
        if set(finals[name]) != {result.state}:
            yield f"{name} is {result.state}, its events say {finals[name] or 'nothing'}"
            continue
        state = history.states.get(name)
        if state is None or (state.n, state.state) != (last[name].n, last[name].state):
            yield f"{name}: the last event is {last[name].state}, the bucket says {state.state if state else 'nothing'}"
        if last[name].state != result.state:
            yield f"{name} is {result.state}, its last event is {last[name].state}"
        missing = [
            f"{step.state} {step.attempt}"
            for step in result.history
            if step.state in ("enqueued", "scheduled", "retry", *FINAL_STATES)
            and (step.n, step.state) not in seen[name]
        ]
        if missing:
            yield f"{name}: its history has {', '.join(missing)}, the events have not"
    for task_id in history.states.keys() - {name for name, _ in history.results}:
        yield f"{task_id} has a state and no result"


def _order(history: History, plan: Plan) -> Iterator[str]:
    """Strict: priority, then arrival. Else each job that goes before its turn says why."""
    yield from inversions(history, plan)


def _finished(history: History, plan: Plan) -> Iterator[str]:
    if not history.complete:
        yield "the run was given up before all jobs were final"


RULES: tuple[Rule, ...] = (
    _finished, _one_result, _same_place, _expected_end, _cancel_is_final, _fenced, _no_zombie, _bounded, _events_match,
    _order,
)  # fmt: skip
