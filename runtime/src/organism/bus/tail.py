# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads a stream from a sequence on, in order and without a gap, for as long as the reader lives.

It needs nothing durable: an ephemeral pull consumer without acknowledgements, made anew from the last message seen
whenever something is odd (a restart, a lost connection, a missing heartbeat, a jump in the consumer's own count).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from organism.bus.errors import BusError, NotFound, Refused, StreamReset, Unavailable
from organism.bus.jetstream import JetStream, Stored

log = logging.getLogger(__name__)

BATCH = 500
"""Messages asked for at a time; the next poll goes out when half of them have come."""
MAX_BYTES = 32 * 1024 * 1024
"""Bytes on their way to a slow reader; above the server's ``max_payload``."""
EXPIRES = 30.0
HEARTBEAT = 5.0
"""Seconds between the server's signs of life while a poll waits; two missed ones mean that the consumer is dead."""
INACTIVE = 60.0
"""Seconds after which the server forgets the consumer of a reader that died."""
RETRY = 0.5
"""Seconds between two attempts while the server is there but its streams are not."""

_RECONNECTED = object()


class StreamTail:
    """``async for batch in tail``: lists of :class:`Stored`, never twice, never out of order.

    ``caught_up`` becomes true with the batch (an empty one if need be) that completes what the stream held when the
    tail was opened. The iteration never ends by itself; it raises StreamReset (the stream was made anew), NotFound
    (there is no such stream), Refused, or Unavailable when the connection was closed for good.
    """

    heartbeat = HEARTBEAT

    def __init__(
        self, js: JetStream, stream: str, *, start_seq: int = 1, filter_subjects: Sequence[str] | None = None
    ) -> None:
        self.js = js
        self.nc = js.nc
        self.stream = stream
        self.next_seq = max(1, start_seq)
        """The lowest sequence that has not been handed out."""
        self.filter_subjects = list(filter_subjects or [])
        self.caught_up = False
        self._target: int | None = None  # last sequence of the stream when the tail was opened
        self._arrived: asyncio.Queue[Msg | object] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._listening = ExitStack()
        self._inbox = ""
        self._consumer = ""
        self._consumer_seq = 0
        self._polls: dict[str, int] = {}  # reply subject -> messages that it may still bring
        self._alive_until = 0.0

    def __aiter__(self) -> StreamTail:
        return self

    async def __anext__(self) -> list[Stored]:
        while True:
            try:
                if not self._consumer:
                    at_end = await self._open()
                    if at_end and not self.caught_up:
                        self.caught_up = True
                        return []
                await self._poll()
                batch = await self._take()
            except Unavailable as problem:
                if self.nc.is_closed:
                    raise
                log.info("tail of %s: %s; trying again", self.stream, problem)
                self._consumer = ""
                await asyncio.sleep(RETRY)  # the server is there, its streams are not yet: there is no event for it
                continue
            if batch or self._became_caught_up:
                self._became_caught_up = False
                return batch

    _became_caught_up = False

    async def close(self) -> None:
        """Stop reading; the server forgets the consumer at once, or by itself when it cannot be asked."""
        self._listening.close()
        if self._subscription is not None and not self.nc.is_closed:
            await self._subscription.unsubscribe()
            self._subscription = None
            if self._consumer and self.nc.is_connected:
                await self._forget(self._consumer)
        self._consumer = ""

    # ---- the consumer ------------------------------------------------------------------------------------------------

    async def _open(self) -> bool:
        """Make the consumer; True when nothing waits behind ``next_seq``."""
        await self.nc.wait_connected(3600.0)
        await self._fresh_inbox()
        state = (await self.js.info(self.stream))["state"]
        last = int(state["last_seq"])
        if self.next_seq > last + 1:
            raise StreamReset(
                f"stream {self.stream} ends at {last}, but was read up to {self.next_seq - 1} before: it was made anew "
                f"or restored from an older copy"
            )
        if self._target is None:
            self._target = last
        name = f"tail_{secrets.token_hex(8)}"
        config: dict[str, Any] = {
            **ephemeral(name),
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.next_seq,
        }
        if self.filter_subjects:
            config["filter_subjects"] = self.filter_subjects
        body = {"stream_name": self.stream, "config": config, "action": "create"}
        info = await self.js.api(f"CONSUMER.CREATE.{self.stream}.{name}", body)
        self._consumer = name
        self._consumer_seq = 0
        return int(info.get("num_pending", 0)) == 0

    async def _fresh_inbox(self) -> None:
        """Answers to the previous consumer must not be taken for the new one's."""
        if self._subscription is None:
            self._listening.enter_context(self.nc.on_reconnect(lambda: self._arrived.put_nowait(_RECONNECTED)))
        else:
            await self._subscription.unsubscribe()
        self._polls.clear()
        self._arrived = asyncio.Queue()
        self._inbox = f"{self.nc.inbox}.tail.{secrets.token_hex(6)}"
        queue = self._arrived

        async def receive(message: Msg) -> None:
            queue.put_nowait(message)

        self._subscription = await self.nc.listen(f"{self._inbox}.*", receive)

    async def _forget(self, consumer: str) -> None:
        try:
            await self.js.api(f"CONSUMER.DELETE.{self.stream}.{consumer}")
        except (NotFound, Unavailable, Refused) as problem:
            log.debug("tail of %s: consumer %s not deleted: %s", self.stream, consumer, problem)

    async def _poll(self) -> None:
        if sum(self._polls.values()) > BATCH // 2:
            return
        reply = f"{self._inbox}.{secrets.token_hex(4)}"
        body = {
            "batch": BATCH,
            "max_bytes": MAX_BYTES,
            "expires": int(EXPIRES * 1e9),
            "idle_heartbeat": int(self.heartbeat * 1e9),
        }
        self._polls[reply] = BATCH
        self._alive_until = time.monotonic() + 2.5 * self.heartbeat
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self._consumer}"
        await self.nc.say(subject, json.dumps(body).encode(), reply=reply)

    # ---- messages ----------------------------------------------------------------------------------------------------

    async def _take(self) -> list[Stored]:
        """What has arrived: waits for the first message or status, then takes all that is there."""
        batch: list[Stored] = []
        try:
            async with asyncio.timeout(max(0.0, self._alive_until - time.monotonic())):
                item = await self._arrived.get()
        except TimeoutError:
            self._restart("no sign of life from the server")
            return batch
        while True:
            self._alive_until = time.monotonic() + 2.5 * self.heartbeat
            if not isinstance(item, Msg):
                self._restart("reconnected")
                break
            if not self._one(item, batch) or self._arrived.empty() or len(batch) >= BATCH:
                break
            item = self._arrived.get_nowait()
        return batch

    def _one(self, message: Msg, batch: list[Stored]) -> bool:
        """Add a message to the batch; False when the consumer has to be made anew."""
        headers = dict(message.headers or {})
        if not message.reply.startswith("$JS.ACK."):
            return self._status(message.subject, headers)
        parts = ack_parts(message.reply)
        if parts.consumer_seq != self._consumer_seq + 1:
            self._restart(f"message {parts.consumer_seq} of the consumer came after {self._consumer_seq}")
            return False
        self._consumer_seq = parts.consumer_seq
        # the oldest poll is served first
        for reply in self._polls:
            self._polls[reply] -= 1
            if self._polls[reply] == 0:
                del self._polls[reply]
            break
        if parts.stream_seq >= self.next_seq:
            self.next_seq = parts.stream_seq + 1
            batch.append(Stored(parts.stream_seq, message.subject, message.data, headers, parts.time))
        if not self.caught_up and (parts.pending == 0 or parts.stream_seq >= (self._target or 0)):
            self.caught_up = True
            self._became_caught_up = True
        return True

    def _status(self, poll: str, headers: dict[str, str]) -> bool:
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            if not self.caught_up and self._idle_at_end():
                # nothing is coming: what was left when the tail was opened has been removed meanwhile
                self._restart("quiet before the end of the replay")
                return False
            return True
        left = self._polls.pop(poll, None)
        if status in ("408", "409") and "Nats-Pending-Messages" in headers:
            # the poll is over; what the server says it did not bring must be what did not come
            if left is not None and len(self._polls) == 0 and int(headers["Nats-Pending-Messages"]) != left:
                self._restart("messages got lost on their way")
                return False
            return True
        self._restart(f"status {status} {text}".strip())
        return False

    def _idle_at_end(self) -> bool:
        return sum(self._polls.values()) > 0 and self._arrived.empty()

    def _restart(self, why: str) -> None:
        if self._consumer:
            log.info("tail of %s: starts anew at %d: %s", self.stream, self.next_seq, why)
        self._consumer = ""


def ephemeral(name: str) -> dict[str, Any]:
    """A consumer that lives in the server's memory and of which nothing is ever written: no acknowledgements."""
    return {
        "name": name,
        "ack_policy": "none",
        "replay_policy": "instant",
        "inactive_threshold": int(INACTIVE * 1e9),
        "mem_storage": True,
        "num_replicas": 1,
    }


@dataclass(frozen=True)
class AckParts:
    num_delivered: int
    stream_seq: int
    consumer_seq: int
    time: float
    pending: int


def ack_parts(reply: str) -> AckParts:
    """The numbers in an acknowledgement subject. Raises BusError.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>``, or the longer form with
    domain and account hash after ``ACK`` (ADR-15).
    """
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"] or len(tokens) not in (9, 11, 12):
        raise BusError(f"not an acknowledgement subject: {reply!r}")
    numbers = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
    delivered, stream_seq, consumer_seq, nanoseconds, pending = (int(number) for number in numbers)
    return AckParts(delivered, stream_seq, consumer_seq, nanoseconds / 1e9, pending)
