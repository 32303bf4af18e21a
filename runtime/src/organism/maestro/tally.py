# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a conductor counts and times during a term; no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from organism.exposition import MILLISECONDS, SECONDS, Counter, Family, Histogram
from organism.maestro.ledger import Job

PREFIX = "organism_maestro"


def _waits() -> Histogram:
    about = "Time from submission, or the end of a delay, to the first dispatch; without jobs that wait for others."
    return Histogram(f"{PREFIX}_wait_seconds", about, "type", SECONDS)


def _runs() -> Histogram:
    return Histogram(f"{PREFIX}_run_seconds", "Time that an attempt held its GPU.", "type", SECONDS)


def _latencies() -> Histogram:
    about = "Time from the decision about a job to its order being on the bus's disk."
    return Histogram(f"{PREFIX}_dispatch_seconds", about, "type", MILLISECONDS)


def _retries() -> Counter:
    return Counter(f"{PREFIX}_retries_total", "Attempts that are followed by another one, by their error.", "error")


def _complaints() -> Counter:
    return Counter(f"{PREFIX}_complaints_total", "What operators should know, by event (as on maestro.state).", "event")


@dataclass
class Tally:
    """One term's numbers; a new term starts at zero, which rate() takes for the restart that it is."""

    waits: Histogram = field(default_factory=_waits)
    runs: Histogram = field(default_factory=_runs)
    latencies: Histogram = field(default_factory=_latencies)
    retries: Counter = field(default_factory=_retries)
    complaints: Counter = field(default_factory=_complaints)

    def dispatched(self, job: Job, ready: float, decided: float, committed: float) -> None:
        """A run order is on disk; ``ready`` is when the job could have started. Seconds of one clock."""
        if job.attempt == 1 and not job.after:
            self.waits.observe(job.type, decided - ready)
        self.latencies.observe(job.type, committed - decided)

    def held(self, job: Job, seconds: float | None) -> None:
        """An attempt is over; None when it never held a GPU."""
        if seconds is not None:
            self.runs.observe(job.type, seconds)

    def families(self, common: dict[str, str]) -> list[Family]:
        parts = (self.waits, self.runs, self.latencies, self.retries, self.complaints)
        return [part.family(common) for part in parts]
