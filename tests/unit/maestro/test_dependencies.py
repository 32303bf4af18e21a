# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who waits for whom, and when a wait is over or in vain."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.bus import messages
from organism.bus.messages import After, BadMessage, JobSpec
from organism.maestro.dependencies import Dependencies, sort_out
from organism.maestro.ledger import Job, Ledger

FINAL = ("done", "failed", "cancelled", "dead")
On = Literal["ok", "failed", "any"]


def ledger_of(*specs: JobSpec, user: str = "alice") -> tuple[Ledger, list[Job]]:
    ledger = Ledger()
    jobs = []
    for seq, spec in enumerate(specs, start=1):
        job = ledger.submitted(seq, user, spec, b"{}", 0.0)
        assert job is not None
        jobs.append(job)
    return ledger, jobs


def spec(task_id: str, *after: After, **values: object) -> JobSpec:
    return JobSpec(task_id=task_id, cmd=["true"], after=list(after), **values)  # type: ignore[arg-type]  # by name


def own(user: str, owner: str) -> bool:
    return user == owner


@pytest.mark.parametrize(("on", "good"), [
    ("ok", {"done"}), ("failed", {"failed", "cancelled", "dead"}), ("any", set(FINAL)),
])  # fmt: skip
def test_each_condition_is_met_by_its_final_states(on: On, good: set[str]) -> None:
    need = After("a", on)
    assert {state for state in FINAL if need.met(state)} == good


def test_an_unfinished_job_is_waited_for_and_an_ended_one_judged() -> None:
    ledger, (_, b) = ledger_of(spec("a"), spec("b", After("a"), After("old"), After("older", "failed")))
    ended = {"old": ("done", "alice"), "older": ("dead", "alice")}
    assert sort_out(b, ledger.by_id, ended, own) == ([After("a")], "")
    waiting, why = sort_out(b, ledger.by_id, {**ended, "old": ("cancelled", "alice")}, own)
    assert waiting == []
    assert "old" in why
    assert "cancelled" in why


def test_what_one_may_not_see_does_not_exist() -> None:
    ledger, _ = ledger_of(spec("a"), user="bob")
    job = ledger.submitted(9, "alice", spec("b", After("a")), b"{}", 0.0)
    assert job is not None
    assert sort_out(job, ledger.by_id, {}, own)[1].endswith("there is no such job")
    assert sort_out(job, {}, {"a": ("done", "bob")}, own)[1].endswith("there is no such job")
    assert sort_out(job, ledger.by_id, {}, lambda *_: True) == ([After("a")], "")


def test_a_job_goes_when_the_last_of_its_needs_has_ended() -> None:
    _, (_, _, c) = ledger_of(spec("a"), spec("b"), spec("c", After("a"), After("b", "any")))
    held = Dependencies()
    held.hold(c, list(c.after))
    assert held.why(c) == "waits for the end of a, b"
    assert held.ended("a", "done") == ([], [])
    assert c in held
    assert held.ended("b", "failed") == ([c], [])
    assert c not in held
    assert (held.why(c), len(held)) == ("", 0)


def test_a_wait_that_is_in_vain_ends_at_once_and_says_why() -> None:
    _, (_, _, c) = ledger_of(spec("a"), spec("b"), spec("c", After("a"), After("b")))
    held = Dependencies()
    held.hold(c, list(c.after))
    ready, [(job, why)] = held.ended("a", "dead")
    assert (ready, job) == ([], c)
    assert "a" in why
    assert "dead" in why
    assert held.ended("b", "done") == ([], [])


def test_a_job_that_was_cancelled_is_let_go_of() -> None:
    _, (_, b) = ledger_of(spec("a"), spec("b", After("a")))
    held = Dependencies()
    held.hold(b, list(b.after))
    held.release(b)
    held.release(b)
    assert held.ended("a", "done") == ([], [])
    assert len(held) == 0


@given(st.data())
def test_every_job_goes_exactly_once_or_never_can(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    specs = []
    for number in range(count):
        earlier = data.draw(st.lists(st.integers(0, max(0, number - 1)), unique=True, max_size=3)) if number else []
        whens = [data.draw(st.sampled_from(("ok", "failed", "any"))) for _ in earlier]
        specs.append(spec(f"j{number}", *(After(f"j{other}", on) for other, on in zip(earlier, whens, strict=True))))
    _, jobs = ledger_of(*specs)
    held = Dependencies()
    for job in jobs:
        if job.after:
            held.hold(job, list(job.after))
    open_jobs = [job for job in jobs if not job.after]
    fate = dict.fromkeys((job.task_id for job in jobs), "")
    while open_jobs:
        job = open_jobs.pop(data.draw(st.integers(0, len(open_jobs) - 1)))
        assert fate[job.task_id] == ""
        todo = [(job.task_id, data.draw(st.sampled_from(FINAL)))]
        while todo:
            task_id, state = todo.pop()
            fate[task_id] = state
            ready, never = held.ended(task_id, state)
            open_jobs += ready
            todo += [(other.task_id, "cancelled") for other, _ in never]
    assert all(fate.values())
    assert len(held) == 0
    for job in jobs:
        met = all(need.met(fate[need.task_id]) for need in job.after)
        assert met or fate[job.task_id] == "cancelled"


def test_the_first_with_a_unique_key_keeps_it_until_it_has_ended() -> None:
    ledger, (a, b) = ledger_of(spec("a", unique="nightly"), spec("b", unique="nightly"))
    other = ledger.submitted(7, "bob", spec("c", unique="nightly"), b"{}", 0.0)
    assert other is not None
    assert (ledger.rival(a), ledger.rival(b), ledger.rival(other)) == (None, a, None)
    ledger.drop(a.seq)
    assert ledger.rival(b) is None
    ledger.drop(b.seq)
    ledger.drop(other.seq)
    assert ledger.by_key == {}


@pytest.mark.parametrize("after", [[After("me")], [After("a"), After("a", "any")]])
def test_impossible_needs_are_refused_before_they_are_sent(after: list[After]) -> None:
    with pytest.raises(BadMessage, match="after"):
        messages.check_spec(JobSpec(task_id="me", cmd=["true"], after=after))
