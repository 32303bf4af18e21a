# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does what the plan's faults say, each at its time, one at a time on each part."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from chaos.jobs.bus import Server
from chaos.jobs.notebook import Notebook
from chaos.jobs.parts import HANG, Part, wait_for
from chaos.jobs.plan import Fault
from chaos.jobs.pool import Pool
from chaos.jobs.recorder import Recorder
from chaos.ram.disks import CUTS

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.errors import ApiError, BusError, Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.messages import Report, ReportReply
from organism.core import _bus

WATCH = 0.2
"""Seconds after which what has ended by itself is started again, as by systemd."""
FORGED = "ZOMBIE"
"""Output of a job that never ran: no result may have it."""


class Faults:
    """``js`` is the administrator's connection."""

    def __init__(self, pool: Pool, js: JetStream, book: Notebook, recorder: Recorder) -> None:
        self.pool, self.js, self.book, self.recorder = pool, js, book, recorder
        self.done: Counter[str] = Counter()
        self._locks = {name: asyncio.Lock() for name in pool.parts}
        self._forgers: dict[str, BusClient] = {}
        self._how: dict[str, Callable[[Part, Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "freeze": self._freeze,
            "restart": self._restart,
            "cut": self._cut,
            "full disk": self._full,
            "slow disk": self._slow,
            "power cut": self._power,
            "clock step": self._step,
            "duplicate submit": self._repeat,
            "redelivery storm": self._storm,
            "zombie report": self._forge,
        }

    async def run(self, started: float) -> None:
        """All of them; returns when the last one is healed. Raises what ended the first that could not be."""
        try:
            async with asyncio.TaskGroup() as group:
                for fault in self.pool.plan.faults:
                    await asyncio.sleep(max(0.0, started + fault.at - time.monotonic()))
                    group.create_task(self._one(fault))
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        for client in self._forgers.values():
            await client.close()

    async def _one(self, fault: Fault) -> None:
        part = self.pool.parts[fault.victim]
        async with self._locks[fault.victim]:
            self.book.note("fault", number=fault.number, kind=fault.kind, victim=fault.victim, lasts=fault.lasts,
                           amount=fault.amount)  # fmt: skip
            await self._how[fault.kind](part, fault)
            self.done[fault.kind] += 1
            self.book.note("healed", number=fault.number)

    async def watch(self) -> None:
        """Start again what has ended by itself, for as long as this task lives."""
        while True:
            for part in self.pool.parts.values():
                if part is self.pool.submitter and part.process is not None and part.process.poll() == 0:
                    part.over = True
                status = part.watch()
                if status is not None:
                    self.book.note("ended by itself", part=part.name, status=status)
            self.recorder.check()
            await asyncio.sleep(WATCH)

    # ---- processes ---------------------------------------------------------------------------------------------------

    async def _kill(self, part: Part, fault: Fault) -> None:
        await asyncio.to_thread(part.kill)
        await asyncio.sleep(fault.lasts)
        part.start()

    async def _restart(self, part: Part, fault: Fault) -> None:
        await asyncio.to_thread(part.terminate)
        await asyncio.sleep(fault.lasts)
        part.start()

    async def _freeze(self, part: Part, fault: Fault) -> None:
        part.freeze()
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            part.thaw()  # also when another fault has ended the run: its history is still to be read

    async def _cut(self, part: Part, fault: Fault) -> None:
        self.pool.network.cut(part.name)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            self.pool.network.heal(part.name)  # see _freeze

    async def _step(self, part: Part, fault: Fault) -> None:
        self.pool.clocks[part.name].step(fault.amount)
        await asyncio.sleep(fault.lasts)

    # ---- disks -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _server(part: Part) -> Server:
        assert isinstance(part, Server)
        return part

    async def _full(self, part: Part, fault: Fault) -> None:
        server = self._server(part)
        await asyncio.to_thread(server.fill)
        await asyncio.sleep(fault.lasts)
        await asyncio.to_thread(server.make_room)
        await asyncio.to_thread(wait_for, lambda: self._mended(server), f"{part.name} after a full disk")

    def _watched(self, server: Server) -> str:
        """What the product's watch over this server's disk has said."""
        log = self.pool.parts[f"watch.{server.name}"].log
        return log.read_text() if log.exists() else ""

    def _mended(self, server: Server) -> bool:
        """The product has done its part: a server that had stopped storing was restarted, and stores again."""
        said = self._watched(server)
        stopped = max(said.rfind(words) for words in ("takes no write yet", "has room again"))
        return stopped < 0 or said.rfind("stores again") > stopped

    async def _slow(self, part: Part, fault: Fault) -> None:
        server = self._server(part)
        for delay in (fault.amount, 0.0):
            await asyncio.to_thread(server.kill)
            server.delay = delay
            server.start()
            if delay:
                await asyncio.sleep(fault.lasts)

    async def _power(self, part: Part, fault: Fault) -> None:
        how = random.Random(fault.number).choice(sorted(CUTS))
        await asyncio.to_thread(self._server(part).cut_power, how)
        await asyncio.sleep(fault.lasts)
        part.start()

    # ---- the protocol ------------------------------------------------------------------------------------------------

    async def _repeat(self, part: Part, fault: Fault) -> None:
        part.send(signal.SIGUSR1)

    async def _storm(self, part: Part, fault: Fault) -> None:
        """A GPU's consumer is made anew: every order that is still in the stream comes again, acknowledged or not."""
        gpu = part.name.split(".")[1]
        name = _bus.run_consumer(gpu)
        config = _bus.topology([gpu]).consumers[_bus.STREAM_WQ][name]
        body = {"stream_name": _bus.STREAM_WQ, "config": {**config, "deliver_policy": "all"}, "action": "create"}
        async with asyncio.timeout(4 * HANG):
            for call, payload in ((f"DELETE.{_bus.STREAM_WQ}.{name}", None), (f"CREATE.{_bus.STREAM_WQ}.{name}", body)):
                while True:
                    try:
                        await self.js.api(f"CONSUMER.{call}", payload)
                        break
                    except (Unavailable, ApiError) as problem:
                        if isinstance(problem, ApiError) and problem.code == 404 and call.startswith("DELETE"):
                            break  # an earlier try whose answer got lost
                        if isinstance(problem, ApiError) and problem.code < 500:
                            raise
                        await asyncio.sleep(0.3)  # the server, or its disk, is away and tells nobody when it is back

    async def _forge(self, part: Part, fault: Fault) -> None:
        """With a worker's own key: outcomes of attempts that are over, by one who was thought dead."""
        gpu = part.name.split(".")[1]
        chance = random.Random(fault.number)
        old = [
            order
            for orders in self.recorder.orders.values()
            for order in orders
            if order["gpu"] == gpu and (order is not orders[-1] or order["task_id"] in self.recorder.results)
        ]
        superseded = [order for order in old if order["task_id"] not in self.recorder.results]
        for order in chance.sample(superseded, min(3, len(superseded))) + chance.sample(old, min(3, len(old))):
            report = Report(
                ts=messages.now(), task_id=order["task_id"], attempt=order["attempt"], gpu_id=gpu,
                incarnation=order["incarnation"], type="cmd", returncode=0, stdout=f"{FORGED}\n",
            )  # fmt: skip
            try:
                answer = await (await self._forger(gpu)).ask(
                    _bus.done_subject(gpu), messages.encode(report), timeout=3.0
                )
                verdict: str = messages.decode(answer.data, ReportReply).verdict
            except BusError as problem:
                verdict = f"no answer: {problem}"[:80]
            self.book.note("forged", task_id=order["task_id"], attempt=order["attempt"], gpu=gpu, verdict=verdict)

    async def _forger(self, gpu: str) -> BusClient:
        if gpu not in self._forgers:
            self._forgers[gpu] = await self.pool.connected("worker", gpu)
        return self._forgers[gpu]
