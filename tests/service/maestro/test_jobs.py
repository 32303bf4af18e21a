# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs from submission to result, on a real bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.maestro.stage import ConductorProcess, FakeWorker, Submitter, settled_books
from service.support import BusServer

Conductors = Callable[..., ConductorProcess]


def test_a_job_runs_and_its_result_is_known(bus: BusServer, conductors: Conductors) -> None:
    async def main() -> None:
        conductor = conductors()
        worker = await FakeWorker(bus, "gpu0").start()
        alice = await Submitter.connect(bus)
        task_id = await alice.submit()
        result = await alice.result(task_id)
        assert (result.ok, result.state, result.user) == (True, "done", "alice")
        assert result.data["stdout"] == f"ran {task_id}\n"
        assert result.data["gpu_id"] == "gpu0"
        assert [event.state for event in result.history] == ["enqueued", "scheduled", "done"]
        assert await settled_books(bus, [task_id]) == {"done": 1}
        assert worker.verdicts[-1][1] == "recorded"
        await worker.stop()
        assert conductor.stop() == 0

    asyncio.run(main())
