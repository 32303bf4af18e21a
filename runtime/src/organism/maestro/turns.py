# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose turn it is during one round of decisions, and the sentence why somebody else's was not. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable

from organism.maestro.ledger import Job
from organism.maestro.lines import Entry, strictly
from organism.maestro.shares import Order, Shares


def entry_of(job: Job, order: Order) -> Entry:
    """The job's place among all who wait, apart from who has used how much; it does not change with time."""
    if order.aging:
        # all jobs age alike: who is before whom does not change with time
        return (0.0, job.submitted - job.priority * 3600.0 / order.aging, job.seq)
    return (-float(job.priority), 0.0, job.seq)


class Turns:
    """``now`` in seconds."""

    def __init__(self, shares: Shares, order: Order, now: float) -> None:
        self.shares, self.order, self.now = shares, order, now
        self._used: dict[str, float] = {}
        self._bars: dict[str, str] = {}

    def rank(self, entry: Entry, user: str) -> Entry:
        """The entry, with the user's use as a handicap: a second of use is a second of waiting."""
        if not self.order.half_life:
            return entry
        used = self._used.get(user)
        if used is None:
            used = self._used[user] = self.shares.usage(user, self.now)
        return (entry[0], entry[1] + used, entry[2])

    def bar(self, user: str) -> str:
        found = self._bars.get(user)
        if found is None:
            found = self._bars[user] = self.shares.bar(user)
        return found

    def moved(self, user: str) -> None:
        """The user gets a GPU: what is remembered of them is no longer true."""
        self._used.pop(user, None)
        self._bars.pop(user, None)

    def reason(self, job: Job, passed: Iterable[Job], waiting: Iterable[Job]) -> str:
        """Why the job goes before others that strict order puts first; empty when it goes before none.

        ``passed``: of those who may start and of those who may not the first in strict order, where that is before the
        job. ``waiting``: jobs whose turn it is and that wait for several GPUs. So of whoever else is passed over, one
        before them with the same cause is named.
        """
        parts = [f"{other.task_id} would be first{self._cause(job, other)}" for other in sorted(passed, key=strictly)]
        held = min(waiting, key=strictly, default=job)
        if strictly(held) < strictly(job):
            parts.append(f"{held.task_id} would be first, but waits for {held.gpus} GPUs of one host at the same time")
        return "; ".join(parts)

    def _cause(self, job: Job, other: Job) -> str:
        bar = self.shares.bar(other.user) if other.user != job.user else ""
        if bar:
            return f", but {bar}"
        if other.user != job.user and entry_of(other, self.order) < entry_of(job, self.order):
            # so it is not by its age alone
            mine, theirs = _apart(*(self.shares.usage(user, self.now) for user in (job.user, other.user)))
            return f", but {other.user} has used {theirs} GPU seconds and {job.user} {mine}"
        return f" by priority, but this one has waited {self.now - job.submitted:.0f} s"


def _apart(one: float, other: float) -> tuple[str, str]:
    """With as many digits as it takes to tell which is more."""
    texts = "", ""
    for digits in (0, 3, 9):
        texts = f"{one:.{digits}f}", f"{other:.{digits}f}"
        if texts[0] != texts[1]:
            break
    return texts
