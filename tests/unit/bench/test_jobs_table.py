# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure part of ./run bench jobs."""

from __future__ import annotations

import pytest
from bench.jobs_table import Column, Goal, middle, percentile, ratios, spread, table


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no value"):
        percentile([], 0.5)


def test_spread_is_in_milliseconds() -> None:
    assert spread([0.001, 0.002, 0.004]) == {"p50": 2.0, "p99": 4.0, "max": 4.0, "count": 3}


def test_the_middle_of_rounds_leaves_out_what_was_not_measured() -> None:
    found = middle([{"a": 1.0, "b": None}, {"a": 9.0, "b": 3.0}, {"a": 2.0}, {"c": None}])
    assert found == {"a": 2.0, "b": 3.0, "c": None}


def test_the_table_says_what_is_not_there() -> None:
    rows = {"ours": {"rate": 1234.4, "p99": 2.0}, "a longer name": {"rate": 5.0}}
    assert table(rows, (Column("rate", "jobs/s", 0), Column("p99", "p99 ms")), "system").splitlines() == [
        "system         jobs/s  p99 ms",
        "ours            1,234     2.0",
        "a longer name       5       -",
    ]


def test_ratios_are_ours_to_theirs() -> None:
    rows: dict[str, dict[str, float | None]] = {"maestro": {"rate": 10.0}, "x": {"rate": 4.0}, "y": {"rate": None}}
    assert ratios(rows, "rate") == {"x": 2.5}
    assert ratios({"x": {"rate": 4.0}}, "rate") == {}


@pytest.mark.parametrize(
    ("value", "most", "met", "word"),
    [(5.0, False, True, "met"), (3.0, False, False, "MISSED"), (3.0, True, True, "met"),
     (None, True, None, "not measured")],
)  # fmt: skip
def test_goals_say_whether_they_are_met(value: float | None, most: bool, met: bool | None, word: str) -> None:
    goal = Goal("speed", value, 4, most=most)
    assert goal.met is met
    assert goal.told().endswith(f": {word}")
    assert goal.as_json()["met"] is met
