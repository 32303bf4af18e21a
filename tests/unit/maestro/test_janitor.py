# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is written down as final, and what may be removed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from organism.bus.messages import JobSpec
from organism.maestro.janitor import Janitor, next_record, prefix_end
from organism.maestro.ledger import Ledger


def test_a_job_that_is_unfinished_is_never_written_down_as_final(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    ledger.submitted(7, "alice", JobSpec(argv=["true"]), b"", 0.0)
    janitor = Janitor(cast(Any, SimpleNamespace(ledger=ledger)))
    janitor.retire(7)
    assert janitor._pending == [] and "submission 7 was to be written down as final" in caplog.text
    ledger.drop(7)
    janitor.retire(7, 9)
    assert (janitor._pending, list(janitor._removable)) == ([7], [(7, True), (9, False)])


def test_results_are_settled_with_the_last_record_that_their_jobs_are_in() -> None:
    many = list(range(1, 1502))
    first, upto = next_record(many, 40, 10)
    assert (len(first), upto) == (1000, 10)
    assert next_record(many[1000:], 40, upto) == (many[1000:], 40)


@pytest.mark.parametrize(
    ("needed", "unread", "end"), [(None, False, 90), (50, False, 50), (None, True, 61), (50, True, 50)]
)
def test_a_prefix_ends_before_all_that_is_needed(needed: int | None, unread: bool, end: int) -> None:
    assert prefix_end(100, 90, needed, 60, unread=unread) == end
