# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One message at a time from a durable consumer, by a long poll that survives whatever happens to the server.

Not nats-py's ``fetch``: on an idle queue that ends in three different ways, and a message that arrives after its
time-out is lost until the server delivers it again.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from organism.bus.connection import BusClient
from organism.bus.errors import BusError, ConsumerGone, Unavailable

EXPIRES = 30.0
"""Seconds that one long poll lasts on the server."""
HEARTBEAT = 5.0
"""Seconds between the server's signs of life while a poll waits; two missed ones mean that the poll is dead."""
MISSING_FOR = 15.0
"""A consumer that nobody serves for so many seconds is gone; less than that is an election or a restart."""
RETRY = 0.5
"""Seconds before asking again after the server said that nobody serves the consumer."""

_RECONNECTED = object()


@dataclass(frozen=True)
class Delivery:
    subject: str
    data: bytes
    seq: int
    """Of the stream."""
    num_delivered: int
    """1 at the first delivery."""
    headers: dict[str, str]
    reply: str = field(repr=False)
    nc: BusClient = field(repr=False)

    async def ack(self) -> None:
        """Done with it; the server is told but not asked whether it heard."""
        await self.nc.say(self.reply, b"+ACK")

    async def ack_sync(self, timeout: float = 5.0) -> None:
        """Done with it, and the server has written that down. Raises Unavailable."""
        await self.nc.ask(self.reply, b"+ACK", timeout=timeout)

    async def nak(self, delay: float | None = None) -> None:
        """Deliver it again, after ``delay`` seconds or at once."""
        await self.nc.say(self.reply, b"-NAK" if delay is None else f'-NAK {{"delay": {int(delay * 1e9)}}}'.encode())

    async def in_progress(self) -> None:
        """Still at it: the time until redelivery starts anew."""
        await self.nc.say(self.reply, b"+WPI")

    async def term(self, reason: str = "") -> None:
        """Never deliver it again."""
        await self.nc.say(self.reply, f"+TERM {reason}".rstrip().encode())


class PullConsumer:
    """Reads a durable consumer that exists; whoever applies the topology makes it. A poll asks for one message.

    A message can come again although it was acknowledged: nats-server keeps acknowledgements of a Limits stream in
    memory for about 100 ms, also those of ``ack_sync``, and a kill -9 forgets them. Readers recognise what they had.
    """

    def __init__(self, nc: BusClient, stream: str, consumer: str) -> None:
        self.nc = nc
        self.stream = stream
        self.consumer = consumer
        self._arrived: asyncio.Queue[Msg | object] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._listening = ExitStack()
        self._poll = ""  # the reply subject of the poll that waits on the server
        self._alive_until = 0.0
        self._expires_at = 0.0
        self._missing_since: float | None = None
        self._not_before = 0.0

    async def next(self, timeout: float) -> Delivery | None:
        """The next message, or None when none came within ``timeout`` seconds; it is then there for the next call.

        Raises ConsumerGone. While the server is away it simply waits.
        """
        deadline = time.monotonic() + timeout
        if self._subscription is None:
            await self._open()
        while True:
            if self.nc.is_closed:
                raise Unavailable("the connection to the bus is closed")
            now = time.monotonic()
            if not self._poll and now >= self._not_before and self.nc.is_connected:
                await self._ask()
            wake = min(deadline, self._alive_until if self._poll else max(self._not_before, now + 0.05))
            if not self.nc.is_connected:
                wake = deadline  # a reconnection wakes us up
            item = await self._wait(wake)
            if isinstance(item, Msg):
                delivery = self._handle(item)
                if delivery is not None:
                    return delivery
            elif item is _RECONNECTED:
                self._poll = ""
            elif self._poll and time.monotonic() >= self._alive_until:
                self._poll = ""  # no sign of life: ask anew
            if self._arrived.empty() and time.monotonic() >= deadline:
                return None

    async def close(self) -> None:
        self._listening.close()
        if self._subscription is not None and not self.nc.is_closed:
            await self._subscription.unsubscribe()
        self._subscription = None

    async def _open(self) -> None:
        self._inbox = f"{self.nc.inbox}.pull.{secrets.token_hex(6)}"
        self._listening.enter_context(self.nc.on_reconnect(lambda: self._arrived.put_nowait(_RECONNECTED)))
        self._subscription = await self.nc.listen(f"{self._inbox}.*", self._receive)

    async def _receive(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    async def _ask(self) -> None:
        self._poll = f"{self._inbox}.{secrets.token_hex(4)}"
        now = time.monotonic()
        self._expires_at = now + EXPIRES
        self._alive_until = now + 2 * HEARTBEAT
        body = {"batch": 1, "expires": int(EXPIRES * 1e9), "idle_heartbeat": int(HEARTBEAT * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.consumer}"
        await self.nc.say(subject, json.dumps(body).encode(), reply=self._poll)

    async def _wait(self, until: float) -> Msg | object | None:
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                return await self._arrived.get()
        except TimeoutError:
            return None

    def _handle(self, message: Msg) -> Delivery | None:
        status = (message.headers or {}).get("Status")
        if status is None or message.reply.startswith("$JS.ACK."):
            # whichever poll it answers; a second one at the server would end by itself
            self._poll = ""
            self._missing_since = None
            return _delivery(self.nc, message)
        if message.subject != self._poll:
            return None  # the end of a poll that was given up
        if status == "100":
            self._missing_since = None
            self._alive_until = min(time.monotonic() + 2 * HEARTBEAT, self._expires_at + HEARTBEAT)
            return None
        self._poll = ""
        text = (message.headers or {}).get("Description", "")
        if status == "409" and "Deleted" in text:
            raise self._gone(text)
        if status == "503":
            self._still_missing()
        elif status in ("408", "404"):
            self._missing_since = None  # it waited as long as it was told to
        elif status == "409":
            self._not_before = time.monotonic() + RETRY  # leadership change, shutdown, too many polls
        else:
            raise BusError(f"consumer {self.consumer} of {self.stream}: unexpected status {status} {text}")
        return None

    def _still_missing(self) -> None:
        now = time.monotonic()
        self._not_before = now + RETRY
        if self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > MISSING_FOR:
            raise self._gone(f"nobody serves it for {MISSING_FOR:g} s")

    def _gone(self, why: str) -> ConsumerGone:
        self._missing_since = None
        return ConsumerGone(
            f"consumer {self.consumer} of stream {self.stream} is gone ({why}); "
            f"`organism-bus topology apply` (role nats) makes it"
        )


def _delivery(nc: BusClient, message: Msg) -> Delivery:
    parts = ack_parts(message.reply)
    return Delivery(
        subject=message.subject,  # the stream's, not the inbox: that is how pull deliveries come
        data=message.data,
        seq=parts.stream_seq,
        num_delivered=parts.num_delivered,
        headers=dict(message.headers or {}),
        reply=message.reply,
        nc=nc,
    )


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
