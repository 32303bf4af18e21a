# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks of ``organism-validate``: does the pool do its work, seen from where its users stand?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from organism.bus import rpc_types
from organism.cli._checks import Outcome, Report
from organism.client import AsyncJobHandle, AsyncMaestro, MaestroError, Result, WaitTimeoutError
from organism.core import _bus

BEAT = 10.0
"""Seconds within which the conductor and each worker must be heard (S1l-021)."""
LABELS = {"made-by": "organism-validate"}
JOURNAL = "`journalctl -u gpu-worker@{gpu} -n 50` on its host"


@dataclass
class Validation:
    """One run. ``gpus``: those expected; empty: those that the conductor knows. ``limit``: seconds for a job."""

    maestro: AsyncMaestro
    report: Report
    limit: float = 20.0
    gpus: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)

    async def run(self) -> None:
        self._bus()
        if not await self._conductor():
            for check in ("gpu.heartbeat", "gpu.job", "job.fails", "job.timeout", "job.cancel"):
                self.report.skip(check, "", "no conductor")
            return
        await self._streams()
        await self._expect()
        await self._heartbeats()
        try:
            await self._jobs()
        finally:
            await self._leave_nothing()

    # ---- the bus and the conductor -----------------------------------------------------------------------------------

    def _bus(self) -> None:
        with self.report.check("bus") as found:
            server = self.maestro.server
            if server.get("jetstream"):
                found.passed(f"nats-server {server.get('version')} with JetStream at {self.maestro.where}")
            else:
                found.failed(
                    f"nats-server {server.get('version')} runs without JetStream",
                    "set `jetstream` in its configuration (role nats), and restart it",
                )

    async def _conductor(self) -> bool:
        with self.report.check("conductor") as found:
            try:
                leader = (await self.maestro.top()).conductor
                found.passed(f"{leader.name} {leader.version} leads since {leader.since}, epoch {leader.epoch}")
            except MaestroError as error:
                found.failed(str(error), "`systemctl status maestro` and `journalctl -u maestro -n 50` on its host")
                return False
        with self.report.check("conductor.heartbeat") as found:
            if self.maestro.settings.kind != "operator":
                found.skipped("only an operator may hear it; it did answer")
            elif await self._hear(_bus.MAESTRO_HEARTBEAT, lambda heard: bool(heard)):
                found.passed(f"heard within {BEAT:g} s")
            else:
                found.failed(f"not heard for {BEAT:g} s though it answers", "look at `journalctl -u maestro -n 50`")
        return True

    async def _hear(self, subject: str, enough: Callable[[set[str]], bool]) -> set[str]:
        """The last tokens of the subjects heard, until that is enough or the time is over."""
        heard: set[str] = set()
        try:
            async with asyncio.timeout(BEAT), aclosing(self.maestro.hear(subject)) as source:
                async for message in source:
                    heard.add(message.subject.rsplit(".", 1)[1])
                    if enough(heard):
                        break
        except TimeoutError:
            return heard
        return heard

    async def _streams(self) -> None:
        try:
            info = await self.maestro.info()
        except MaestroError as error:
            with self.report.check("streams") as found:
                found.failed(str(error), "look at `journalctl -u maestro -n 50`")
            return
        if not info.streams:
            self.report.skip("stream", "", "the conductor tells nothing of its streams")
        for name, stream in sorted(info.streams.items()):
            with self.report.check("stream", name) as found:
                if stream.problem:
                    found.failed(
                        stream.problem,
                        "`organism-bus topology plan` shows the difference, `organism-bus topology apply` mends it",
                    )
                else:
                    found.passed(f"as declared; {stream.messages} messages, {_size(stream.bytes, stream.max_bytes)}")

    # ---- the GPUs ----------------------------------------------------------------------------------------------------

    async def _expect(self) -> None:
        with self.report.check("gpu.known") as found:
            known = {gpu.id: gpu for gpu in (await self.maestro.top()).gpus}
            self.gpus = self.gpus or sorted(known)
            missing = [gpu for gpu in self.gpus if gpu not in known]
            drained = [gpu for gpu in self.gpus if gpu in known and known[gpu].state == "drained"]
            self.usable = [gpu for gpu in self.gpus if gpu not in drained]
            if not self.gpus:
                found.failed("the conductor knows no GPU", "start workers: `systemctl start gpu-worker@<id>`")
            elif missing:
                found.failed(f"never heard of: {', '.join(missing)}", f"look at {JOURNAL.format(gpu=missing[0])}")
            else:
                found.passed(f"{len(self.gpus)} GPUs" + (f", drained: {', '.join(drained)}" if drained else ""))
        for gpu in drained:
            self.report.skip("gpu.job", gpu, f"drained; `maestroctl undrain {gpu}` gives it jobs again")

    async def _heartbeats(self) -> None:
        wanted = set(self.gpus)
        started = time.monotonic()
        if self.maestro.settings.kind == "operator":
            heard = await self._hear(_bus.heartbeat_subject("*"), lambda names: names >= wanted)
        else:
            heard = {gpu.id for gpu in (await self.maestro.top()).gpus if _fresh(gpu)}
        took = time.monotonic() - started
        for gpu in self.gpus:
            with self.report.check("gpu.heartbeat", gpu) as found:
                if gpu in heard:
                    found.passed(f"heard within {max(took, 0.1):.1f} s")
                else:
                    found.failed(
                        f"not heard for {BEAT:g} s",
                        f"`systemctl status gpu-worker@{gpu}` and {JOURNAL.format(gpu=gpu)}",
                    )

    # ---- jobs --------------------------------------------------------------------------------------------------------

    async def _jobs(self) -> None:
        if not self.usable:
            for check in ("job.fails", "job.timeout", "job.cancel"):
                self.report.skip(check, "", "no GPU to run it on")
            return
        await asyncio.gather(*(self._job_on(gpu) for gpu in self.usable))
        await self._ends_as("job.fails", self._must_fail, cmd=["false"])
        await self._ends_as("job.timeout", self._must_time_out, cmd=["sleep", "600"], timeout=1)
        await self._cancelled()

    async def _submit(self, **job: Any) -> AsyncJobHandle:
        handle = await self.maestro.submit(max_retries=0, labels=LABELS, priority=100, confirm=self.limit, **job)
        self.submitted.append(handle.task_id)
        return handle

    async def _job_on(self, gpu: str) -> None:
        word = f"OK-{gpu}"
        with self.report.check("gpu.job", gpu) as found:
            result = await self._result(found, cmd=["echo", word], gpu=gpu, timeout=self.limit)
            if result is None:
                return
            if result.ok and result.stdout.strip() == word and result.gpu == gpu:
                found.passed(f"said {word}")
            else:
                said = result.stdout.strip() or result.stderr.strip() or "nothing"
                found.failed(
                    f"ended {result.state} ({result.error or 'no error'}) on {result.gpu}, said {said[:80]!r}:"
                    f" {result.reason}",
                    f"`maestroctl result {result.task_id}`, and {JOURNAL.format(gpu=gpu)}",
                )

    async def _result(self, found: Outcome, **job: Any) -> Result | None:
        """The result of a job, or None with the reason told."""
        try:
            handle = await self._submit(**job)
        except MaestroError as error:
            found.failed(str(error), "see the message")
            return None
        try:
            return await handle.result(self.limit)
        except WaitTimeoutError:
            found.failed(
                f"no result within {self.limit:g} s: {await self._why(handle)}", "`maestroctl top` shows who is busy"
            )
        except MaestroError as error:
            found.failed(str(error), "see the message")
        return None

    async def _why(self, handle: AsyncJobHandle) -> str:
        try:
            job = await handle.status()
        except MaestroError as error:
            return str(error)
        return f"{job.task_id} is {job.state}" + (f", {job.reason}" if job.reason else "")

    async def _ends_as(self, check: str, judge: Callable[[Result], str], **job: Any) -> None:
        with self.report.check(check) as found:
            result = await self._result(found, **job)
            if result is None:
                return
            wrong = judge(result)
            if wrong:
                found.failed(f"{result.task_id} {wrong}", f"`maestroctl result {result.task_id}`")
            else:
                found.passed(f"reported {result.state} ({result.error})")

    @staticmethod
    def _must_fail(result: Result) -> str:
        if not result.ok and result.state == "failed" and result.returncode == 1:
            return ""
        return f"should have failed with 1, ended {result.state} with {result.returncode}"

    @staticmethod
    def _must_time_out(result: Result) -> str:
        if not result.ok and result.state == "failed" and result.error == "timeout":
            return ""
        return f"should have been stopped after 1 s, ended {result.state} ({result.error})"

    async def _cancelled(self) -> None:
        with self.report.check("job.cancel") as found:
            try:
                handle = await self._submit(cmd=["sleep", "600"])
                job = await self._until_running(handle)
                await handle.cancel()
                result = await handle.result(self.limit)
            except MaestroError as error:
                found.failed(str(error), "`maestroctl list` shows what is there")
                return
            if result.state == "cancelled" and not result.ok:
                found.passed(f"stopped while {job.state}")
            else:
                found.failed(f"{handle.task_id} ended {result.state}", f"`maestroctl result {handle.task_id}`")

    async def _until_running(self, handle: AsyncJobHandle) -> rpc_types.JobInfo:
        """Raises WaitTimeoutError when it does not start in time."""
        try:
            async with asyncio.timeout(self.limit), aclosing(self.maestro.states(handle.task_id)) as events:
                async for event in events:
                    if event.state == "running":
                        break
        except TimeoutError:
            raise WaitTimeoutError(f"it did not start within {self.limit:g} s", [handle.task_id]) from None
        return await handle.status()

    async def _leave_nothing(self) -> None:
        with self.report.check("clean") as found:
            left: list[str] = []
            for task_id in self.submitted:
                try:
                    job = await self.maestro.status(task_id)
                    if job.state not in ("done", "failed", "cancelled", "dead"):
                        await self.maestro.cancel(task_id)
                except MaestroError as error:
                    left.append(f"{task_id} ({error})")
            if left:
                found.failed(f"may be left: {', '.join(left)}", f"maestroctl cancel {left[0].split()[0]}")
            else:
                found.passed(f"none of the {len(self.submitted)} jobs is left unfinished")


def _fresh(gpu: rpc_types.GpuInfo) -> bool:
    return gpu.heartbeat_age is not None and gpu.heartbeat_age <= BEAT


def _size(used: int, most: int) -> str:
    return f"{used / 1e6:.1f} of {most / 1e6:.0f} MB" if most > 0 else f"{used / 1e6:.1f} MB"
