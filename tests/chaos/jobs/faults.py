# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does what the plan's faults say, each at its time, one at a time on each part."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from chaos.jobs.bus import Server
from chaos.jobs.notebook import Notebook
from chaos.jobs.parts import HANG, Part, wait_for
from chaos.jobs.plan import CONDUCTORS, Fault
from chaos.jobs.pool import Pool
from chaos.jobs.recorder import Recorder
from chaos.ram.disks import CUTS

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.errors import BusError
from organism.bus.messages import Report, ReportReply
from organism.core import _bus

WATCH = 0.2
"""Seconds after which what has ended by itself is started again, as by systemd."""
FORGED = "ZOMBIE"
"""Output of a job that never ran: no result may have it."""
LATER = 2**40
"""An epoch that no conductor reaches: what it says is heard."""


class Faults:
    def __init__(self, pool: Pool, book: Notebook, recorder: Recorder) -> None:
        self.pool, self.book, self.recorder = pool, book, recorder
        self.done: Counter[str] = Counter()
        self._locks = {name: asyncio.Lock() for name in pool.parts}
        self._others: dict[tuple[str, str], BusClient] = {}
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
        for client in self._others.values():
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
        """With a conductor's own key: every order that the GPU was ever given comes to its worker again."""
        gpu = part.name.split(".")[1]
        given = [order for orders in self.recorder.orders.values() for order in orders if order["gpu"] == gpu]
        problem = ""
        try:
            nc = await self._other("conductor", CONDUCTORS[0])
            await nc.wait_connected(HANG)
            for order in given:
                await nc.say(_bus.order_subject(gpu, LATER), json.dumps(order).encode())
        except BusError as error:  # the server is away for longer: there was no storm
            problem = str(error)[:80]
        self.book.note("storm", gpu=gpu, orders=len(given), problem=problem)

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
                answer = await (await self._other("worker", gpu)).ask(
                    _bus.done_subject(gpu), messages.encode(report), timeout=3.0
                )
                verdict: str = messages.decode(answer.data, ReportReply).verdict
            except BusError as problem:
                verdict = f"no answer: {problem}"[:80]
            self.book.note("forged", task_id=order["task_id"], attempt=order["attempt"], gpu=gpu, verdict=verdict)

    async def _other(self, kind: str, name: str) -> BusClient:
        """A second connection with the key of one of the pool's parts."""
        if (kind, name) not in self._others:
            self._others[kind, name] = await self.pool.connected(kind, name)
        return self._others[kind, name]
