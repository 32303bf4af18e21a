# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a later version wrote is not passed over in silence; what a submitter of a later version wants is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from organism.bus.jetstream import Stored
from organism.core import _bus
from organism.maestro import intake, takeover
from organism.maestro.ledger import Defaults, Ledger
from organism.maestro.takeover import Inheritance, TooNew

LATER: dict[str, Any] = {"v": 2, "ts": "2026-11-22T10:00:00.000Z", "task_id": "t", "attempt": 1, "enq_seq": 3}


def stored(subject: str, body: dict[str, Any]) -> Stored:
    return Stored(7, subject, json.dumps(body).encode(), {}, 0.0)


def left() -> Inheritance:
    return Inheritance(Ledger(Defaults()))


@pytest.mark.parametrize("subject", [_bus.run_subject("gpu0"), _bus.journal_subject()])
def test_a_conductor_does_not_lead_after_a_later_one_whose_records_it_cannot_read(subject: str) -> None:
    with pytest.raises(TooNew, match=rf"record 7 on {subject} has version 2, .* reads up to 1: it does not lead"):
        takeover.apply(left(), stored(subject, LATER), _bus.DEFAULT_SHARD, 10_000)


def test_a_later_version_s_result_is_not_taken_for_no_result() -> None:
    with pytest.raises(TooNew, match="ORG_RESULTS: record 7"):
        takeover.apply_result(left(), stored(_bus.result_subject("t"), LATER))


def test_a_damaged_record_stops_nobody() -> None:
    found = left()
    for body in ({"v": 1, "kind": "nonsense"}, {"v": "two"}):
        takeover.apply(found, stored(_bus.journal_subject(), body), _bus.DEFAULT_SHARD, 10_000)
        takeover.apply(found, stored(_bus.run_subject("gpu0"), body), _bus.DEFAULT_SHARD, 10_000)
    assert len(found.ledger) == 0


def test_a_submission_of_a_later_version_is_refused_with_the_reason_and_keeps_its_id() -> None:
    found = intake.read(stored(_bus.enqueue_subject("alice"), {"v": 2, "task_id": "mine", "cmd": ["true"]}), 10_000)
    assert (found.spec, found.task_id) == (None, "mine")
    assert found.problem.startswith("the job is written in version 2 of its schema, this conductor reads up to 1")
