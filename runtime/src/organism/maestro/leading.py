# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of a leading conductor, their beginning and their end."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from organism.bus.connection import BusClient
from organism.bus.jetstream import JetStream
from organism.core import _bus
from organism.maestro.archive import Archive
from organism.maestro.clock import Clock
from organism.maestro.commit import Fenced, Writer
from organism.maestro.dependencies import Dependencies
from organism.maestro.janitor import Janitor
from organism.maestro.ledger import Lasting
from organism.maestro.outbox import Outbox
from organism.maestro.projections import Projections
from organism.maestro.scheduler import Scheduler
from organism.maestro.shares import Shares
from organism.maestro.site import Site
from organism.maestro.takeover import Fences, Inheritance
from organism.maestro.tally import Tally
from organism.maestro.workers import Fleet

log = logging.getLogger(__name__)


class Leading(ABC):
    """Everything that the parts of a leading conductor share; :attr:`ended` is set when the term is over."""

    def __init__(
        self, nc: BusClient, js: JetStream, site: Site, clock: Clock, epoch: int, fences: Fences, left: Inheritance
    ) -> None:
        self.nc, self.js, self.site, self.clock, self.epoch = nc, js, site, clock, epoch
        self.ended = asyncio.Event()
        self.why_ended = ""
        self.since = clock.now()
        self.ledger = left.ledger
        self.fleet = Fleet(site.limits, epoch)
        self.fleet.buried |= left.ledger.buried
        self.shares = Shares(site.user_limits, site.order.half_life)
        self.scheduler = Scheduler(
            self.fleet, announce_after=site.settings.number("WAIT_GPU_SEC"), order=site.order, shares=self.shares
        )
        self.dependencies = Dependencies()
        self.archive = Archive()
        self.outbox = Outbox(nc)
        self.feed = Projections(js, self.complain, lambda: Lasting(self.ledger.jobs.values()))
        self.queue = Writer(js, _bus.STREAM_WQ, fence=fences.queue, on_fenced=self.end)
        self.results = Writer(js, _bus.STREAM_RESULTS, fence=fences.results, on_fenced=self.end)
        self.results.settled = fences.results[0]
        self.dead = Writer(js, _bus.STREAM_DLQ, fence=None, on_fenced=self.end)
        self.feed.shard = site.shard
        self.janitor = Janitor(self)
        self.watchers: dict[str, list[asyncio.Event]] = {}
        """Task id -> who waits for its result."""
        self.rules = site.rules
        self.tally = Tally()
        self._paused_until = 0.0
        self._after: dict[int, list[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.leads: Callable[[], bool] = lambda: False
        """Whether the lease is ours at this moment: if not, nothing is decided, and nobody's silence counts."""
        self._histories = Lasting(self.ledger.jobs.values(), [result.history for result, _ in left.finished])

    @abstractmethod
    def pump(self) -> None:
        """Look for jobs to dispatch."""

    # ---- the term ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write and to say."""
        for part in (self.queue, self.results, self.dead, self.outbox):
            self._supervise(part.start())
        self._supervise(self.feed.start(self._histories))
        self._histories = Lasting(())
        self.spawn(self.janitor.run(), "janitor")

    def end(self, why: str) -> None:
        """Lead no longer, from this moment."""
        if not self.ended.is_set():
            log.warning("leading shard %s ends: %s", self.site.shard, why)
            self.why_ended = why
            self.ended.set()

    async def stop(self, *, finish: bool) -> None:
        """End the term; with ``finish`` write first what is on its way."""
        self._paused_until = float("inf")
        if finish and not self.ended.is_set():
            await self.janitor.flush()
            for part in (self.queue, self.results, self.dead, self.feed, self.outbox):
                await part.drain()
        self.end("stopped")
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        for writer in (self.queue, self.results, self.dead):
            await writer.close()
        await self.feed.stop()
        if self.nc.is_connected:
            await self.outbox.drain()
        await self.outbox.stop()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run beside; an unexpected error ends the term, since nobody knows what was left undone."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        self._supervise(task)

    def _supervise(self, task: asyncio.Task[None]) -> None:
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, Fenced):
                log.error("%s failed", task.get_name(), exc_info=error)
            self.end(f"{task.get_name()}: {error}")

    def complain(self, event: str, text: str, **more: Any) -> None:
        """Say on ``maestro.state`` and in the log what an operator should know."""
        log.warning("%s: %s", event, text)
        self.tally.complaints.counts[event] += 1
        body = {"ts": self.clock.stamp(), "event": event, "reason": text, "shard": self.site.shard, **more}
        self.outbox.send(_bus.MAESTRO_STATE, msgspec.json.encode(body))
