# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a submission and the end of an attempt mean."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.bus import messages
from organism.bus.jetstream import Stored
from organism.bus.messages import JobSpec, Report
from organism.core._limits import Limit
from organism.core._policy import Policy
from organism.maestro import intake, outcome
from organism.maestro.ledger import Job, Ledger
from organism.maestro.outcome import Again, Final, Rules

RULES = Rules(backoff=2.0, max_lost=2)
LIMIT = 100_000


def job(**values: Any) -> Job:
    made = Ledger().submitted(1, "alice", JobSpec(task_id="a", cmd=["true"], max_retries=2), b"{}", 0.0)
    assert made is not None
    made.attempt, made.gpu, made.phase = 1, "gpu0", "assigned"
    for name, value in values.items():
        setattr(made, name, value)
    return made


def report(**values: Any) -> Report:
    return Report(ts="", task_id="a", attempt=1, gpu_id="gpu0", incarnation="i", type="cmd", **values)


def test_success_is_done() -> None:
    final = outcome.of_report(job(), report(returncode=0, stdout="x", value={"n": 1}), RULES)
    assert isinstance(final, Final)
    assert (final.state, final.error, final.data["stdout"], final.data["value"]) == ("done", None, "x", {"n": 1})


@pytest.mark.parametrize("error", ["exit", "timeout", "signal", "start", "unheard_of"])
def test_a_failure_is_tried_again_with_growing_patience_and_then_final(error: str) -> None:
    """S1k-035."""
    bad = report(returncode=1, error=error)
    assert outcome.of_report(job(), bad, RULES) == Again(error, 2.0)
    assert outcome.of_report(job(tries=1), bad, RULES) == Again(error, 4.0)
    final = outcome.of_report(job(tries=2), bad, RULES)
    assert isinstance(final, Final)
    assert (final.state, final.error) == ("failed", error)
    assert "after 3 tries" in final.reason


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [outcome.backoff(tries, RULES) for tries in (0, 1, 2, 3, 8, 9, 99, 10**6)] == [
        2,
        2,
        4,
        8,
        256,
        300,
        300,
        300,
    ]
    assert outcome.backoff(1, Rules(backoff=600.0, max_backoff=300.0)) == 600


def test_a_return_code_without_an_error_word_is_a_failure() -> None:
    """S1j-D04."""
    assert outcome.of_report(job(), report(returncode=7), RULES) == Again("exit", 2.0)


def test_a_stopping_worker_costs_nothing_and_a_lost_one_a_loss() -> None:
    assert outcome.of_report(job(tries=2), report(error="shutdown"), RULES) == Again("shutdown", 0.0)
    assert outcome.of_report(job(), report(error="cancelled"), RULES) == Again("lost", 0.0, lost=True)
    assert outcome.of_loss(job(lost=1), "silence", RULES) == Again("lost", 0.0, lost=True)
    final = outcome.of_loss(job(lost=2), "silence", RULES)
    assert isinstance(final, Final)
    assert (final.state, final.error) == ("dead", "lost")
    assert "silence" in final.reason


def test_a_job_that_outgrows_the_cache_in_ram_goes_to_the_disk_once_and_pays_nothing() -> None:
    full = report(error="cache_full", returncode=1)
    assert outcome.of_report(job(tries=2), full, RULES) == Again("cache_full", 0.0)
    assert outcome.of_report(job(tries=1, on_disk=True), full, RULES) == Again("cache_full", 4.0)
    final = outcome.of_report(job(tries=2, on_disk=True), full, RULES)
    assert isinstance(final, Final)
    assert (final.state, final.error) == ("failed", "cache_full")


def test_what_a_worker_refuses_is_dead() -> None:
    final = outcome.of_report(job(), report(error="refused", message="no such type"), RULES)
    assert isinstance(final, Final)
    assert final.state == "dead"
    assert "no such type" in final.reason


def stored(data: bytes, seq: int = 9, user: str = "alice") -> Stored:
    return Stored(seq, f"gpu.task.enqueue.{user}.0", data, {}, 1000.5)


def test_a_good_submission() -> None:
    read = intake.read(stored(b'{"cmd": ["true"]}'), LIMIT)
    assert (read.problem, read.user, read.task_id) == ("", "alice", "task-1000500-9")
    assert read.spec == JobSpec(cmd=["true"])


@pytest.mark.parametrize(
    ("payload", "task_id", "word"),
    [
        ({"task_id": "a", "cmd": "true"}, "a", "$.cmd"),
        ({"task_id": "a", "cmd": ["true"], "prioritty": 3}, "a", "prioritty"),
        ({"task_id": "a", "type": "cmd"}, "a", "needs `cmd`"),
        ({"task_id": "a.b", "cmd": ["true"]}, "task-1000500-9", "task_id"),
        ({"task_id": 7, "cmd": ["true"]}, "task-1000500-9", "task_id"),
        ({"task_id": "a", "cmd": ["true"], "cwd": "../x"}, "a", "cwd"),
        ({"task_id": "a", "cmd": ["x" * LIMIT]}, "a", "too many"),
    ],
)
def test_a_bad_submission_keeps_its_id_if_it_has_one(payload: dict[str, Any], task_id: str, word: str) -> None:
    read = intake.read(stored(json.dumps(payload).encode()), LIMIT)
    assert read.spec is None
    assert read.task_id == task_id
    assert word in read.problem


@given(st.binary(max_size=200))
def test_no_payload_raises(data: bytes) -> None:
    read = intake.read(stored(data), LIMIT)
    assert bool(read.spec) != bool(read.problem)
    assert messages.encode(intake.letter(read, read.problem, "", LIMIT))


@given(st.one_of(st.binary(max_size=3000), st.text(max_size=3000).map(str.encode)))
def test_a_dead_letter_always_fits_and_says_when_it_was_cut(data: bytes) -> None:
    limit = intake.ORDER_OVERHEAD + 1000
    letter = intake.letter(intake.read(stored(data), LIMIT), "why", "", limit)
    assert len(messages.encode(letter)) < limit
    payload = base64.b64decode(letter.payload) if letter.encoding == "base64" else letter.payload.encode()
    assert data.startswith(payload)
    assert ("are kept" in letter.reason) == (payload != data)


def test_refusals_name_the_rule() -> None:
    spec, policy = JobSpec(cmd=["true"]), Policy()
    free = intake.Standing(Limit(), 10**6, 3600.0)
    room = {"jobs": 1, "max_jobs": 2, "size": 10, "used": 0, "room": 100}
    assert intake.refusal(spec, policy, free, **room) == ""
    assert "policy" in intake.refusal(JobSpec(type="shell", shell="x"), policy, free, **room)
    full = intake.refusal(spec, policy, free, **{**room, "jobs": 2})
    assert "MAX_QUEUE is 2" in full
    assert intake.event_of(full) == "queue_full"
    assert "bytes" in intake.refusal(spec, policy, free, **{**room, "used": 91})
    assert intake.refusal(spec, policy, free, **{**room, "used": 91, "room": 0}) == ""
