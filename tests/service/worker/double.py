# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conductor's half of the protocol, told by the test what to answer, and a real worker process under it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus import messages
from organism.bus.connection import BusClient
from organism.bus.messages import (
    Control,
    ControlReply,
    Heartbeat,
    HeartbeatReply,
    JobSpec,
    Report,
    RunOrder,
    TaskRef,
)
from organism.core import _bus
from service.support import HANG, BusServer


class Conductor:
    """Grants leases and stores reports; ``answering`` off makes it deaf."""

    def __init__(self, nc: BusClient) -> None:
        self.nc = nc
        self.beats: list[Heartbeat] = []
        self.reports: list[Report] = []
        self.events: list[dict[str, Any]] = []
        self.answering = True
        self.taking_reports = True
        self.hands = True
        self.epoch = 1
        self.lease_s = 30.0
        self.dead: set[str] = set()
        """Incarnations that are told to reset."""
        self.revoked: list[TaskRef] = []
        self.verdicts: dict[tuple[str, int], str] = {}
        self._changed = asyncio.Event()

    @classmethod
    async def start(cls, bus: BusServer) -> Conductor:
        made = cls(await bus.connected("conductor", "a"))
        await made.nc.listen("gpu.worker.heartbeat.*", made._heartbeat)
        await made.nc.listen("gpu.task.done.*", made._report)
        await made.nc.listen("gpu.task.err.*", made._report)
        watcher = await bus.connected("observer", "console")
        await watcher.listen("gpu.worker.log.*", made._event)
        made._watcher = watcher
        return made

    _watcher: BusClient

    async def close(self) -> None:
        await self._watcher.close()
        await self.nc.close()

    async def _event(self, message: Any) -> None:
        self.events.append(json.loads(message.data))
        self._changed.set()

    async def _heartbeat(self, message: Any) -> None:
        if not self.answering:
            return
        beat = messages.decode(message.data, Heartbeat)
        self.beats.append(beat)
        self._changed.set()
        reset = beat.incarnation in self.dead
        reply = HeartbeatReply(
            ok=not reset,
            lease_s=0 if reset else self.lease_s,
            epoch=self.epoch,
            revoked=self.revoked,
            reset=reset,
            hands=self.hands,
        )
        await self.nc.say(message.reply, messages.encode(reply))

    async def _report(self, message: Any) -> None:
        if not self.taking_reports:
            return
        report = messages.decode(message.data, Report)
        wanted = _bus.done_subject if report.error is None and report.returncode == 0 else _bus.err_subject
        assert message.subject == wanted(report.gpu_id)
        self.reports.append(report)
        self._changed.set()
        verdict = self.verdicts.get((report.task_id, report.attempt), "recorded")
        await self.nc.say(message.reply, b'{"verdict": "%s"}' % verdict.encode())

    async def until(self, what: Callable[[], Any]) -> Any:
        """The first true value of ``what``, looked at after each message."""
        async with asyncio.timeout(HANG):
            while not (value := what()):
                self._changed.clear()
                await self._changed.wait()
        return value

    async def incarnation(self, gpu: str = "gpu0", *, other_than: str = "") -> str:
        def newest() -> str:
            told = [beat.incarnation for beat in self.beats if beat.gpu_id == gpu]
            return told[-1] if told and told[-1] != other_than else ""

        return str(await self.until(newest))

    async def order(
        self,
        task_id: str,
        gpu: str = "gpu0",
        *,
        incarnation: str = "",
        attempt: int = 1,
        timeout: float = 60,
        on_disk: bool = False,
        **spec: Any,
    ) -> RunOrder:
        order = RunOrder(
            ts=messages.now(),
            task_id=task_id,
            attempt=attempt,
            gpu=gpu,
            incarnation=incarnation or await self.incarnation(gpu),
            user="alice",
            timeout=timeout,
            spec=JobSpec(**spec),
            enq_seq=1,
            on_disk=on_disk,
        )
        await self.nc.say(_bus.order_subject(gpu, self.epoch), messages.encode(order))
        return order

    async def report(self, task_id: str, attempt: int = 1) -> Report:
        def found() -> Report | None:
            return next((r for r in self.reports if (r.task_id, r.attempt) == (task_id, attempt)), None)

        report = await self.until(found)
        assert isinstance(report, Report)
        return report

    async def run(self, task_id: str, gpu: str = "gpu0", **options: Any) -> Report:
        order = await self.order(task_id, gpu, **options)
        return await self.report(task_id, order.attempt)

    async def event(self, name: str) -> dict[str, Any]:
        found = await self.until(lambda: next((e for e in self.events if e["event"] == name), None))
        assert isinstance(found, dict)
        return found

    async def running(self, task_id: str) -> Heartbeat:
        """The heartbeat that first says so."""
        return await self.until(  # type: ignore[no-any-return]  # what the generator below yields
            lambda: next((b for b in self.beats if any(ref.task_id == task_id for ref in b.running)), None)
        )

    async def control(self, gpu: str = "gpu0", **fields: Any) -> ControlReply:
        answer = await self.nc.ask(_bus.control_subject(gpu), messages.encode(Control(**fields)), timeout=HANG)
        return messages.decode(answer.data, ControlReply)

    async def settled(self) -> None:
        """A heartbeat from now on says that the worker has nothing in hand."""
        seen = len(self.beats)
        await self.until(lambda: any(not beat.running and not beat.unreported for beat in self.beats[seen:]))


class WorkerProcess:
    """``organism-gpu-worker`` as its own process."""

    def __init__(self, directory: Path, bus: BusServer, gpu: str = "gpu0", **settings: Any) -> None:
        self.directory = directory
        self.gpu = gpu
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        self.cache = directory / "cache"
        names = dict.fromkeys([gpu, *settings.pop("neighbours", ())])
        devices = [
            {"id": name, "backend": "simulated", "address": f"sim:{number}", "model": "Simulated GPU (no hardware)"}
            for number, name in enumerate(names)
        ]
        (directory / "gpus.json").write_text(json.dumps({"version": 1, "gpus": devices}))
        policy = settings.pop("policy", None)
        if policy is not None:
            (directory / "policy.toml").write_text(policy)
        values = {
            "NATS_URL": bus.url,
            "NKEY_FILE": bus.credentials("worker", gpu),
            "GPU_MAP": directory / "gpus.json",
            "WORK_ROOT": self.cache,
            "POLICY_FILE": directory / "policy.toml",
            "LAUNCHER": "process",
            "JOB_USER": "",
            "HEARTBEAT_SEC": 0.3,
            "METRICS_SEC": 0.3,
            "KILL_GRACE_SEC": 0.5,
            "TEXTFILE_COLLECTOR": "",
            **settings,
        }
        self.config = directory / "gpu-worker.conf"
        self.config.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "worker.log"

    def start(self) -> WorkerProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "organism.worker.daemon", "--gpu", self.gpu, "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, HANG)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(HANG)


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def await_gone(pids: list[int]) -> None:
    """Fails when one of the processes is still there after the hang guard."""
    deadline = time.monotonic() + HANG
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            pytest.fail(f"still there: {[pid for pid in pids if alive(pid)]}")
        time.sleep(0.02)  # nobody tells about the end of a process that is not one's child


def await_file(path: Path, lines: int = 1) -> str:
    """The text of a file that a job or the worker writes, once it has so many lines."""
    deadline = time.monotonic() + HANG
    while not (path.exists() and path.read_text().count("\n") >= lines):
        if time.monotonic() > deadline:
            pytest.fail(f"{path} was never written")
        time.sleep(0.02)  # who writes a file tells nobody
    return path.read_text()


def is_root() -> bool:
    return os.geteuid() == 0
