# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A line's two ends are those of a sorted list, and it keeps no more than a bounded share of who has left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.bus.messages import JobSpec
from organism.maestro.ledger import Job, Ledger
from organism.maestro.lines import SLACK, Class, Line, strictly
from organism.maestro.shares import Order
from organism.maestro.turns import entry_of

AGED, STRICT = Order(aging=1), Order()


class Row:
    """A line and the jobs in it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.ledger = Ledger()
        self.ready: dict[int, tuple[Job, Line]] = {}
        self.line = Line(Class(None, "cmd", 0, None, "alice", "default"), self.ready, aged=bool(order.aging))

    def come(self, priority: int, at: float) -> Job:
        job = self.ledger.submitted(
            len(self.ledger.jobs) + 1, "alice", JobSpec(cmd=["true"], priority=priority), b"{}", at
        )
        assert job is not None
        self.again(job)
        return job

    def again(self, job: Job) -> None:
        self.ready[job.seq] = (job, self.line)
        self.line.add(job, entry_of(job, self.order))

    def go(self, job: Job) -> None:
        del self.ready[job.seq]
        self.line.left()

    def kept(self) -> int:
        return len(self.line._turns) + len(self.line._strict)


@settings(deadline=None)
@given(
    st.sampled_from([AGED, STRICT]),
    st.lists(st.one_of(st.integers(-3, 3), st.sampled_from(["first", "head", "last", "again"])), max_size=60),
)
def test_the_ends_are_those_of_a_sorted_list(order: Order, steps: list[int | str]) -> None:
    row = Row(order)
    gone: list[Job] = []
    for number, step in enumerate(steps):
        there = [job for job, _ in row.ready.values()]
        if isinstance(step, int):
            row.come(step, 3600.0 * number)
        elif step == "again" and gone:
            row.again(gone.pop())
        elif there and step != "again":
            job = {"first": row.line.first(), "head": row.ready[row.line.head()[2]][0], "last": there[-1]}[step]
            row.go(job)
            gone.append(job)
        there = [job for job, _ in row.ready.values()]
        assert row.line.waiting == len(there)
        if there:
            assert row.line.head() == min(entry_of(job, order) for job in there)
            assert row.line.first() is min(there, key=strictly)


@pytest.mark.parametrize("order", [AGED, STRICT])
def test_who_left_is_not_kept_for_ever(order: Order) -> None:
    row = Row(order)
    row.come(9, 0.0)  # in front of all others: nothing surfaces behind it
    oldest = row.come(0, -1e6)
    for number in range(2000):
        row.go(row.come(-5, float(number)))
        row.go(oldest)
        row.again(oldest)
        assert row.kept() <= 4 * row.line.waiting + SLACK + 2
    assert row.line.waiting == 2


def test_a_line_knows_what_its_jobs_have_asked_for_at_least_and_at_most() -> None:
    row = Row(STRICT)
    assert row.line.least > row.line.most, "nobody has"
    for number, size in enumerate((8000, 4000, 16000)):
        job = row.ledger.submitted(number + 1, "alice", JobSpec(cmd=["true"], min_vram_mb=size), b"{}", 0.0)
        assert job is not None
        row.again(job)
    assert (row.line.least, row.line.most) == (4000, 16000)
