# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From standby to leader and back: one term, of which a conductor's life is a sequence."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from organism.bus.connection import BusClient
from organism.bus.errors import Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.keyvalue import KeyValue
from organism.bus.lease import Lease
from organism.bus.messages import Result
from organism.core import _bus
from organism.maestro import intake, takeover, telemetry
from organism.maestro.clock import Clock
from organism.maestro.commit import Fenced
from organism.maestro.conductor import Conductor
from organism.maestro.intake import Submission
from organism.maestro.ledger import Defaults, Job, Ledger
from organism.maestro.listeners import Listeners
from organism.maestro.rpc import Rpc
from organism.maestro.site import Site
from organism.maestro.slices import short_collections, sliced
from organism.maestro.takeover import Inheritance

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOKED_UP = 1000
"""Inherited jobs whose ids are asked for at a time."""
BACKFILL = 200
"""Results from before this term whose outlines are read for `list`."""


class Term:
    """Wait for the lease, lead until it is lost or ``stop`` is set, and leave the stage in order.

    ``leave``: seconds that a shard which nobody leads is left to its own conductor.
    """

    def __init__(
        self, nc: BusClient, site: Site, *, owner: str, on_lead: Callable[[Conductor], None], leave: float = 0.0
    ) -> None:
        self.nc = nc
        self.js = JetStream(nc)
        self.site = site
        self.owner = owner
        self.leave = leave
        self._on_lead = on_lead

    async def run(self, stop: asyncio.Event) -> str:
        """One term; returns why it ended."""
        gc.collect()  # what a former term left is a web of cycles; now a pause harms nobody
        ttl = self.site.settings.number("LEASE_TTL_SEC")
        key = f"shard.{self.site.shard}"
        lease = Lease(
            KeyValue(self.js, _bus.BUCKET_CONTROL),
            key,
            self.owner,
            ttl=ttl,
            renew=ttl / 3,
            margin=min(0.5, ttl / 10),
            leave=self.leave,
        )
        acquiring = asyncio.create_task(lease.acquire(), name="lease")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({acquiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not acquiring.done():
                acquiring.cancel()
                await asyncio.wait({acquiring})
                return "stopped"
            epoch = await acquiring
            return await self._lead(lease, epoch, stop)
        finally:
            stopping.cancel()
            await lease.release()

    async def _lead(self, lease: Lease, epoch: int, stop: asyncio.Event) -> str:
        started = time.monotonic()
        ledger = Ledger(
            Defaults(self.site.settings.number("DEFAULT_TIMEOUT_SEC"), self.site.settings.integer("MAX_RETRIES"))
        )
        with short_collections(lambda: len(ledger)):
            try:
                taken = await self._unless(lease.lost, stop, self._take_over(lease, epoch, ledger))
            except (Fenced, Unavailable) as problem:
                log.warning("epoch %d of shard %s did not begin: %s", epoch, self.site.shard, problem)
                await asyncio.sleep(1.0)  # another conductor needs its turn; there is no event for that
                return str(problem)
            if taken is None or not await self._unless(lease.lost, stop, lease.confirmed()):
                return "stopped" if stop.is_set() else "the lease was lost during the takeover"
            return await self._rule(lease, stop, started, *taken)

    @staticmethod
    async def _unless(lost: asyncio.Event, stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work returns; None when one of these came first."""
        working = asyncio.create_task(work, name="takeover")
        watch = [asyncio.create_task(event.wait()) for event in (lost, stop)]
        try:
            await asyncio.wait({working, *watch}, return_when=asyncio.FIRST_COMPLETED)
            return await working if working.done() else None
        finally:
            for task in (working, *watch):
                task.cancel()
            await asyncio.wait({working, *watch})

    async def _rule(
        self,
        lease: Lease,
        stop: asyncio.Event,
        started: float,
        conductor: Conductor,
        listeners: Listeners,
        rpc: Rpc,
        left: Inheritance,
        after: int,
    ) -> str:
        """Lead until the lease is lost; while it has lapsed nothing is decided."""
        conductor.leads = conductor.feed.may_write = lease.valid
        lease.on_renewed = conductor.resume
        conductor.start()
        watch = [
            asyncio.create_task(event.wait(), name=name)
            for event, name in ((lease.lost, "lease lost"), (stop, "stop"), (conductor.ended, "term"))
        ]
        beat = asyncio.create_task(telemetry.run(conductor), name="telemetry")
        finish = False
        try:
            with self.nc.on_reconnect(conductor.feed.again):
                begun = await self._unless(lease.lost, stop, self._begin(conductor, listeners, rpc, left, after))
                if begun is None:
                    return "stopped" if stop.is_set() else "the lease was lost at the term's beginning"
                log.info(
                    "leading shard %s, epoch %d: %d unfinished jobs, %d of them given to a GPU; took %.2f s",
                    self.site.shard,
                    conductor.epoch,
                    len(conductor.ledger),
                    sum(len(gpu.orders) for gpu in conductor.fleet.gpus.values()),
                    time.monotonic() - started,
                )
                self._on_lead(conductor)
                await asyncio.wait(watch, return_when=asyncio.FIRST_COMPLETED)
            finish = stop.is_set() and lease.valid()
            return conductor.why_ended or ("stopped" if stop.is_set() else "the lease is lost")
        finally:
            lease.on_renewed = lambda: None
            for task in (*watch, beat):
                task.cancel()
            await listeners.stop()
            await rpc.stop()
            await conductor.stop(finish=finish)

    async def _take_over(
        self, lease: Lease, epoch: int, ledger: Ledger
    ) -> tuple[Conductor, Listeners, Rpc, Inheritance, int]:
        clock = Clock()
        fences = await takeover.fence(self.js, self.site.shard, epoch, self.owner)
        clock.set(fences.taken)
        left = await takeover.replay(self.js, self.site.shard, fences, ledger, self.nc.max_payload)
        conductor = Conductor(self.nc, self.js, self.site, clock, epoch, fences, left)
        await conductor.inherit(left)
        listeners = Listeners(conductor, lease)
        return conductor, listeners, Rpc(conductor, listeners), left, fences.queue[0]

    async def _begin(self, conductor: Conductor, listeners: Listeners, rpc: Rpc, left: Inheritance, after: int) -> bool:
        await self._check(conductor, listeners)
        for submission, why, leave_result in left.refused.values():
            await listeners.refuse(submission, why, "bad_submit", leave_result=leave_result)
        await listeners.start(after)
        await rpc.start()
        conductor.pump()
        conductor.spawn(self._backfill(conductor), "backfill")
        return True

    async def _check(self, conductor: Conductor, listeners: Listeners) -> None:
        """Jobs that no conductor has started yet are looked at as if they had just come in."""
        ledger, site = conductor.ledger, self.site
        found: dict[str, Result] = {}
        jobs = list(ledger.jobs.values())
        for at in range(0, len(jobs), LOOKED_UP):
            some = jobs[at : at + LOOKED_UP]
            needed = [need.task_id for job in some if not job.attempt for need in job.after]
            found |= await listeners.known_results(list(dict.fromkeys([*(job.task_id for job in some), *needed])))
        taken = 0
        queued: Counter[str] = Counter()
        async for job in sliced(jobs):
            verdict = takeover.known(job, found.get(job.task_id))
            if verdict == "conflict":
                why = f"id {job.task_id} is that of a finished job with another content; choose another id"
                await self._refuse(conductor, listeners, job, why, leave_result=False)
            elif verdict is not None:
                self._forget(conductor, job)
                conductor.janitor.retire(job.seq, *job.records)
            if verdict is not None:
                continue
            taken += 1
            if job.attempt == 0:
                why = ""
                standing = conductor.standing(job.user, queued[job.user])
                beyond = standing.limit.refusal(job.type, job.priority, standing.queued, job.timeout * job.gpus)
                if not site.policy.allows(job.type):
                    why = site.policy.refusal(job.type)
                elif beyond:
                    why = beyond
                elif taken > site.settings.integer("MAX_QUEUE"):
                    why = intake.full(taken - 1, site.settings.integer("MAX_QUEUE"))
                if why:
                    taken -= 1
                    await self._refuse(conductor, listeners, job, why, leave_result=True)
                    continue
            queued[job.user] += 1
        async for job in sliced(list(ledger.waiting())):
            if not job.attempt and (job.after or job.unique) and job.seq in ledger.jobs and not job.busy:
                conductor.admit(job, listeners.ended(job.after, found))

    @staticmethod
    def _forget(conductor: Conductor, job: Job) -> None:
        conductor.scheduler.remove(job)
        conductor.ledger.drop(job.seq)

    async def _refuse(
        self, conductor: Conductor, listeners: Listeners, job: Job, why: str, *, leave_result: bool
    ) -> None:
        stored = None if job.raw is not None else await self.js.get(_bus.STREAM_WQ, job.seq)
        raw = job.raw if job.raw is not None else stored.data if stored else b""
        self._forget(conductor, job)
        submission = Submission(job.seq, job.submitted, job.user, job.task_id, raw)
        await listeners.refuse(submission, why, intake.event_of(why), leave_result=leave_result)

    async def _backfill(self, conductor: Conductor) -> None:
        """Outlines of the newest results from before this term: worth no term when the server goes away meanwhile."""
        try:
            await self._read_outlines(conductor)
        except Unavailable as problem:
            log.info("results from before this term are not listed: %s", problem)

    async def _read_outlines(self, conductor: Conductor) -> None:
        state = (await self.js.info(_bus.STREAM_RESULTS))["state"]
        first, last = int(state["first_seq"]), int(state["last_seq"])
        for seq in range(last, max(first, last - BACKFILL + 1) - 1, -1):
            stored = await self.js.get(_bus.STREAM_RESULTS, seq)
            if stored is not None and stored.subject.startswith("gpu.task.result."):
                result = takeover.readable(stored)
                if result is not None and result.shard == self.site.shard:
                    conductor.archive.add_older(result)
