# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Heartbeats: requests whose answers renew the lease and say what is revoked. They never stop during a job."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from organism.bus import messages
from organism.bus.errors import BusError
from organism.bus.messages import HeartbeatReply
from organism.core import _bus
from organism.worker.bus import Bus, Complaint
from organism.worker.lease import Lease
from organism.worker.state import WorkerState

log = logging.getLogger(__name__)

NUDGE_SPACING = 0.25
"""Seconds between two heartbeats at least, however often something happens."""


class Heart:
    """``on_reset`` and ``on_revoked`` are called on the event loop, before the next heartbeat can be sent."""

    def __init__(
        self,
        bus: Bus,
        state: WorkerState,
        lease: Lease,
        every: float,
        *,
        on_reset: Callable[[str], None],
        on_revoked: Callable[[messages.TaskRef], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._state = state
        self._lease = lease
        self._every = every
        self._on_reset = on_reset
        self._on_revoked = on_revoked
        self._clock = clock
        self._beating = asyncio.Lock()
        self.answered: float | None = None
        """Unix time of the last answer that took this worker."""
        self._nudge = asyncio.Event()
        self._silence = Complaint("no conductor answers heartbeats")
        self._rejection = Complaint("the conductor rejects this worker")
        self._early = Complaint("the conductor is of an earlier version, which hands no orders over,")

    def nudge(self) -> None:
        """Something worth telling has happened: do not wait for the next beat's time."""
        self._nudge.set()

    async def run(self) -> None:
        while True:
            begun = self._clock()
            self._nudge.clear()
            await self.beat()
            await self._pause(max(NUDGE_SPACING, self._every - (self._clock() - begun)))

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, NUDGE_SPACING))
        try:
            async with asyncio.timeout(max(0.0, seconds - NUDGE_SPACING)):
                await self._nudge.wait()
        except TimeoutError:
            return

    async def beat(self) -> bool:
        """One heartbeat; True when the conductor answered it and takes this worker."""
        async with self._beating:
            heartbeat = self._state.heartbeat()
            sent = self._clock()
            try:
                answer = await self._bus.ask(
                    _bus.heartbeat_subject(self._state.gpu),
                    messages.encode(heartbeat),
                    timeout=min(5.0, max(1.0, self._every)),
                )
                reply = messages.decode(answer.data, HeartbeatReply)
            except (BusError, messages.BadMessage) as error:
                self._silence.note(error)
                return False
            self._silence.over()
            # an answer to who we were says nothing about who we are
            return heartbeat.incarnation == self._state.incarnation and self._take(reply, sent)

    def _take(self, reply: HeartbeatReply, sent: float) -> bool:
        if reply.reset:
            self._lease.void()
            self._on_reset(reply.reason or "the conductor had declared this worker dead")
            self.nudge()
            return False
        for ref in reply.revoked:
            self._on_revoked(ref)
        if not reply.ok:
            self._rejection.note(reply.reason or "no reason given")
            return False
        self._rejection.over()
        self._state.epoch = reply.epoch
        self._take_orders_of(reply)
        self._state.draining = reply.drain
        self._lease.renew(sent, reply.lease_s)
        self.answered = time.time()
        return True

    def _take_orders_of(self, conductor: HeartbeatReply) -> None:
        if conductor.hands:
            self._early.over()
        else:
            self._early.note("upgrade it: this worker takes no jobs until then")
        if conductor.hands != self._state.handed:
            self._state.handed = conductor.hands
            self.nudge()

    async def ensure_fresh(self) -> None:
        """Returns once the lease is fresh: asks the conductor, again and again with growing pauses."""
        pause = 0.1
        while not (self._lease.fresh or (await self.beat() and self._lease.left > 0)):
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)
