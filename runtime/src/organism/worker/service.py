# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker: one order at a time from the bus to a report, fenced by lease, incarnation and attempt.

Order of commits (docs/architecture.md): the outcome is on this machine's disk before the conductor hears of it, the
conductor has stored it before this one forgets it. Whatever dies in between, the next one finds what it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from organism.bus import messages
from organism.bus.errors import BusError
from organism.bus.messages import Report, RunOrder, TaskRef
from organism.core import _bus
from organism.core._root import Root
from organism.worker.bus import Bus, Complaint
from organism.worker.cache_use import CacheBusyError, CacheUse
from organism.worker.control import Controller
from organism.worker.exporter import Exporter
from organism.worker.heart import Heart
from organism.worker.lease import Lease
from organism.worker.progress import PROGRESS_FILE, read_progress
from organism.worker.reporter import Reporter
from organism.worker.runner import Runner, Stop, Stuck
from organism.worker.state import WorkerState
from organism.worker.store import Attempt
from organism.worker.uploader import Uploader
from organism.worker.warm import Warm

log = logging.getLogger(__name__)

LATE = 0.3
"""Seconds that a stopping worker waits for one more order which was sent before the conductor knew."""
PROGRESS_EVERY = 1.0
NOT_BEGUN = "the worker was stopped before the job began"
CLEAN_EVERY = 60.0
REPORTING = 16
"""Reports of orders that start nothing which are on their way at the same time."""
REPORT_PATIENCE = 5.0
"""Seconds that a worker which was told to stop still waits for the conductor's answer; the outcome is on disk."""


class Order(Protocol):
    """A message of the bus."""

    @property
    def subject(self) -> str: ...

    @property
    def data(self) -> bytes: ...


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    heartbeat: float = 5
    metrics: float = 5
    stop_grace: float = 20
    keep_tasks: int = 200
    keep_seconds: float = 72 * 3600


class Worker:
    def __init__(
        self,
        bus: Bus,
        state: WorkerState,
        runner: Runner,
        pace: Pace,
        cache: CacheUse | None = None,
        exporter: Exporter | None = None,
        uploader: Uploader | None = None,
    ) -> None:
        self.state = state
        self.lease = Lease()
        self.heart = Heart(bus, state, self.lease, pace.heartbeat, on_reset=self._reset, on_revoked=self._revoke)
        self.reporter = Reporter(bus)
        self.cache = cache or CacheUse(None, state.gpu)
        self.exporter = exporter or Exporter(Root(), "", state)
        self.uploader = uploader
        self.controller = Controller(state, runner.store, self.cache)
        self.stopping = asyncio.Event()
        self._bus = bus
        self._runner = runner
        self._warm = Warm(runner.settings.cache)
        self._pace = pace
        self._coming: asyncio.Queue[RunOrder | None] = asyncio.Queue()
        """Orders in hand; None says that there is something else to look at."""
        self._reports: set[asyncio.Task[None]] = set()
        self._says: set[asyncio.Task[None]] = set()
        self._reporting = asyncio.Semaphore(REPORTING)
        self._leftovers: list[tuple[Attempt, Report]] = []
        self._no_metrics = Complaint("the GPU's sensors cannot be read")

    # ---- life --------------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Clear up after an earlier run of this worker; nothing is taken from the bus before."""
        for name in await self._runner.launcher.clear(self.state.gpu):
            log.warning("ended what an earlier worker had left running: %s", name)
        async with self.cache.hold():
            unreported, died = await asyncio.to_thread(self._runner.store.leftovers)
            for attempt in died:
                attempt.abandon("the worker ended while it ran")
                self.event("leftover", "died with an earlier worker", attempt.ref)
        self._leftovers = unreported
        self.state.unreported = {attempt.ref for attempt, _ in unreported}

    async def run(self) -> None:
        """Until :meth:`stop`. Whoever calls it lets :meth:`order` hear first. Raises what makes a worker useless."""
        await self._announce()
        self.event("start", f"serves {self.state.device.backend} {self.state.device.address}")
        background = [
            self.heart.run(),
            self._metrics(),
            self._watch_progress(),
            self._report_leftovers(),
            self._clean(),
            *([self.uploader.run()] if self.uploader is not None else []),
        ]
        tasks = [asyncio.create_task(part) for part in background]
        taking = asyncio.create_task(self._take_orders())
        stopped = asyncio.create_task(self.stopping.wait())
        try:
            done, _ = await asyncio.wait({*tasks[:2], taking, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()  # none of them ends by itself but by an error
            await self._wind_down(taking)
        finally:
            for task in (*tasks, taking, stopped, *self._says, *self._reports):
                task.cancel()
            await asyncio.gather(*tasks, taking, stopped, *self._says, *self._reports, return_exceptions=True)

    def stop(self) -> None:
        self.stopping.set()
        self._coming.put_nowait(None)

    async def _wind_down(self, taking: asyncio.Task[None]) -> None:
        """Let the job finish within its grace, hand back what was not begun, and go."""
        self.state.stopping = True
        self.event("shutdown", "finishing the running job" if self.state.running else "")
        await self.heart.beat()  # from its answer on the conductor sends nothing more
        if self.state.running:
            await asyncio.wait({taking}, timeout=self._pace.stop_grace)
        for stop in self.state.running.values():
            stop.ask("shutdown", f"the worker was stopped and the job did not end within {self._pace.stop_grace:g} s")
        while self.state.running and not taking.done():
            await asyncio.wait({taking}, timeout=0.2)
        await asyncio.wait({taking}, timeout=REPORT_PATIENCE)
        if taking.done():
            taking.result()
            await self._hand_back()
        if self._reports:
            await asyncio.wait(self._reports, timeout=REPORT_PATIENCE)
        if self._says:
            await asyncio.wait(self._says, timeout=1)

    async def _hand_back(self) -> None:
        """Orders that were sent before the conductor knew: told as not begun, which costs the job no try."""
        with contextlib.suppress(BusError, TimeoutError):  # without a bus there is nothing to hand back to
            async with asyncio.timeout(REPORT_PATIENCE):
                while (order := await self._late()) is not None:
                    if order.incarnation == self.state.incarnation:
                        await self.reporter.deliver(self._runner.report(order, error="shutdown", message=NOT_BEGUN))

    async def _late(self) -> RunOrder | None:
        try:
            async with asyncio.timeout(LATE):
                while True:
                    order = await self._coming.get()
                    if order is not None:
                        return order
        except TimeoutError:
            return None

    # ---- orders ------------------------------------------------------------------------------------------------------

    async def order(self, message: Order) -> None:
        """Callback of the order subject."""
        epoch = int(message.subject.rpartition(".")[2])
        if epoch < self.state.epoch:  # it may have been over for long: the one who leads says what is to be done
            self.event("dropped", f"from the conductor of epoch {epoch}, which leads no more")
            return
        order = self._read(message)
        if order is None:
            return
        ref = TaskRef(order.task_id, order.attempt)
        if ref in self.state.coming or ref in self.state.unreported or self.state.is_finished(ref):
            return  # handed over again while a heartbeat was on its way
        self.state.coming.add(ref)
        self._coming.put_nowait(order)

    async def _take_orders(self) -> None:
        while not self.stopping.is_set():
            if self.state.stuck:
                await self.stopping.wait()
                return
            order = await self._coming.get()
            if order is not None:
                ref = TaskRef(order.task_id, order.attempt)
                try:
                    await self._handle(order, ref)
                finally:
                    self.state.coming.discard(ref)

    def _read(self, delivery: Order) -> RunOrder | None:
        """The order, or None after it was refused for good: a payload that is wrong stays wrong."""
        try:
            order = messages.decode(delivery.data, RunOrder)
            if order.attempt < 1:
                raise messages.BadMessage("attempt must be at least 1 - at `$.attempt`")
            if order.gpu != self.state.gpu:
                raise messages.BadMessage(f"meant for {order.gpu} - at `$.gpu`")
        except messages.BadMessage as error:
            self.event("bad_order", str(error))
            return None
        return order

    async def _handle(self, order: RunOrder, ref: TaskRef) -> None:
        if self._runner.starts_nothing(order):
            await self._handle_brief(order, ref)
            return
        async with self.cache.hold():
            if not await self._may_start(order):
                return
            report = await self._run(order, ref)
            if report is not None:
                await self._deliver(ref, report)
        self.state.finished(ref)

    async def _handle_brief(self, order: RunOrder, ref: TaskRef) -> None:
        """An order that starts nothing: it is reported while the next one is taken.

        Nothing of it is on disk: after this worker's death the conductor gives it anew in any case.
        """
        if not await self._may_start(order):
            return
        report = await self._run(order, ref)
        if report is not None:
            await self._reporting.acquire()
            self._later(self._reports, self._report_brief(ref, report))

    async def _report_brief(self, ref: TaskRef, report: Report) -> None:
        try:
            await self.reporter.deliver(report)
            self.state.finished(ref)
            self.state.unreported.discard(ref)
        finally:
            self._reporting.release()

    async def _may_start(self, order: RunOrder) -> bool:
        """False when the order must be dropped. Asks the conductor first when the lease is over."""
        ref = TaskRef(order.task_id, order.attempt)
        if not self.lease.fresh:
            asking = asyncio.create_task(self.heart.ensure_fresh())
            stopped = asyncio.create_task(self.stopping.wait())
            try:
                # a reset answers the question, too: the order was given to whom we were
                while not asking.done() and not stopped.done() and order.incarnation == self.state.incarnation:
                    await asyncio.wait({asking, stopped}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (asking, stopped):
                    task.cancel()
                await asyncio.gather(asking, stopped, return_exceptions=True)
        if order.incarnation != self.state.incarnation:
            self.event("dropped", f"given to incarnation {order.incarnation}", ref)
            return False
        if ref in self.state.revoked:
            self.event("dropped", "revoked before it began", ref)
            return False
        return True

    async def _run(self, order: RunOrder, ref: TaskRef) -> Report | None:
        if self.stopping.is_set():
            return self._runner.report(order, error="shutdown", message=NOT_BEGUN)
        stop, begun = Stop(), time.monotonic()
        self.state.running[ref] = stop
        self._warm.wanted(order.spec.inputs)
        try:
            report = await self._runner.run(order, stop, self.heart.nudge)
        except Stuck as error:
            self.state.stuck = str(error)
            self.event("stuck", f"{error}; this GPU takes no more orders until the worker is restarted", ref)
            report = self._runner.report(order, error=stop.why or "timeout", message=str(error))
        finally:
            # in one step: a heartbeat in between must find it in one of the two
            del self.state.running[ref]
            self.state.progress.pop(ref, None)
            self.state.unreported.add(ref)
        self.exporter.ended(None if stop.why == "discard" else report, time.monotonic() - begun)
        if report is None or stop.why == "discard":
            self.state.unreported.discard(ref)
            return None
        if report.error == "refused":
            self.event("refused", report.message, ref)
        return report

    async def _deliver(self, ref: TaskRef, report: Report, attempt: Attempt | None = None) -> None:
        reply = await self.reporter.deliver(report)
        self.state.unreported.discard(ref)
        if reply.verdict in ("stale", "unknown"):
            log.info(
                "report of %s attempt %d is not wanted: %s %s", ref.task_id, ref.attempt, reply.verdict, reply.reason
            )
        kept = attempt or self._runner.store.attempt(ref)
        if kept.path.exists():
            if self.uploader is not None and reply.verdict in ("recorded", "duplicate"):
                self.uploader.owe(kept, report)
            kept.acknowledge()

    # ---- what the conductor says -------------------------------------------------------------------------------------

    def _revoke(self, ref: TaskRef) -> None:
        stop = self.state.running.get(ref)
        if stop is not None:
            stop.ask("discard", "revoked by the conductor")
        self.state.revoked.add(ref)

    def _reset(self, reason: str) -> None:
        for stop in self.state.running.values():
            stop.ask("discard", f"reset: {reason}")
        before = self.state.incarnation
        self.state.renew()
        self.event("reset", f"{reason} (was incarnation {before})")
        self._later(self._says, self._announce())

    async def control(self, message: Any) -> None:
        """Callback of the control subject: one answer each."""
        reply = self.controller.answer(message.data)
        if message.reply.startswith(_bus.inbox_prefix("")):
            with contextlib.suppress(BusError):  # whoever asked will ask again
                await self._bus.say(message.reply, messages.encode(reply))

    # ---- background --------------------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        with contextlib.suppress(BusError):  # the first heartbeat says the same
            await self._bus.say(_bus.up_subject(self.state.gpu), messages.encode(self.state.heartbeat()))

    async def _report_leftovers(self) -> None:
        for attempt, report in self._leftovers:
            self.event("leftover", f"reporting an outcome from before: {report.error or 'done'}", attempt.ref)
            async with self.cache.hold():
                await self._deliver(attempt.ref, report, attempt)
        self._leftovers = []

    async def _metrics(self) -> None:
        while True:
            try:
                # in a thread: the sensors of a hung card may block, and heartbeats must go on
                readings = await asyncio.to_thread(self._runner.device.readings)
                await self._look_at_cache()
                metrics = self.state.metrics(readings)
                await asyncio.to_thread(self.exporter.write, metrics, self.heart.answered)
                await self._bus.say(_bus.metrics_subject(self.state.gpu), messages.encode(metrics))
                self._no_metrics.over()
            except (OSError, RuntimeError, BusError) as error:
                self._no_metrics.note(error)
                await asyncio.to_thread(self.exporter.write, None, self.heart.answered)
            await asyncio.sleep(self._pace.metrics)

    async def _look_at_cache(self) -> None:
        """Unless it is being emptied: an open directory would keep it mounted. Raises OSError."""
        try:
            with self.cache.hold_now():
                self.state.warm = await asyncio.to_thread(self._warm.look)
        except CacheBusyError:
            self.state.warm = []

    async def _watch_progress(self) -> None:
        """What jobs say of their progress goes out with a heartbeat, a second after it was said at most."""
        while True:
            for ref in list(self.state.running):
                work = self._runner.store.attempt(ref).work
                # in a thread: the job's directory may be on a disk that hangs, and heartbeats must go on
                told = await asyncio.to_thread(read_progress, work / PROGRESS_FILE, ref)
                before = self.state.progress.get(ref)
                if told is None or ref not in self.state.running:
                    continue
                if before is None or (told.fraction, told.text) != (before.fraction, before.text):
                    self.state.progress[ref] = told
                    self.heart.nudge()
            await asyncio.sleep(PROGRESS_EVERY)  # a file that is written tells nobody

    async def _clean(self) -> None:
        while True:
            async with self.cache.hold():
                await asyncio.to_thread(
                    self._runner.store.clean,
                    now=time.time(),
                    keep=self._pace.keep_tasks,
                    keep_seconds=self._pace.keep_seconds,
                )
            await asyncio.sleep(CLEAN_EVERY)

    def event(self, event: str, text: str = "", ref: TaskRef | None = None) -> None:
        """Into the journal and onto the bus."""
        about = f" {ref.task_id} attempt {ref.attempt}:" if ref else ""
        log.log(logging.INFO if event in ("start", "shutdown") else logging.WARNING, "%s:%s %s", event, about, text)

        async def say() -> None:
            with contextlib.suppress(BusError):  # the journal has it
                await self._bus.say(_bus.log_subject(self.state.gpu), messages.encode(self.state.log(event, text, ref)))

        self._later(self._says, say())

    def _later(self, group: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(group.discard)
