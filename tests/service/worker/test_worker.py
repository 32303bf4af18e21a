# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real worker process on a real bus: from order to report, and everything that can come between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus.messages import TaskRef
from organism.core import _bus
from service.support import BusServer
from service.worker.double import Conductor, WorkerProcess, await_file, await_gone

Workers = Callable[..., WorkerProcess]


def conducted(bus: BusServer, test: Callable[[Conductor], Any]) -> None:
    async def main() -> None:
        conductor = await Conductor.start(bus)
        try:
            await test(conductor)
        finally:
            await conductor.close()

    asyncio.run(main())


def script(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_an_order_becomes_a_report_and_is_acknowledged(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("job1", cmd=script("echo out; echo err >&2; pwd"), env={"A": "b"})
        assert (report.returncode, report.error, report.gpu_id, report.type) == (0, None, "gpu0", "cmd")
        work = worker.cache / "tasks/job1/1/work"
        assert report.stdout == f"out\n{work}\n"
        assert report.stderr == "err\n"
        assert report.cwd == str(work)
        assert report.incarnation == await conductor.incarnation()
        await conductor.settled()
        outcome = json.loads((worker.cache / "tasks/job1/1/outcome.json").read_text())
        assert outcome["returncode"] == 0
        beat = conductor.beats[-1]
        assert beat.device.backend == "simulated"
        assert beat.types == ["cmd", "noop"]

    conducted(bus, test)


def test_a_failed_job_is_an_error_with_its_returncode(bus: BusServer, workers: Workers) -> None:
    workers()

    async def test(conductor: Conductor) -> None:
        report = await conductor.run("fails", cmd=script("echo bad >&2; exit 3"))
        assert (report.returncode, report.error, report.stderr) == (3, "exit", "bad\n")
        report = await conductor.run("dies", cmd=script("kill -TERM $$"))
        assert (report.returncode, report.error) == (-15, "signal")
        report = await conductor.run("missing", cmd=["no-such-program"])
        assert (report.returncode, report.error) == (None, "start")
        assert report.message == "cannot run 'no-such-program': No such file or directory"

    conducted(bus, test)


def test_a_noop_starts_nothing_and_leaves_nothing(bus: BusServer, workers: Workers) -> None:
    worker = workers()

    async def test(conductor: Conductor) -> None:
        incarnation = await conductor.incarnation()
        orders = [conductor.order(f"n{n}", incarnation=incarnation, type="noop") for n in range(50)]
        await asyncio.gather(*orders)
        reports = [await conductor.report(f"n{n}") for n in range(50)]
        assert [(report.returncode, report.error) for report in reports] == [(0, None)] * 50
        assert not (worker.cache / "tasks").exists()

    conducted(bus, test)
