# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real conductors as processes, workers that speak the protocol and start nothing, and a look at what is on the bus."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from organism.bus import messages, rpc_types
from organism.bus.connection import BusClient
from organism.bus.errors import BusError
from organism.bus.jetstream import JetStream
from organism.bus.messages import (
    Control,
    ControlReply,
    Device,
    Heartbeat,
    HeartbeatReply,
    JobSpec,
    Metrics,
    Report,
    ReportReply,
    Result,
    RpcReply,
    RunOrder,
    TaskRef,
)
from organism.core import _bus
from service.support import HANG, BusServer

BEAT = 0.25
Work = Callable[["FakeWorker", RunOrder], Awaitable[Report]]


async def until(what: Callable[[], Any], *, every: float = 0.02) -> Any:
    """The first true value of something that tells nobody when it changes."""
    async with asyncio.timeout(HANG):
        while not (value := what()):  # noqa: ASYNC110 - whoever changes it tells nobody
            await asyncio.sleep(every)
    return value


async def eventually(what: Callable[[], Awaitable[Any]], *, every: float = 0.1) -> Any:
    async with asyncio.timeout(HANG):
        while not (value := await what()):  # noqa: ASYNC110 - a server that has to be asked
            await asyncio.sleep(every)
    return value


# ---- conductors ------------------------------------------------------------------------------------------------------


class ConductorProcess:
    """``organism-maestro`` as it runs on a machine."""

    def __init__(self, bus: BusServer, directory: Path, name: str = "a", policy: str = "", **settings: Any) -> None:
        self.name = name
        directory.mkdir(parents=True, exist_ok=True)
        self.config = directory / f"maestro-{name}.conf"
        self.log = directory / f"maestro-{name}.log"
        policy_file = directory / "policy.toml"
        policy_file.write_text(policy or '[users]\noperators = ["olga"]\n')
        values: dict[str, Any] = {
            "NATS_URL": bus.url,
            "NKEY_FILE": bus.credentials("conductor", name),
            "NAME": name,
            "POLICY_FILE": policy_file,
            "LEASE_TTL_SEC": 2,
            "HEARTBEAT_TTL_SEC": 3,
            "RETRY_BACKOFF_SEC": 0.05,
            "LOG_LEVEL": "info",
            **settings,
        }
        self.config.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ConductorProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "organism.maestro.daemon", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    async def leading(self, times: int = 1) -> None:
        """Wait until it leads, for the n-th time."""

        def leads() -> bool:
            assert self.process is None or self.process.poll() is None, f"conductor ended:\n{self.text()[-3000:]}"
            return self.text().count("leading shard 0, epoch") >= times

        await until(leads)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill9(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        try:
            code = self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(HANG)
            raise
        self.process = None
        return code

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process is None:
            return 0
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return self.wait()


# ---- workers ---------------------------------------------------------------------------------------------------------


async def succeed(worker: FakeWorker, order: RunOrder) -> Report:
    return worker.report(order, returncode=0, stdout=f"ran {order.task_id}\n")


def lasting(seconds: float) -> Work:
    async def work(worker: FakeWorker, order: RunOrder) -> Report:
        await asyncio.sleep(seconds)
        return worker.report(order, returncode=0)

    return work


async def fail(worker: FakeWorker, order: RunOrder) -> Report:
    return worker.report(order, returncode=3, error="exit", stderr="no\n")


async def forever(worker: FakeWorker, order: RunOrder) -> Report:
    await asyncio.Event().wait()
    raise AssertionError("it waits for ever")


class FakeWorker:
    """One GPU's worker: orders, leases, incarnations and outcomes like the real one; ``work`` says how a job goes.

    ``outcomes`` stands for its disk: it survives :meth:`crash` and is given to the next start.
    """

    def __init__(self, bus: BusServer, gpu: str, work: Work = succeed, **device: Any) -> None:
        self.bus, self.gpu, self.work = bus, gpu, work
        self.device = Device(**{"backend": "simulated", "address": f"sim:{gpu}", "vram_mb": 8192, **device})
        self.types = ["cmd", "noop"]
        self.host = "rig"
        self.spec = messages.SPEC_LEVEL
        self.beat = BEAT
        self.incarnation = ""
        self.outcomes: dict[TaskRef, Report] = {}
        self.running: dict[TaskRef, asyncio.Task[None]] = {}
        self.revoked: set[TaskRef] = set()
        self.started: list[TaskRef] = []
        self.verdicts: list[tuple[TaskRef, str]] = []
        self.replies: deque[HeartbeatReply] = deque(maxlen=50)
        self.draining = False
        self.deaf = 0
        """Orders that get lost on their way, from now on."""
        self.listing = True
        """Off: the heartbeats keep quiet about what runs."""
        self.coming: set[TaskRef] = set()
        self._coming: asyncio.Queue[RunOrder] = asyncio.Queue()
        self._leased = asyncio.Event()
        self._outcome = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._nc: BusClient | None = None

    @property
    def nc(self) -> BusClient:
        assert self._nc is not None
        return self._nc

    async def start(self) -> FakeWorker:
        self._nc = await self.bus.connected("worker", self.gpu)
        self._coming = asyncio.Queue()
        self.coming.clear()
        await self.nc.hear(_bus.order_subject(self.gpu), self._order)
        self._renew()
        await self.nc.listen(_bus.control_subject(self.gpu), self._control)
        self._tasks = [asyncio.create_task(loop()) for loop in (self._beats, self._orders, self._reports)]
        return self

    def _renew(self) -> None:
        self.incarnation = secrets.token_hex(6)
        self._leased.clear()

    async def crash(self) -> None:
        """Everything but the disk is gone."""
        jobs = list(self.running.values())
        for task in (*self._tasks, *jobs):
            task.cancel()
        await asyncio.wait([*self._tasks, *jobs])
        self._tasks = []
        self.running.clear()
        self.revoked.clear()
        await self.nc.close()

    async def stop(self) -> None:
        if self._tasks:
            await self.crash()

    def report(self, order: RunOrder, **values: Any) -> Report:
        return Report(
            ts=messages.now(),
            task_id=order.task_id,
            attempt=order.attempt,
            gpu_id=self.gpu,
            incarnation=self.incarnation,
            type=order.spec.type,
            started=messages.now(),
            finished=messages.now(),
            **values,
        )

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            ts=messages.now(),
            gpu_id=self.gpu,
            incarnation=self.incarnation,
            host=self.host,
            pid=os.getpid(),
            version="0",
            device=self.device,
            types=self.types,
            running=list(self.running) if self.listing else [],
            unreported=list(self.outcomes) if self.listing else [],
            coming=sorted(self.coming, key=str) if self.listing else [],
            draining=self.draining,
            spec=self.spec,
            hears=True,
        )

    async def _beats(self) -> None:
        while True:
            beat = self._heartbeat()
            try:
                answer = await self.nc.ask(_bus.heartbeat_subject(self.gpu), messages.encode(beat), timeout=2)
                self._heard(messages.decode(answer.data, HeartbeatReply))
            except BusError:
                pass  # nobody leads at the moment: the next heartbeat tells
            await asyncio.sleep(self.beat)

    def _heard(self, reply: HeartbeatReply) -> None:
        self.replies.append(reply)
        if reply.reset:
            for task in self.running.values():
                task.cancel()
            self.running.clear()
            self._renew()
        for ref in reply.revoked:
            self._stop(ref)
        if reply.ok:
            self._leased.set()

    def _stop(self, ref: TaskRef) -> None:
        self.revoked.add(ref)
        task = self.running.pop(ref, None)
        if task is not None:
            task.cancel()

    async def _control(self, message: Any) -> None:
        order = messages.decode(message.data, Control)
        reply = ControlReply(ok=True)
        if order.op == "cancel":
            self._stop(TaskRef(order.task_id, order.attempt))
        elif order.op == "logs":
            reply = ControlReply(ok=True, text=f"log of {order.task_id}", next_offset=order.offset + 5)
        await self.nc.say(message.reply, messages.encode(reply))

    async def _order(self, message: Any) -> None:
        if self.deaf:
            self.deaf -= 1
        else:
            order = messages.decode(message.data, RunOrder)
            self.coming.add(TaskRef(order.task_id, order.attempt))
            self._coming.put_nowait(order)

    async def _orders(self) -> None:
        while True:
            order = await self._coming.get()
            ref = TaskRef(order.task_id, order.attempt)
            await self._leased.wait()
            if order.incarnation == self.incarnation and ref not in self.revoked and ref not in self.started:
                self.started.append(ref)
                self.running[ref] = asyncio.create_task(self._run(ref, order))
                await asyncio.wait([self.running[ref]])
            self.coming.discard(ref)

    async def _run(self, ref: TaskRef, order: RunOrder) -> None:
        report = await self.work(self, order)
        self.outcomes[ref] = report
        self.running.pop(ref, None)
        self._outcome.set()

    async def _reports(self) -> None:
        while True:
            refused = False
            for ref, report in list(self.outcomes.items()):
                done = report.error is None and report.returncode == 0
                subject = _bus.done_subject(self.gpu) if done else _bus.err_subject(self.gpu)
                try:
                    answer = await self.nc.ask(subject, messages.encode(report), timeout=2)
                    verdict = messages.decode(answer.data, ReportReply).verdict
                except BusError:
                    verdict = "retry"  # nobody leads at the moment
                self.verdicts.append((ref, verdict))
                if verdict == "retry":
                    refused = True
                else:
                    self.outcomes.pop(ref, None)
            if refused:
                await asyncio.sleep(0.2)
            elif not self.outcomes:
                self._outcome.clear()
                await self._outcome.wait()

    async def measure(self, **values: Any) -> None:
        """Publish metrics."""
        metrics = Metrics(ts=messages.now(), gpu_id=self.gpu, backend="simulated", **values)
        await self.nc.say(_bus.metrics_subject(self.gpu), messages.encode(metrics))
        await self.nc.flush()


# ---- the submitter's side --------------------------------------------------------------------------------------------


class Submitter:
    """A user's connection."""

    def __init__(self, nc: BusClient, user: str) -> None:
        self.nc, self.user, self.js = nc, user, JetStream(nc)

    @classmethod
    async def connect(cls, bus: BusServer, user: str = "alice", kind: str = "submitter") -> Submitter:
        return cls(await bus.connected(kind, user), user)

    async def submit(self, task_id: str = "", **spec: Any) -> str:
        task_id = task_id or f"job-{secrets.token_hex(6)}"
        job = JobSpec(**{"type": "cmd", "cmd": ["true"], "task_id": task_id, **spec})
        await self.raw(messages.encode(job), msg_id=f"{self.user}:{task_id}")
        return task_id

    async def raw(self, payload: bytes, *, msg_id: str | None = None) -> int:
        """Any payload; waits out what happens to the server. Returns the sequence."""
        async with asyncio.timeout(HANG):
            while True:
                try:
                    return (await self.js.publish(_bus.enqueue_subject(self.user), payload, msg_id=msg_id)).seq
                except BusError as problem:
                    if msg_id is None:
                        raise
                    self.problem = problem
                    await asyncio.sleep(0.1)

    async def call(self, operation: str, **body: Any) -> RpcReply:
        """One question; waits while nobody leads."""
        payload = msgspec.json.encode(body)
        async with asyncio.timeout(HANG):
            while True:
                try:
                    answer = await self.nc.ask(_bus.rpc_subject(self.user, operation), payload, timeout=30)
                    return messages.decode(answer.data, RpcReply)
                except BusError as problem:
                    self.problem = problem
                    await asyncio.sleep(0.1)

    async def state(self, task_id: str) -> rpc_types.JobInfo | None:
        reply = await self.call("status", task_id=task_id)
        return msgspec.convert(reply.data["job"], rpc_types.JobInfo) if reply.ok else None

    async def in_state(self, task_id: str, *states: str) -> rpc_types.JobInfo:
        async def reached() -> rpc_types.JobInfo | None:
            info = await self.state(task_id)
            return info if info is not None and info.state in states else None

        found = await eventually(reached)
        assert isinstance(found, rpc_types.JobInfo)
        return found

    async def results(self, *task_ids: str) -> dict[str, Result]:
        """Wait for all of them."""
        found: dict[str, Result] = {}
        pending = list(task_ids)
        async with asyncio.timeout(4 * HANG):
            while pending:
                reply = await self.call("wait", task_ids=pending[:500], timeout=5)
                assert reply.ok, reply.error
                data = rpc_types.from_data(reply.data, rpc_types.WaitReply)
                found.update(data.results)
                pending = [one for one in pending if one not in found]
                if data.unknown:
                    await asyncio.sleep(0.2)  # submitted, but not yet read by a conductor
        return found

    async def result(self, task_id: str) -> Result:
        return (await self.results(task_id))[task_id]
