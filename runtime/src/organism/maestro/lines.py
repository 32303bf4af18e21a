# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The waiting jobs of one class: who is next by turn, and who would be by strict order.

Both ends are found in the time of one heap operation, however many wait. No I/O and no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

from organism.maestro.ledger import Job


class Class(NamedTuple):
    """What a GPU must be for a job: jobs with equal constraints wait in one line."""

    pin: str | None
    type: str
    size: int
    """Index in the fleet's memory sizes of the smallest that suffices."""
    excluded: str | None
    user: str
    queue: str
    gpus: int = 1
    model: str | None = None
    """Part of the model's name, in small letters."""
    level: int = 0
    """What the worker must know (``messages.SPEC_LEVEL``)."""


Entry = tuple[float, float, int]
"""(-priority, 0, sequence); with aging (0, the time from which it would have waited with priority 0, sequence)."""

SLACK = 64
"""Dead entries that a line may have beside as many as live ones."""


def strictly(job: Job) -> tuple[int, int]:
    """Smaller goes first where nothing but priority and arrival counts."""
    return (-job.priority, job.seq)


class Line:
    """Jobs come in any order; one that leaves is skipped when its entry surfaces, or swept out with others.

    ``ready`` holds, by sequence, the jobs that wait and the line of each; the scheduler keeps it. Without aging the two
    orders are the same, and one heap serves both.
    """

    __slots__ = ("_ready", "_strict", "_turns", "aged", "key", "least", "most", "waiting")

    def __init__(self, key: Class, ready: Mapping[int, tuple[Job, Line]], *, aged: bool) -> None:
        self.key = key
        self.waiting = 0
        """How many jobs; a line without any has no head."""
        self._ready = ready
        self._turns: list[Entry] = []
        self._strict: list[tuple[int, int]] = []
        self.least, self.most = 2**63, 0
        """Of the memory sizes, in MiB, that its jobs have asked for."""
        self.aged = aged
        """Else the first is the head."""

    def add(self, job: Job, entry: Entry) -> None:
        """The job is in ``ready`` with this line already."""
        self.waiting += 1
        self.least, self.most = min(self.least, job.min_vram_mb), max(self.most, job.min_vram_mb)
        heapq.heappush(self._turns, entry)
        if self.aged:
            heapq.heappush(self._strict, strictly(job))
        if len(self._turns) + len(self._strict) > (4 if self.aged else 2) * self.waiting + SLACK:
            self._sweep()

    def left(self) -> None:
        """One of its jobs is in ``ready`` no longer."""
        self.waiting -= 1

    def _waits(self, seq: int) -> bool:
        entry = self._ready.get(seq)
        return entry is not None and entry[1] is self

    def head(self) -> Entry:
        """Whose turn it is."""
        turns = self._turns
        while not self._waits(turns[0][2]):
            heapq.heappop(turns)
        return turns[0]

    def first(self) -> Job:
        """Who would be next by strict order."""
        if not self.aged:
            return self._ready[self.head()[2]][0]
        while not self._waits(self._strict[0][1]):
            heapq.heappop(self._strict)
        return self._ready[self._strict[0][1]][0]

    def _sweep(self) -> None:
        """Take out dead entries, and second ones of jobs that came again; each was paid for by a job that came."""
        self._turns = list({entry for entry in self._turns if self._waits(entry[2])})
        self._strict = list({entry for entry in self._strict if self._waits(entry[1])})
        heapq.heapify(self._turns)
        heapq.heapify(self._strict)
