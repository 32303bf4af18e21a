# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happened in a run, as the checker reads it: from the suite's notebook and the submitter's. No judgement here."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from organism.bus.messages import Result, StateEvent, seconds_since_epoch


@dataclass(frozen=True)
class Order:
    """A run order as it was seen in the queue's stream. ``at``: when the conductor decided, by its clock."""

    seq: int
    task_id: str
    attempt: int
    gpu: str
    incarnation: str
    at: float
    enq_seq: int
    reason: str = ""
    term: int = 0


@dataclass(frozen=True)
class Run:
    """What a job wrote down itself: ``step`` is ``begun`` or ``ended``."""

    task_id: str
    step: str
    attempt: int
    gpu: str


@dataclass
class History:
    accepted: dict[str, int] = field(default_factory=dict)
    """Job -> the sequence that its submitter was told."""
    sent: set[str] = field(default_factory=set)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    """(job, sequence) told for a repetition with the same content."""
    contradicted: set[str] = field(default_factory=set)
    queued: dict[int, str] = field(default_factory=dict)
    cancels: dict[str, str] = field(default_factory=dict)
    cancelling: set[str] = field(default_factory=set)
    orders: list[Order] = field(default_factory=list)
    missed: list[tuple[int, int]] = field(default_factory=list)
    """(first, last) of the queue's stream that were purged before the recorder, cut off, could read them."""
    results: list[tuple[str, Result]] = field(default_factory=list)
    """(id in the subject, result), in the stream's order."""
    events: list[StateEvent] = field(default_factory=list)
    states: dict[str, StateEvent] = field(default_factory=dict)
    dead: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason) of the dead letters."""
    runs: list[Run] = field(default_factory=list)
    forged: list[tuple[str, int, str]] = field(default_factory=list)
    """(job, attempt, the conductor's verdict)."""
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    """Parts that ended by themselves."""
    repairs: int = 0
    """Servers that the product's watch restarted after a full disk."""
    complete: bool = False
    """Everything that was submitted was waited for."""


def load(lines: Iterable[dict[str, Any]]) -> History:
    """The history that the lines of the notebooks tell, in any order of the two."""
    made = History()
    orders: dict[int, dict[str, Any]] = {}
    epochs: dict[int, int] = {}
    for line in lines:
        what = line["what"]
        if what == "order":
            orders[line["seq"]] = line["body"]  # a later one at the same place: the first was never on disk
        elif what == "epoch":
            epochs[line["seq"]] = line["epoch"]
        else:
            _take(made, what, line)
    terms = sorted(epochs.items())
    made.orders = [_order(seq, body, terms) for seq, body in sorted(orders.items())]
    return made


def _order(seq: int, body: dict[str, Any], terms: list[tuple[int, int]]) -> Order:
    place = bisect_left(terms, (seq, 0))
    term = max((epoch for _at, epoch in terms[:place]), default=0)
    return Order(
        seq, body["task_id"], body["attempt"], body["gpu"], body["incarnation"], seconds_since_epoch(body["ts"]),
        body["enq_seq"], body.get("reason", ""), term,
    )  # fmt: skip


def _take(made: History, what: str, line: dict[str, Any]) -> None:
    if what in ("send", "unsure"):
        made.sent.update(line["ids"])
    elif what == "accepted":
        made.accepted.update(line["seqs"])
    elif what == "repeated":
        made.repeated += line["seqs"].items()
    elif what == "contradicted":
        made.contradicted.add(line["task_id"])
    elif what == "queued":
        made.queued[line["seq"]] = line["task_id"]
    elif what == "cancelling":
        made.cancelling.add(line["task_id"])
    elif what == "cancel":
        made.cancels[line["task_id"]] = line["verdict"]
    elif what == "missed":
        made.missed.append((line["first"], line["last"]))
    elif what == "result":
        made.results.append((line["task_id"], msgspec.convert(line["body"], Result)))
    elif what == "event":
        made.events.append(msgspec.convert(line["body"], StateEvent))
    elif what == "state":
        made.states[line["task_id"]] = msgspec.convert(line["body"], StateEvent)
    elif what == "dead":
        made.dead.append((line["task_id"], line["body"]["reason"]))
    elif what == "ran":
        made.runs.append(Run(line["task_id"], line["step"], line["attempt"], line["gpu"]))
    elif what == "forged":
        made.forged.append((line["task_id"], line["attempt"], line["verdict"]))
    elif what == "fault":
        made.faults[line["kind"]] += 1
    elif what == "ended by itself":
        made.ended[line["part"].split(".")[0]] += 1
    elif what == "repairs":
        made.repairs = line["count"]
    elif what == "complete":
        made.complete = True
