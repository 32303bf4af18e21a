# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much of the pool each user has and had: for limits, and for fair turns. No I/O, no clock.

Use fades: after each half-life it counts half. It is not written down; a conductor that takes over starts with what
runs at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from organism.core._limits import Limit, Limits
from organism.maestro.ledger import Job

STARTED = 1.0
"""Seconds that a job counts as used from its start on: of jobs that take no time each counts."""


@dataclass(frozen=True)
class Order:
    """How the queue is ordered beside priorities; with the defaults it is strict: priority, then arrival.

    ``aging``: points of priority that an hour of waiting is worth (AGING_PER_HOUR). ``half_life`` of use in seconds
    (FAIR_SHARE_HALF_LIFE_SEC); 0: whose turn it is does not matter.
    """

    aging: float = 0.0
    half_life: float = 0.0

    @property
    def strict(self) -> bool:
        return not self.aging and not self.half_life


@dataclass(slots=True)
class _User:
    limit: Limit
    running: int = 0
    gpus: int = 0
    """Of the running jobs."""
    seconds: float = 0.0
    """Sum of the time limits of the running jobs."""
    starts: float = 0.0
    """Sum of the times at which they started."""
    used: float = 0.0
    """GPU seconds as they counted at ``at``."""
    at: float = 0.0


class Shares:
    """Of all users."""

    def __init__(self, limits: Limits | None = None, half_life: float = 0.0) -> None:
        self.limits = limits or Limits()
        self.half_life = half_life
        self._users: dict[str, _User] = {}
        self._running: dict[int, tuple[str, float, float, int]] = {}

    def _user(self, name: str) -> _User:
        user = self._users.get(name)
        if user is None:
            user = self._users[name] = _User(self.limits.of(name))
        return user

    def limit(self, name: str) -> Limit:
        return self._user(name).limit

    def started(self, job: Job, now: float) -> None:
        """The job has a GPU."""
        if job.seq in self._running:
            return
        user = self._user(job.user)
        self._running[job.seq] = (job.user, now, job.timeout * job.gpus, job.gpus)
        user.running += 1
        user.gpus += job.gpus
        user.seconds += job.timeout * job.gpus
        user.starts += now * job.gpus

    def stopped(self, seq: int, now: float) -> float | None:
        """It has none any more; for how many seconds it had one, or None when it had none."""
        entry = self._running.pop(seq, None)
        if entry is None:
            return None
        name, since, timeout, gpus = entry
        user = self._user(name)
        user.used = self._faded(user, now) + max(STARTED, now - since) * gpus
        user.at = now
        user.running -= 1
        user.gpus -= gpus
        user.seconds -= timeout
        user.starts -= since * gpus
        if not user.running:
            user.seconds = user.starts = 0.0  # no rest of many additions
        return now - since

    def _faded(self, user: _User, now: float) -> float:
        if not user.used or not self.half_life:
            return user.used
        return float(user.used * 0.5 ** (max(0.0, now - user.at) / self.half_life))

    def usage(self, name: str, now: float) -> float:
        """GPU seconds that count against the user."""
        user = self._user(name)
        return self._faded(user, now) + max(user.gpus * STARTED, user.gpus * now - user.starts)

    def running(self, name: str) -> int:
        return self._user(name).running

    def bar(self, name: str) -> str:
        """Why no job of the user may start now; empty when one may."""
        user = self._user(name)
        return user.limit.hindrance(user.running, user.seconds)
