# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo's accounts: they must notice every way in which a job can be lost, doubled or end wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from lab.jobs import Job, audit, batch, counts, victim

JOBS = {
    "a": Job("good", ("true",), returncode=0, output="part-1"),
    "b": Job("bad", ("false",), "failed", returncode=3),
    "c": Job("slow", ("sleep", "9"), "failed", error="timeout"),
    "d": Job("unwanted", ("sleep", "9"), "cancelled", cancel=True),
}
Records = list[dict[str, Any]]


def listed() -> Records:
    states = {"a": "done", "b": "failed", "c": "failed", "d": "cancelled"}
    return [{"task_id": key, "state": value, "gpu": "gpu0", "attempt": 1} for key, value in states.items()]


def results() -> Records:
    ends = [
        {"task_id": "a", "ok": True, "state": "done", "error": None, "data": {"returncode": 0, "stdout": "part-1\n"}},
        {"task_id": "b", "ok": False, "state": "failed", "error": "exit code 3", "data": {"returncode": 3}},
        {"task_id": "c", "ok": False, "state": "failed", "error": "timeout", "data": None},
        {"task_id": "d", "ok": False, "state": "cancelled", "error": "cancelled", "data": None},
    ]
    return [{**end, "history": [{"state": "running"}, {"state": end["state"]}]} for end in ends]


def problems(listing: Records, ends: Records) -> dict[str, str]:
    return {account.task_id: "; ".join(account.problems) for account in audit(JOBS, listing, ends) if account.problems}


def test_right_ends_have_no_problems() -> None:
    assert problems(listed(), results()) == {}


@pytest.mark.parametrize(
    ("task_id", "change", "word"),
    [
        ("a", {"ok": False}, "ok=False"),
        ("a", {"state": "failed"}, "failed"),
        ("a", {"data": {"returncode": 1, "stdout": "part-1"}}, "exit code 1"),
        ("a", {"data": {"returncode": 0, "stdout": "part-2"}}, "part-1"),
        ("b", {"data": {"returncode": 1}}, "exit code 1"),
        ("b", {"ok": True}, "ok=True"),
        ("c", {"error": "exit code 9"}, "timeout"),
        ("d", {"state": "done", "ok": True}, "cancelled"),
    ],
)
def test_a_wrong_end_is_noticed(task_id: str, change: dict[str, Any], word: str) -> None:
    ends = [{**result, **(change if result["task_id"] == task_id else {})} for result in results()]
    found = problems(listed(), ends)
    assert set(found) == {task_id}
    assert word in found[task_id]


def test_lost_doubled_and_unfinished_jobs_are_noticed() -> None:
    assert "0 results" in problems(listed(), results()[1:])["a"]
    assert "2 results" in problems(listed(), [results()[0], *results()])["a"]
    twice = {**results()[0], "history": [{"state": "done"}, {"state": "done"}]}
    assert "2 final states" in problems(listed(), [twice, *results()[1:]])["a"]
    assert "listed 2 times" in problems([listed()[0], *listed()], results())["a"]
    assert "listed 0 times" in problems(listed()[1:], results())["a"]
    unfinished = [{**listed()[0], "state": "running"}, *listed()[1:]]
    assert "not in a final state" in problems(unfinished, results())["a"]
    assert set(problems([], [])) == set(JOBS)


def test_the_batch_is_what_the_story_says() -> None:
    jobs = batch()
    assert len(jobs) == 24
    assert sum(job.want == "done" for job in jobs) == 18
    assert sum(job.returncode == 3 for job in jobs) == 4
    assert [job.error for job in jobs if job.error] == ["timeout"]
    assert sum(job.cancel for job in jobs) == 1


def test_the_victim_is_the_job_that_is_meant_to_lose_its_worker() -> None:
    jobs = {str(number): job for number, job in enumerate(batch())}
    (chosen,) = (key for key, job in jobs.items() if job.victim)
    other = {"task_id": "0", "state": "running", "gpu": "gpu0"}
    waiting = {"task_id": chosen, "state": "scheduled", "gpu": "gpu3"}
    assert victim(jobs, [other, waiting]) is None
    assert victim(jobs, [other, {**waiting, "state": "running"}]) == ("gpu3", chosen)
    assert counts(jobs, [other, waiting])["unseen"] == 22


def test_a_victim_that_ran_only_once_was_never_killed() -> None:
    job = Job("loses its worker", ("true",), victim=True)
    for attempt, problems in ((1, ("it ran once only, although its worker was killed",)), (2, ())):
        (account,) = audit({"a": job}, [{**listed()[0], "attempt": attempt}], results()[:1])
        assert account.problems == problems
