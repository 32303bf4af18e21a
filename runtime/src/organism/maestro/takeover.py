# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Taking over a shard: fence off the predecessor, then read what it left (docs/architecture.md, "taking over")."""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from organism.bus import messages
from organism.bus.errors import BusError, SubjectFull, WrongLastSequence
from organism.bus.jetstream import Expect, JetStream, Stored
from organism.bus.messages import BadMessage, Journal, Result
from organism.bus.tail import StreamTail
from organism.core import _bus
from organism.maestro import intake
from organism.maestro.commit import Fenced
from organism.maestro.intake import Submission
from organism.maestro.ledger import Conflict, Job, Ledger, RunRecord
from organism.maestro.slices import sliced

log = logging.getLogger(__name__)


@dataclass
class Fences:
    """What each write of this conductor expects to be the last of these subjects."""

    queue: Expect
    results: Expect
    taken: float
    """The server's time of it."""


def epoch_payload(epoch: int, owner: str) -> bytes:
    return json.dumps({"epoch": epoch, "owner": owner}).encode()


async def fence(js: JetStream, shard: str, epoch: int, owner: str) -> Fences:
    """Refuse all writes of earlier conductors from now on. Raises Fenced when a later one was faster."""
    subject = _bus.epoch_subject(shard)
    payload = epoch_payload(epoch, owner)
    last = await js.last(_bus.STREAM_WQ, subject)
    if last is not None and _epoch_of(last) >= epoch:
        raise Fenced(f"epoch {_epoch_of(last)} has begun already, this one is {epoch}")
    try:
        ack = await js.publish(subject, payload, expect=(last.seq if last else 0, subject))
        results = await _fence_results(js, shard, epoch, payload)
    except WrongLastSequence as problem:
        raise Fenced(f"another conductor took over meanwhile: {problem}") from problem
    stored = await js.get(_bus.STREAM_WQ, ack.seq)
    if stored is None:
        raise Fenced("the fence is gone: another conductor has moved on")
    return Fences((ack.seq, subject), results, stored.time)


async def _fence_results(js: JetStream, shard: str, epoch: int, payload: bytes) -> Expect:
    pattern = _bus.result_epoch_subject("*", shard)
    last = await js.last(_bus.STREAM_RESULTS, pattern)
    expect = (last.seq if last else 0, pattern)
    try:
        ack = await js.publish(_bus.result_epoch_subject(epoch, shard), payload, expect=expect)
    except SubjectFull:
        # the number was used before the lease's bucket was made anew: any other name fences as well
        ack = await js.publish(
            _bus.result_epoch_subject(f"{epoch}-{secrets.token_hex(4)}", shard), payload, expect=expect
        )
    return (ack.seq, pattern)


def _epoch_of(stored: Stored) -> int:
    try:
        return int(json.loads(stored.data)["epoch"])
    except (ValueError, KeyError, TypeError):
        return 0


@dataclass
class Inheritance:
    """What the predecessor left."""

    ledger: Ledger
    refused: dict[int, tuple[Submission, str, bool]] = field(default_factory=dict)
    """By sequence: submissions that can be no job, why, and whether that is the result of their id."""
    finished: list[tuple[Result, int]] = field(default_factory=list)
    """Results (and their sizes) that no retire record counts in yet."""
    retire: dict[int, None] = field(default_factory=dict)
    """Submissions of which nothing is needed any more, in the order in which that was found."""


async def replay(js: JetStream, shard: str, fences: Fences, ledger: Ledger, max_payload: int) -> Inheritance:
    """Read ORG_WQ, then ORG_RESULTS, up to the fences: nothing of an earlier conductor can come after them.

    Submissions can. They are left to the listeners, which read from the fence on: one that is read twice looks like a
    repetition of itself, of which nothing is needed any more.
    """
    left = Inheritance(ledger)
    tail = StreamTail(js, _bus.STREAM_WQ)
    try:
        async for batch in tail:
            async for message in sliced(batch):
                if message.seq <= fences.queue[0]:
                    apply(left, message, shard, max_payload)
            if tail.next_seq > fences.queue[0]:
                break
    finally:
        await tail.close()
    if ledger.jobs:
        await _results(js, shard, fences, left)
    return left


class TooNew(BusError):
    """A conductor of a later version has led here: nobody who cannot read what it wrote may decide after it."""


class _Versioned(msgspec.Struct):
    v: int = messages.VERSION


def check_version(stream: str, message: Stored) -> None:
    """Raises TooNew for a record that only a later version can read; a broken one is none of these."""
    try:
        version = messages.decode(message.data, _Versioned).v
    except BadMessage:
        return
    if version > messages.VERSION:
        raise TooNew(
            f"{stream}: record {message.seq} on {message.subject} has version {version}, this organism-maestro reads"
            f" up to {messages.VERSION}: it does not lead, so that no job is run twice. Start the later version again,"
            f" or let the queue run empty with it"
        )


def apply(left: Inheritance, message: Stored, shard: str, max_payload: int) -> None:
    """One record of ORG_WQ. Raises TooNew."""
    tokens = message.subject.split(".")
    kind = tokens[2] if len(tokens) > 2 else ""
    ledger = left.ledger
    try:
        if kind == "enqueue" and tokens[4] == shard:
            _submission(left, message, max_payload)
        elif kind == "run":
            check_version(_bus.STREAM_WQ, message)
            order = messages.decode(message.data, RunRecord)
            ledger.dispatched(order, message.seq, messages.seconds_since_epoch(order.ts))
        elif kind == "journal" and tokens[3] == shard:
            check_version(_bus.STREAM_WQ, message)
            journal = messages.decode(message.data, Journal)
            if journal.kind == "retry":
                ledger.retried(journal, message.seq, messages.seconds_since_epoch(journal.ts))
            else:
                ledger.retired(journal)
                for seq in journal.retired:
                    left.refused.pop(seq, None)
                    left.retire.pop(seq, None)
    except (BadMessage, ValueError, msgspec.ValidationError) as problem:
        # only a conductor writes these, and not so: a damaged one
        log.error("%s: record %d on %s cannot be read: %s", _bus.STREAM_WQ, message.seq, message.subject, problem)


def _submission(left: Inheritance, message: Stored, max_payload: int) -> None:
    submission = intake.read(message, max_payload)
    if submission.spec is None:
        left.ledger.refuse(submission.seq)
        leave_result = submission.task_id not in left.ledger.by_id
        left.refused[submission.seq] = (submission, submission.problem, leave_result)
        return
    try:
        job = left.ledger.submitted(submission.seq, submission.user, submission.spec, submission.raw, submission.time)
    except Conflict as problem:
        left.ledger.refuse(submission.seq)
        left.refused[submission.seq] = (submission, str(problem), False)
        return
    if job is None:
        left.retire[submission.seq] = None


async def _results(js: JetStream, shard: str, fences: Fences, left: Inheritance) -> None:
    tail = StreamTail(js, _bus.STREAM_RESULTS, start_seq=left.ledger.results_upto + 1)
    try:
        async for batch in tail:
            async for message in sliced(batch):
                if message.subject.startswith("gpu.task.result."):
                    apply_result(left, message, shard)
            if tail.next_seq > fences.results[0]:
                break
    finally:
        await tail.close()


Known = Literal["ended", "repeated", "conflict"]


def known(job: Job, result: Result | None) -> Known | None:
    """What a result under the id of an unfinished job says about it; None when it is to go on.

    ``ended``: the result is its own. ``repeated``: the submission repeats one that has ended. ``conflict``: its id is
    that of an earlier job with another content. A job that was started is never one of the latter two: who started it
    had looked.
    """
    if result is None:
        return None
    if result.enq_seq == job.seq:
        return "ended"
    if job.attempt:
        return None
    return "repeated" if result.digest == job.digest else "conflict"


def readable(message: Stored) -> Result | None:
    """The result in a stored message, or None (logged) when it is none."""
    try:
        return messages.decode(message.data, Result)
    except BadMessage as problem:
        log.error("%s: result %d cannot be read: %s", _bus.STREAM_RESULTS, message.seq, problem)
        return None


def apply_result(left: Inheritance, message: Stored, shard: str = _bus.DEFAULT_SHARD) -> None:
    """One message of ORG_RESULTS. Raises TooNew."""
    check_version(_bus.STREAM_RESULTS, message)
    result = readable(message)
    if result is None or result.shard != shard:
        return
    left.finished.append((result, len(message.data)))
    job = left.ledger.jobs.get(result.enq_seq)
    if (job is not None and job.task_id == result.task_id) or result.enq_seq in left.ledger.refused:
        left.ledger.drop(result.enq_seq)
        left.refused.pop(result.enq_seq, None)
        left.retire[result.enq_seq] = None
