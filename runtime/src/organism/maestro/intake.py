# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A submission as it lies in the stream: is it a job, and if not, what is to be said about it? No I/O."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import msgspec

from organism.bus import messages
from organism.bus.jetstream import Stored
from organism.bus.messages import BadMessage, DeadLetter, JobSpec
from organism.core import _bus
from organism.core._limits import Limit
from organism.core._policy import Policy
from organism.maestro.ledger import generated_id

ORDER_OVERHEAD = 4096
"""Bytes that a run order adds to its specification, generously."""


@dataclass(frozen=True, slots=True)
class Submission:
    """``spec`` or, when it can be no job, ``problem``; the id is generated when the payload has no usable one."""

    seq: int
    time: float
    user: str
    task_id: str
    raw: bytes
    spec: JobSpec | None = None
    problem: str = ""


class _Labelled(msgspec.Struct):
    task_id: Any = None
    v: Any = None


_spec_decoder = msgspec.json.Decoder(JobSpec)
_id_decoder = msgspec.json.Decoder(_Labelled)


def read(message: Stored, max_payload: int) -> Submission:
    """Never raises: whatever the payload is, it is somebody's message and gets an answer."""
    user = message.subject.split(".")[3]
    task_id = ""
    spec: JobSpec | None = None
    problem = ""
    try:
        spec = _spec_decoder.decode(message.data)
        task_id = spec.task_id or ""
        messages.check_spec(spec)
        if not _bus.is_identifier(user):
            raise BadMessage(f"user name {user!r} does not match {_bus.IDENTIFIER.pattern}")
        if len(message.data) > max_payload - ORDER_OVERHEAD:
            raise BadMessage(
                f"{len(message.data)} bytes are too many for a job (at most {max_payload - ORDER_OVERHEAD}); "
                f"put large inputs into the GPU's cache"
            )
    except (msgspec.DecodeError, BadMessage, UnicodeDecodeError, RecursionError) as error:
        spec, problem = None, f"bad submission: {error}"
        labelled = _labelled(message.data)
        task_id = task_id or _usable_id(labelled)
        if isinstance(labelled.v, int) and labelled.v > messages.VERSION:
            problem = (
                f"the job is written in version {labelled.v} of its schema, this conductor reads up to"
                f" {messages.VERSION}: upgrade the conductor, or submit with a client of its version"
            )
    task_id = task_id or generated_id(message.time, message.seq)
    return Submission(message.seq, message.time, user, task_id, message.data, spec, problem)


def _labelled(data: bytes) -> _Labelled:
    """Id and version of a payload that may be JSON but is no job."""
    try:
        return _id_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Labelled()


def _usable_id(labelled: _Labelled) -> str:
    found = labelled.task_id
    return found if isinstance(found, str) and _bus.is_identifier(found) else ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a submitter may have, and has: unfinished jobs. ``timeout`` is what a job gets that does not say."""

    limit: Limit
    queued: int
    timeout: float

    def refusal(self, spec: JobSpec) -> str:
        return self.limit.refusal(spec.type, spec.priority, self.queued, (spec.timeout or self.timeout) * spec.gpus)


def refusal(
    spec: JobSpec, policy: Policy, standing: Standing, *, jobs: int, max_jobs: int, size: int, used: int, room: int
) -> str:
    """Why a well-formed job is not taken; empty when it is.

    ``used`` and ``room`` are bytes of unfinished submissions in the stream: the rest of it is kept for run orders.
    """
    if not policy.allows(spec.type):
        return policy.refusal(spec.type)
    beyond = standing.refusal(spec)
    if beyond:
        return beyond
    if jobs >= max_jobs:
        return full(jobs, max_jobs)
    if room and used + size > room:
        return f"the queue is full ({used} of {room} bytes are used by unfinished jobs); submit again later"
    return ""


def full(jobs: int, max_jobs: int) -> str:
    return f"the queue is full ({jobs} unfinished jobs, MAX_QUEUE is {max_jobs}); submit again later"


def event_of(why: str) -> str:
    """The name on ``maestro.state`` of a refusal (S1k-026)."""
    return "queue_full" if why.startswith("the queue is full") else "bad_submit"


def letter(
    submission: Submission, reason: str, ts: str, max_payload: int, shard: str = _bus.DEFAULT_SHARD
) -> DeadLetter:
    """The dead letter of a submission, its payload cut when it would not fit in a message."""
    raw = submission.raw
    try:
        text, encoding = raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        text, encoding = base64.b64encode(raw).decode("ascii"), "base64"
    room = max_payload - ORDER_OVERHEAD - len(reason)
    size = len(msgspec.json.encode(text))
    if size > room:
        # escaping can make six bytes of one
        keep = max(0, room // 6 if encoding == "utf-8" else room // 4 * 4)
        text = text[:keep]
        reason = f"{reason} (only the first {keep} characters of the payload are kept: it was {len(raw)} bytes)"
    return DeadLetter(
        ts=ts,
        task_id=submission.task_id,
        user=submission.user,
        reason=reason,
        payload=text,
        encoding="base64" if encoding == "base64" else "utf-8",
        enq_seq=submission.seq,
        shard=shard,
    )
