# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run does, drawn from its seed: the pool, the jobs and their groups, and each fault with its time. No I/O.

The same seed and options give the same plan; what the processes make of it still depends on the machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

USERS = ("alice", "bob")
GPUS = tuple(f"gpu{number}" for number in range(12))
CONDUCTORS = ("a", "b")
MAX_LOST = 30
MAX_RETRIES = 1
TAIL = 0.12
"""Share of the time in which no new fault begins and no job comes, so that most is over when the clock is."""

FaultKind = Literal[
    "kill", "freeze", "restart", "cut", "full disk", "slow disk", "power cut", "clock step",
    "duplicate submit", "redelivery storm", "zombie report",
]  # fmt: skip
JobKind = Literal["quick", "noop", "failing", "long", "cancelled", "after", "after failed"]

_PARTS = {"worker": 10, "conductor": 5, "server": 4, "submitter": 1}
_KINDS: dict[FaultKind, int] = {
    "kill": 28, "freeze": 14, "restart": 10, "cut": 14, "full disk": 4, "slow disk": 4, "power cut": 6,
    "clock step": 5, "duplicate submit": 5, "redelivery storm": 4, "zombie report": 6,
}  # fmt: skip
_JOBS: dict[JobKind, int] = {
    "quick": 50, "noop": 25, "failing": 7, "long": 5, "cancelled": 6, "after": 4, "after failed": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """``servers`` 1 or 3. ``strict``: no aging, no fair turns. ``without``: faults that this machine cannot have."""

    seed: int
    minutes: float = 10.0
    jobs: int = 2_000
    faults: int = 120
    servers: int = 1
    strict: bool = True
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """``at`` and ``lasts`` in seconds; ``amount`` is the fault's own measure (seconds of a clock's step, ...)."""

    number: int
    at: float
    kind: FaultKind
    victim: str
    lasts: float = 0.0
    amount: float = 0.0


@dataclass(frozen=True)
class Job:
    """One submission. ``seconds``: what its process takes; ``cancel``: seconds from acceptance to cancellation."""

    task_id: str
    user: str
    kind: JobKind
    priority: int = 0
    seconds: float = 0.0
    after: str = ""
    cancel: float | None = None

    @property
    def fails(self) -> bool:
        return self.kind == "failing"

    @property
    def plain(self) -> bool:
        """Any GPU may take it at any time: such jobs can be compared with each other."""
        return not self.after


@dataclass(frozen=True)
class Group:
    """Jobs of one user that are sent together at ``at`` seconds."""

    at: float
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Plan:
    options: Options
    groups: tuple[Group, ...]
    faults: tuple[Fault, ...]
    window: int = 600
    """The server's duplicate window, seconds."""
    jobs: dict[str, Job] = field(default_factory=dict)


def drawn(options: Options) -> Plan:
    """The plan of these options."""
    chance = random.Random(options.seed)
    window = chance.choice((60, 600))
    groups = tuple(_groups(options, random.Random(chance.random())))
    faults = tuple(_faults(options, random.Random(chance.random())))
    return Plan(options, groups, faults, window, {job.task_id: job for group in groups for job in group.jobs})


def _groups(options: Options, chance: random.Random) -> list[Group]:
    span = options.minutes * 60 * (1 - TAIL)
    groups: list[Group] = []
    made = 0
    while made < options.jobs:
        size = min(options.jobs - made, chance.choice((1, 1, 2, 5, 10, 40)))
        user = chance.choice(USERS)
        jobs: list[Job] = []
        for _number in range(size):
            jobs.append(_job(f"c{options.seed}-{made}", user, jobs, chance))
            made += 1
        groups.append(Group(0.0, tuple(jobs)))
    done = 0
    spread: list[Group] = []
    for group in groups:
        spread.append(Group(round(span * done / options.jobs, 2), group.jobs))
        done += len(group.jobs)
    return spread


def _job(task_id: str, user: str, before: Sequence[Job], chance: random.Random) -> Job:
    kind = chance.choices(list(_JOBS), weights=list(_JOBS.values()))[0]
    priority = chance.choice((0, 0, 0, 0, 5, -5, 20))
    after = ""
    if kind in ("after", "after failed"):
        wanted = "failing" if kind == "after failed" else "quick"
        able = [job.task_id for job in before if job.kind == wanted]
        if not able:
            kind = "quick"
        else:
            after = chance.choice(able)
    seconds = {"long": chance.uniform(2, 5), "cancelled": chance.uniform(0.5, 3)}.get(kind, chance.uniform(0, 0.4))
    cancel = round(chance.uniform(0, 1.5), 2) if kind == "cancelled" else None
    return Job(task_id, user, kind, priority, round(seconds, 2), after, cancel)


def _faults(options: Options, chance: random.Random) -> list[Fault]:
    kinds = {kind: weight for kind, weight in _KINDS.items() if kind not in options.without}
    span = options.minutes * 60
    times = sorted(chance.uniform(span * 0.03, span * (1 - TAIL)) for _number in range(options.faults))
    # each kind at least once, as far as there are enough of them; the rest by weight
    chosen = list(kinds)[: options.faults]
    chosen += chance.choices(list(kinds), weights=list(kinds.values()), k=options.faults - len(chosen))
    chance.shuffle(chosen)
    return [
        _fault(number, round(at, 2), kind, options, chance)
        for number, (at, kind) in enumerate(zip(times, chosen, strict=True))
    ]


def _fault(number: int, at: float, kind: FaultKind, options: Options, chance: random.Random) -> Fault:
    lasts = amount = 0.0
    if kind in ("full disk", "slow disk", "power cut"):
        part = "server"
    elif kind == "clock step":
        part = chance.choice(("worker", "conductor"))
        amount = chance.choice((-7200.0, -90.0, -5.0, 5.0, 90.0, 7200.0, 400 * 86_400.0))
    elif kind == "duplicate submit":
        part = "submitter"
    elif kind in ("redelivery storm", "zombie report"):
        part = "worker"
    else:
        part = chance.choices(list(_PARTS), weights=list(_PARTS.values()))[0]
    if kind in ("freeze", "cut"):
        lasts = chance.choice((0.5, 2.0, 4.0, 8.0))
    elif kind in ("full disk", "slow disk"):
        lasts = chance.uniform(2, 6)
        amount = chance.choice((0.005, 0.02)) if kind == "slow disk" else 0.0
    elif kind in ("kill", "restart", "power cut"):
        lasts = chance.choice((0.0, 0.3, 2.0))
    return Fault(number, at, kind, _victim(part, options, chance), round(lasts, 2), amount)


def _victim(part: str, options: Options, chance: random.Random) -> str:
    if part == "worker":
        return f"worker.{chance.choice(GPUS)}"
    if part == "conductor":
        return f"conductor.{chance.choice(CONDUCTORS)}"
    if part == "server":
        return f"server.{chance.randrange(options.servers)}"
    return "submitter"
