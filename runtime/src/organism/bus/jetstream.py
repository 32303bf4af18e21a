# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""JetStream by its own API subjects: publish with fences, atomic batches (ADR-50), reads, and errors by name.

Reads go through the stream's leader, never a replica that may lag: a conductor decides on what it reads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg

from organism.bus.connection import BusClient
from organism.bus.errors import (
    FENCE_BUSY,
    NOT_LEADING,
    UNSETTLED,
    ApiError,
    BusError,
    FenceBusy,
    NotFound,
    Unavailable,
    api_error,
)

MAX_BATCH = 1000
"""Messages in an atomic batch; the server refuses more."""

RETRY = 0.3
"""Seconds before a message with an id is sent again."""
RESEND = 5.0
"""Seconds without an answer after which a message with an id is sent again."""

Expect = tuple[int, str | None]
"""Last sequence that must still be the last: of the given subject (wildcards allowed), or of the message's own."""


@dataclass(frozen=True)
class PubAck:
    stream: str
    seq: int
    duplicate: bool = False
    """A message of this id was there already; ``seq`` is that one's."""


@dataclass(frozen=True)
class Outgoing:
    subject: str
    data: bytes
    msg_id: str | None = None
    expect: Expect | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    seq: int
    subject: str
    data: bytes
    headers: dict[str, str]
    time: float
    """When the server stored it, by the server's clock, in seconds since 1970."""


def expect_headers(expect: Expect | None) -> dict[str, str]:
    if expect is None:
        return {}
    sequence, subject = expect
    headers = {"Nats-Expected-Last-Subject-Sequence": str(sequence)}
    if subject is not None:
        headers["Nats-Expected-Last-Subject-Sequence-Subject"] = subject
    return headers


def _headers(message: Outgoing) -> dict[str, str]:
    headers = {**message.headers, **expect_headers(message.expect)}
    if message.msg_id is not None:
        headers["Nats-Msg-Id"] = message.msg_id
    return headers


class JetStream:
    """Requests to JetStream over one connection. Each may raise Unavailable, Refused or an ApiError."""

    def __init__(self, nc: BusClient, *, timeout: float = 5.0) -> None:
        self.nc = nc
        self.timeout = timeout

    # ---- writing -----------------------------------------------------------------------------------------------------

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        msg_id: str | None = None,
        expect: Expect | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> PubAck:
        """Store one message; returns when it is on disk (streams of ``sync_interval: always``).

        With a message id it is sent again, as long as ``timeout`` lasts, when the connection or the server is away:
        the id makes that safe. Without one Unavailable is raised at once, and it may or may not be stored.
        """
        everything = _headers(Outgoing(subject, data, msg_id, expect, headers or {})) or None
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout
        while True:
            try:
                left = max(0.05, deadline - time.monotonic())
                # a leader that dies takes the message with it, and nobody would ever answer
                patience = left if msg_id is None else min(left, RESEND)
                return _pub_ack(await self.nc.ask(subject, data, headers=everything, timeout=patience), subject)
            except FenceBusy:
                raise
            except Unavailable:
                if msg_id is None or time.monotonic() + RETRY >= deadline or self.nc.is_closed:
                    raise
            await asyncio.sleep(RETRY)  # a server that has no leader yet, or is still reading its streams

    async def publish_batch(self, messages: Sequence[Outgoing], *, timeout: float | None = None) -> PubAck:
        """Store all of ``messages`` (one stream, at most 1,000) or none; the answer's ``seq`` is the last one's.

        A fence (``expect``) belongs on the first message. Raises DuplicateInBatch when one message id is known.
        """
        if not messages:
            raise ValueError("an empty batch")
        if len(messages) > MAX_BATCH:
            raise ValueError(f"a batch holds at most {MAX_BATCH} messages, not {len(messages)}")
        if len(messages) == 1:
            only = messages[0]
            return await self.publish(
                only.subject, only.data, msg_id=only.msg_id, expect=only.expect, headers=only.headers, timeout=timeout
            )
        timeout = timeout or self.timeout
        batch = secrets.token_hex(16)
        # the first one's answer comes before the rest is sent: a refusal (no atomic batches here, not permitted) is
        # then told by its own name, and not as "incomplete"
        first = messages[0]
        await self._first_of_batch(first, batch, timeout)
        for number, message in enumerate(messages[1:-1], start=2):
            headers = {**_headers(message), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            await self.nc.say(message.subject, message.data, headers=headers)
        last = messages[-1]
        headers = {
            **_headers(last),
            "Nats-Batch-Id": batch,
            "Nats-Batch-Sequence": str(len(messages)),
            "Nats-Batch-Commit": "1",
        }
        answer = await self.nc.ask(last.subject, last.data, headers=headers, timeout=timeout)
        return _pub_ack(answer, last.subject)

    async def _first_of_batch(self, message: Outgoing, batch: str, timeout: float) -> None:
        headers = {**_headers(message), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": "1"}
        answer = await self.nc.ask(message.subject, message.data, headers=headers, timeout=timeout)
        if answer.data:
            _pub_ack(answer, message.subject)

    async def purge(self, stream: str, *, seq: int | None = None, subject: str | None = None) -> int:
        """Remove messages below ``seq`` (all without it), of ``subject`` only if given; returns how many."""
        body: dict[str, Any] = {}
        if seq is not None:
            body["seq"] = seq
        if subject is not None:
            body["filter"] = subject
        return int((await self.api(f"STREAM.PURGE.{stream}", body))["purged"])

    async def delete(self, stream: str, seq: int) -> bool:
        """Remove one message; False when it was not there."""
        try:
            await self.api(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True})
        except ApiError as error:
            if isinstance(error, NotFound) or "not found" in error.description:  # 10043: one number for all its reasons
                return False
            raise
        return True

    # ---- reading -----------------------------------------------------------------------------------------------------

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message on ``subject`` (wildcards allowed), or None."""
        return await self._get(stream, {"last_by_subj": subject})

    async def get(self, stream: str, seq: int) -> Stored | None:
        """The message with this sequence, or None when it was removed or never there."""
        return await self._get(stream, {"seq": seq})

    async def _get(self, stream: str, what: dict[str, Any]) -> Stored | None:
        try:
            message = (await self.api(f"STREAM.MSG.GET.{stream}", what))["message"]
        except NotFound as error:
            if error.err_code == 10059:
                raise
            return None
        return Stored(
            seq=message["seq"],
            subject=message["subject"],
            data=base64.b64decode(message.get("data", "")),
            headers=parse_headers(base64.b64decode(message.get("hdrs", ""))),
            time=_seconds(message["time"]),
        )

    async def info(self, stream: str) -> dict[str, Any]:
        """``config`` and ``state`` (messages, bytes, first_seq, last_seq, ...) as the server tells them."""
        return await self.api(f"STREAM.INFO.{stream}")

    async def api(
        self, name: str, body: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """The answer to ``$JS.API.<name>``."""
        subject = f"$JS.API.{name}"
        payload = json.dumps(body).encode() if body else b""
        answer = await self.nc.ask(subject, payload, timeout=timeout or self.timeout)
        return _decoded(answer, subject)


def _pub_ack(answer: Msg, subject: str) -> PubAck:
    decoded = _decoded(answer, subject)
    return PubAck(decoded["stream"], int(decoded["seq"]), bool(decoded.get("duplicate", False)))


def _decoded(answer: Msg, subject: str) -> dict[str, Any]:
    try:
        decoded = json.loads(answer.data)
    except ValueError as error:
        raise BusError(f"{subject}: the server's answer is no JSON: {answer.data[:200]!r}") from error
    problem = decoded.get("error")
    if problem:
        code = int(problem.get("code", 0))
        err_code = int(problem.get("err_code", 0))
        description = str(problem.get("description", ""))
        if err_code == FENCE_BUSY:
            raise FenceBusy(f"{subject}: another write under the same fence is on its way")
        # 10039: a server that is still reading its streams
        if err_code in UNSETTLED or (code == 503 and (err_code == 10039 or description in NOT_LEADING)):
            raise Unavailable(f"{subject}: {description}")
        raise api_error(code, err_code, description, subject)
    return dict(decoded)


def parse_headers(block: bytes) -> dict[str, str]:
    """A stored message's header block (``NATS/1.0`` and one ``name: value`` a line)."""
    headers: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    return headers


def _seconds(stamp: str) -> float:
    """RFC 3339 with up to nine digits of a second (``fromisoformat`` takes any number, and keeps six)."""
    return datetime.fromisoformat(stamp).timestamp()
