# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The chaos suite's checker: silent about a clean history, and it catches each violation that is put into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from chaos.jobs.checker import RULES, check
from chaos.jobs.history import History, Order, Run, load
from chaos.jobs.plan import MAX_LOST, Group, Job, JobKind, Options, Plan, drawn

from organism.bus.messages import Result, StateEvent, encode

OPTIONS = Options(seed=1, jobs=6)
T0 = 1_700_000_000.0
STAMP = "2023-11-14T22:13:20.000Z"


def job(number: int, kind: JobKind = "quick", **more: Any) -> Job:
    return Job(f"j{number}", "alice", kind, **more)


def plan_of(*jobs: Job, strict: bool = True) -> Plan:
    return Plan(replace(OPTIONS, strict=strict), (Group(0.0, jobs),), (), 600, {one.task_id: one for one in jobs})


PLAN = plan_of(job(1), job(2, "failing"), job(3, "noop"), job(4, "cancelled", cancel=0.5), job(5, "after", after="j1"))


def event(task_id: str, n: int, state: Any, **more: Any) -> StateEvent:
    return StateEvent(ts=STAMP, task_id=task_id, n=n, state=state, user="alice", **more)


def finish(history: History, one: Job, state: Any, *, attempts: int = 1, retries: tuple[str, ...] = ()) -> None:
    """A job with everything that belongs to its end."""
    seq = len(history.accepted) + 1
    name = one.task_id
    history.accepted[name] = seq
    history.sent.add(name)
    steps = [event(name, 0, "enqueued")]
    for attempt in range(1, attempts + 1):
        gpu = f"gpu{attempt}"
        steps.append(event(name, 8 * attempt, "scheduled", attempt=attempt, gpu=gpu))
        history.orders.append(Order(10 * seq + attempt, name, attempt, gpu, "i", T0 + seq + attempt / 10, seq, "", 1))
        if one.kind != "noop":
            history.runs += [Run(name, "begun", attempt, gpu), Run(name, "ended", attempt, gpu)]
        if attempt <= len(retries):
            steps.append(event(name, 8 * attempt + 2, "retry", attempt=attempt, err=retries[attempt - 1]))
    steps.append(event(name, 8 * attempts + 4, state, attempt=attempts))
    error = {"done": None, "failed": "exit", "cancelled": "cancelled", "dead": "lost"}[state]
    data: dict[str, Any] = {"gpu_id": f"gpu{attempts}"}
    if one.kind != "noop" and state in ("done", "failed"):
        data["stdout"] = f"ran {name} {attempts} gpu{attempts}\n"
    result = Result(
        ts=STAMP, task_id=name, ok=state == "done", state=state, user="alice", data=data, error=error,
        attempts=attempts, history=steps, enq_seq=seq,
    )  # fmt: skip
    history.results.append((name, result))
    history.events += steps
    history.states[name] = steps[-1]


def clean() -> History:
    history = History(complete=True)
    finish(history, PLAN.jobs["j1"], "done", attempts=2, retries=("lost",))
    finish(history, PLAN.jobs["j2"], "failed", attempts=2, retries=("exit",))
    finish(history, PLAN.jobs["j3"], "done")
    finish(history, PLAN.jobs["j4"], "cancelled")
    history.cancelling.add("j4")
    history.cancels["j4"] = "cancelled"
    finish(history, PLAN.jobs["j5"], "done")
    history.forged.append(("j1", 1, "stale"))
    return history


def result_of(history: History, name: str) -> Result:
    return dict(history.results)[name]


def change(told: History, name: str, /, **fields: Any) -> None:
    """Another result in place of the job's own."""
    told.results = [
        (one, msgspec.structs.replace(result, **fields) if one == name else result) for one, result in told.results
    ]


def order_of(history: History, name: str, attempt: int = 1) -> Order:
    return next(order for order in history.orders if (order.task_id, order.attempt) == (name, attempt))


def test_a_clean_history_is_clean() -> None:
    assert check(clean(), PLAN) == []


Injection = Callable[[History], None]


def _lose(history: History) -> None:
    history.results = [entry for entry in history.results if entry[0] != "j3"]


def _finish_twice(history: History) -> None:
    history.results.append(("j3", result_of(history, "j3")))


def _unknown(history: History) -> None:
    history.sent.discard("j3")


def _misplaced(history: History) -> None:
    history.results = [("j1" if name == "j3" else "j3" if name == "j1" else name, one) for name, one in history.results]


def _other_place(history: History) -> None:
    change(history, "j3", enq_seq=99)


def _repetition_ran(history: History) -> None:
    history.repeated.append(("j3", 77))
    change(history, "j3", enq_seq=78)


def _succeeded_failing(history: History) -> None:
    change(history, "j2", state="done", error=None)


def _dead_otherwise(history: History) -> None:
    change(history, "j1", state="dead", error="refused")


def _need_was_cancelled(history: History) -> None:
    change(history, "j1", state="failed", error="exit")


def _revived(history: History) -> None:
    change(history, "j4", state="done", error=None)


def _denied_cancel(history: History) -> None:
    history.cancels["j4"] = "too late"


def _cancelled_by_nobody(history: History) -> None:
    history.cancelling.clear()
    history.cancels.clear()


def _attempt_twice(history: History) -> None:
    history.orders.append(replace(order_of(history, "j3"), seq=500, gpu="gpu9"))


def _attempts_backwards(history: History) -> None:
    history.orders.append(replace(order_of(history, "j1", 1), seq=500))


def _later_attempt(history: History) -> None:
    history.orders.append(replace(order_of(history, "j3"), seq=500, attempt=2))


def _ran_twice(history: History) -> None:
    history.runs.append(Run("j5", "begun", 1, "gpu1"))


def _two_submissions(history: History) -> None:
    history.orders.append(replace(order_of(history, "j3"), seq=500, attempt=2, enq_seq=44))
    change(history, "j3", attempts=2)


def _forged(history: History) -> None:
    change(history, "j3", data={"gpu_id": "gpu1", "stdout": "ZOMBIE\n"})


def _forgery_recorded(history: History) -> None:
    history.forged.append(("j5", 1, "recorded"))


def _zombie_output(history: History) -> None:
    change(history, "j1", data={"gpu_id": "gpu2", "stdout": "ran j1 1 gpu1\n"})


def _other_gpu(history: History) -> None:
    change(history, "j3", data={"gpu_id": "gpu7"})


def _never_ran(history: History) -> None:
    history.runs = [run for run in history.runs if (run.task_id, run.step) != ("j5", "ended")]


def _too_many_losses(history: History) -> None:
    steps = [event("j3", n, "retry", err="lost") for n in range(MAX_LOST + 1)]
    change(history, "j3", history=steps, attempts=MAX_LOST + 2)


def _too_many_tries(history: History) -> None:
    change(history, "j2", history=[event("j2", n, "retry", err="exit") for n in (10, 18)], attempts=3)


def _too_few_tries(history: History) -> None:
    change(history, "j2", history=[], attempts=1)


def _unexplained_attempt(history: History) -> None:
    change(history, "j1", history=[event("j1", 0, "enqueued"), event("j1", 20, "done")])


def _failed_once(history: History) -> None:
    steps = result_of(history, "j5").history
    change(history, "j5", history=[*steps, event("j5", 10, "retry", err="exit")])


def _no_final_event(history: History) -> None:
    history.events = [one for one in history.events if (one.task_id, one.state) != ("j3", "done")]


def _two_ends(history: History) -> None:
    history.events.append(event("j3", 12, "failed"))


def _old_state(history: History) -> None:
    history.states["j3"] = event("j3", 8, "scheduled")


def _late_event(history: History) -> None:
    history.events.append(event("j3", 9, "running"))


def _missing_event(history: History) -> None:
    history.events = [one for one in history.events if (one.task_id, one.state, one.attempt) != ("j1", "retry", 1)]


def _state_of_nothing(history: History) -> None:
    history.states["j77"] = event("j77", 0, "enqueued")


def _given_up(history: History) -> None:
    history.complete = False


@pytest.mark.parametrize(
    ("inject", "rule", "words"),
    [
        (_lose, "one result", "j3 was acknowledged and has 0 results"),
        (_finish_twice, "one result", "j3 was acknowledged and has 2 results"),
        (_unknown, "one result", "j3 has a result and was never submitted"),
        (_misplaced, "one result", "the result of j3 lies under j1"),
        (_other_place, "same place", "j3 ended for submission 99"),
        (_repetition_ran, "same place", "j3 ended for submission 78, its submitter was told [3, 77]"),
        (_succeeded_failing, "expected end", "j2 (failing) is done"),
        (_dead_otherwise, "expected end", "j1 is dead: refused"),
        (_need_was_cancelled, "expected end", "j5 (after) is done"),
        (_revived, "cancel is final", "j4: its user was told 'cancelled', and it is done"),
        (_denied_cancel, "cancel is final", "j4: its user was told 'too late', and it is cancelled"),
        (_cancelled_by_nobody, "cancel is final", "j4 is cancelled, and nobody asked for it"),
        (_attempt_twice, "fenced", "j3: attempts were given out as [1, 1]"),
        (_attempts_backwards, "fenced", "j1: attempts were given out as [1, 2, 1]"),
        (_later_attempt, "fenced", "j3: attempt 2 was the last one given out, the result is of 1"),
        (_ran_twice, "fenced", "j5: attempt 1 was run 2 times"),
        (_two_submissions, "fenced", "j3: run orders for submissions [3, 44]"),
        (_forged, "no zombie", "j3: a forged outcome was taken"),
        (_forgery_recorded, "no zombie", "j5: a forged outcome of attempt 1 was recorded"),
        (_zombie_output, "no zombie", "j1: the outcome of attempt 2 on gpu2 says 'ran j1 1 gpu1"),
        (_other_gpu, "no zombie", "j3: attempt 1 was given to gpu1, the outcome is gpu7's"),
        (_never_ran, "no zombie", "j5: attempt 1 has an outcome of gpu1 and never ran to its end there"),
        (_too_many_losses, "bounded", f"j3 was lost {MAX_LOST + 1} times"),
        (_too_many_tries, "bounded", "j2 was tried again 2 times"),
        (_too_few_tries, "bounded", "j2 failed for good after 0 retries"),
        (_unexplained_attempt, "bounded", "j1: 2 attempts, 0 of them ended in a retry"),
        (_failed_once, "bounded", "j5 (after) failed 1 times"),
        (_no_final_event, "events match", "j3 is done, its events say nothing"),
        (_two_ends, "events match", "j3 is done, its events say ['done', 'failed']"),
        (_old_state, "events match", "j3: the last event is done, the bucket says scheduled"),
        (_late_event, "events match", "j3: the last event is running, the bucket says done"),
        (_missing_event, "events match", "j1: its history has retry 1, the events have not"),
        (_state_of_nothing, "events match", "j77 has a state and no result"),
        (_given_up, "finished", "the run was given up"),
    ],
)
def test_each_violation_is_caught(inject: Injection, rule: str, words: str) -> None:
    history = clean()
    inject(history)
    found = check(history, PLAN)
    assert any(one.startswith(f"{rule}: {words}") for one in found), found


@pytest.mark.parametrize(
    ("missed", "told", "excused"),
    [
        ([(12, 90)], True, True),
        ([], True, False),
        ([(2, 10)], True, False),  # before the order that was read
        ([(12, 90)], False, False),
    ],
)
def test_an_order_that_was_purged_unread_is_told_by_the_jobs_own_history(
    missed: list[tuple[int, int]], told: bool, excused: bool
) -> None:
    history = clean()
    history.orders.remove(order_of(history, "j1", 2))
    history.missed = missed
    if not told:
        steps = result_of(history, "j1").history
        change(history, "j1", history=[one for one in steps if (one.state, one.attempt) != ("scheduled", 2)])
    words = "fenced: j1: attempt 1 was the last one given out, the result is of 2"
    assert (words in check(history, PLAN)) is not excused


def test_each_rule_is_shown_to_catch_something() -> None:
    shown = {mark.args[1][n][1] for mark in test_each_violation_is_caught.pytestmark for n in range(len(mark.args[1]))}  # type: ignore[attr-defined]  # set by pytest.mark
    assert shown | {"order"} == {rule.__name__.strip("_").replace("_", " ") for rule in RULES}


# ---- order -----------------------------------------------------------------------------------------------------------


def served(*turns: tuple[Job, int, float, int, str], strict: bool = True) -> list[str]:
    """(job, sequence of its submission, time of the decision, term, reason), in the order of the stream."""
    plan = plan_of(*(turn[0] for turn in turns), strict=strict)
    history = clean()
    history.orders = [
        Order(100 + place, one.task_id, 1, "gpu0", "i", T0 + at, seq, reason, term)
        for place, (one, seq, at, term, reason) in enumerate(turns)
    ]
    return [one for one in check(history, plan) if one.startswith("order: ")]


HIGH, LOW, LATE = job(1, priority=5), job(2), job(3)


def test_strict_order_is_priority_then_arrival() -> None:
    assert served((HIGH, 2, 0, 1, ""), (LOW, 1, 1, 1, ""), (LATE, 3, 2, 1, "")) == []
    assert "j3 (priority 0, 3) went before j2 (priority 0, 1)" in served((LATE, 3, 0, 1, ""), (LOW, 1, 1, 1, ""))[0]
    assert "went before j1 (priority 5, 2)" in served((LATE, 3, 0, 1, ""), (HIGH, 2, 1, 1, ""))[0]


def test_who_had_not_come_yet_was_not_passed_over() -> None:
    assert served((LOW, 1, 0, 1, ""), (HIGH, 2, 1, 1, "")) == []
    assert (
        "j2 (priority 0, 1) went before j1" in served((LATE, 3, 0, 1, ""), (LOW, 1, 1, 1, ""), (HIGH, 2, 2, 1, ""))[-1]
    )


def test_decisions_of_one_moment_may_be_stored_in_any_order() -> None:
    assert served((LATE, 3, 0, 1, ""), (LOW, 1, 0, 1, "")) == []


def test_a_decision_that_died_with_its_conductor_comes_later() -> None:
    assert served((LATE, 3, 0, 1, ""), (LOW, 1, 9, 2, "")) == []
    assert "left that one to term 2" in served((LATE, 3, 0, 1, ""), (job(4), 4, 60, 1, ""), (LOW, 1, 70, 2, ""))[0]


def test_a_strict_order_needs_no_reasons() -> None:
    assert "where the order is strict" in served((LOW, 1, 0, 1, "j1 would be first, but"))[0]


def of(user: str, number: int, **more: Any) -> Job:
    return replace(job(number, **more), user=user)


USED = "j2 would be first, but alice has used 9 GPU seconds and bob 1"


def test_with_fair_turns_each_inversion_says_why() -> None:
    assert "went before" in served((LATE, 3, 0, 1, ""), (LOW, 1, 1, 1, ""), strict=False)[0]
    assert served((of("bob", 3), 3, 0, 1, USED), (LOW, 1, 1, 1, ""), strict=False) == []
    waited = "j1 would be first by priority, but this one has waited 12 s"
    turns = ((LOW, 1, 0, 1, waited), (LATE, 3, 1, 1, waited), (HIGH, 4, 2, 1, ""))
    assert served(*turns, strict=False) == []


def test_a_reason_explains_nobody_before_the_one_that_it_names() -> None:
    turns = ((of("bob", 3), 3, 0, 1, USED), (HIGH, 2, 1, 1, ""), (LOW, 1, 2, 1, ""))
    [found] = served(*turns, strict=False)
    assert "j3 (priority 0, 3) went before j1 (priority 5, 2) in term 1 and names j2, whose rank is lower" in found


def test_a_reason_may_name_one_that_was_cancelled_before_it_ran() -> None:
    """It never had a run order; its place is what its submitter was told."""
    cancelled = "j4 would be first by priority, but this one has waited 12 s"
    plan = plan_of(LOW, HIGH, job(4, "cancelled", priority=9, cancel=0.1), strict=False)
    history = clean()
    history.accepted = {"j2": 1, "j1": 2, "j4": 3}
    history.orders = [
        Order(100 + place, name, 1, "gpu0", "i", T0 + place, place, reason, 1)
        for place, (name, reason) in enumerate([("j2", cancelled), ("j1", "")], start=1)
    ]
    assert [one for one in check(history, plan) if one.startswith("order: ")] == []


AGE = "would be first by priority, but this one has waited 3 s"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("because", "its reason names no job"),
        ("j2 would be first, but", "names no job and no cause"),
        (f"j77 {AGE}", "names j77, which is no job"),
        (f"j2 {AGE}", "names j2, which had been started before"),
        (f"j9 {AGE}", "names j9, whose priority is lower"),
        (f"j5 {AGE}", "names j5, which came later"),
        (f"j5 {AGE}", "its reason is its age, and j5 has no higher priority"),
        (f"j6 {AGE}", "its reason is its age, and j6 has waited for longer"),
        (
            "j6 would be first, but bob has used 9 GPU seconds and alice 1",
            "compares alice with bob, not alice with alice",
        ),
        ("j8 would be first, but bob has used 1 GPU seconds and alice 2", "says that bob has used less than alice"),
    ],
)
def test_a_reason_must_be_true(reason: str, words: str) -> None:
    found = served(
        (LOW, 2, 0, 1, ""),
        (LATE, 3, 1, 1, reason),
        (job(9, priority=-5), 4, 2, 1, ""),
        (job(5), 5, 2, 1, ""),
        (job(6, priority=5), 1, 2, 1, ""),
        (of("bob", 8, priority=5), 6, 2, 1, ""),
        strict=False,
    )
    assert any(words in one for one in found), found


# ---- the history and the plan ----------------------------------------------------------------------------------------


def test_a_history_is_read_back_from_its_lines() -> None:
    body = {"ts": STAMP, "task_id": "j1", "attempt": 1, "gpu": "gpu0", "incarnation": "i", "enq_seq": 3}
    result = msgspec.to_builtins(result_of(clean(), "j1"))
    history = load(
        [
            {"what": "epoch", "seq": 1, "epoch": 1},
            {"what": "order", "seq": 4, "body": {**body, "gpu": "gpu5"}},
            {"what": "order", "seq": 4, "body": body},
            {"what": "epoch", "seq": 5, "epoch": 2},
            {"what": "order", "seq": 6, "body": {**body, "attempt": 2}},
            {"what": "accepted", "seqs": {"j1": 3}},
            {"what": "send", "ids": ["j1"]},
            {"what": "repeated", "seqs": {"j1": 3}},
            {"what": "cancel", "task_id": "j4", "verdict": "cancelled"},
            {"what": "result", "task_id": "j1", "body": result},
            {"what": "ran", "task_id": "j1", "step": "begun", "attempt": 1, "gpu": "gpu0"},
            {"what": "fault", "kind": "kill"},
            {"what": "complete"},
        ]
    )
    assert [(order.seq, order.attempt, order.gpu, order.term) for order in history.orders] == [
        (4, 1, "gpu0", 1),
        (6, 2, "gpu0", 2),
    ], "what stood at a place before a power cut was never on disk"
    assert (history.accepted, history.repeated, history.complete) == ({"j1": 3}, [("j1", 3)], True)
    assert encode(history.results[0][1]) == encode(result_of(clean(), "j1"))


@pytest.mark.parametrize("servers", [1, 3])
def test_a_seed_draws_the_same_plan_again_and_another_seed_another(servers: int) -> None:
    options = Options(seed=7, servers=servers)
    assert drawn(options) == drawn(options)
    assert drawn(options).faults != drawn(replace(options, seed=8)).faults
    plan = drawn(options)
    assert (len(plan.jobs), len(plan.faults)) == (options.jobs, options.faults)
    assert {fault.kind for fault in plan.faults} >= {"kill", "freeze", "power cut", "full disk", "clock step"}
    assert all(one.after in plan.jobs for one in plan.jobs.values() if one.after)


def test_a_fault_that_the_machine_cannot_have_is_not_drawn() -> None:
    plan = drawn(Options(seed=7, without=("slow disk", "clock step")))
    assert {"slow disk", "clock step"}.isdisjoint(fault.kind for fault in plan.faults)
