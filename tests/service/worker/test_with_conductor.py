# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real workers under the real conductor: what the two only promise each other when both are there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.bus.messages import JobSpec, Result
from organism.core import _bus
from service.maestro.stage import ConductorProcess
from service.support import HANG, BusServer
from service.worker.double import WorkerProcess, await_file

Workers = Callable[..., WorkerProcess]


@pytest.fixture
def conductor(bus: BusServer, tmp_path: Path) -> Iterator[ConductorProcess]:
    made = ConductorProcess(bus, tmp_path / "maestro").start()
    yield made
    made.stop()


class Submitter:
    """Submits as alice and waits for what the conductor stores."""

    def __init__(self, js: JetStream) -> None:
        self.js = js

    async def submit(self, task_id: str, **spec: Any) -> None:
        payload = messages.encode(JobSpec(task_id=task_id, **spec))
        await self.js.publish(_bus.enqueue_subject("alice"), payload, msg_id=f"alice:{task_id}")

    async def result(self, reader: JetStream, task_id: str) -> Result:
        async with asyncio.timeout(HANG):
            while True:
                stored = await reader.last(_bus.STREAM_RESULTS, _bus.result_subject(task_id))
                if stored is not None:
                    return messages.decode(stored.data, Result)
                await asyncio.sleep(0.05)  # asking is all that this test's key may do


def staged(bus: BusServer, test: Callable[[Submitter, JetStream], Any]) -> None:
    async def main() -> None:
        alice = await bus.connected("submitter", "alice")
        reader = await bus.connected("conductor", "b")
        try:
            await test(Submitter(JetStream(alice)), JetStream(reader))
        finally:
            await alice.close()
            await reader.close()

    asyncio.run(main())


def test_jobs_end_as_they_should(bus: BusServer, conductor: ConductorProcess, workers: Workers) -> None:
    workers("gpu0")
    workers("gpu1")

    async def test(alice: Submitter, reader: JetStream) -> None:
        await conductor.leading()
        await alice.submit("good", cmd=["sh", "-c", "echo from $ORGANISM_GPU_ID"])
        await alice.submit("pinned", cmd=["sh", "-c", "echo from $ORGANISM_GPU_ID"], gpu="gpu1")
        await alice.submit("bad", cmd=["sh", "-c", "exit 3"], max_retries=1)
        await alice.submit("slow", cmd=["sleep", "300"], timeout=0.5, max_retries=0)
        await alice.submit("nothing", type="noop")
        await alice.submit("forbidden", type="shell", shell="id")
        results = {
            task: await alice.result(reader, task) for task in ("good", "pinned", "bad", "slow", "nothing", "forbidden")
        }
        assert {task: result.state for task, result in results.items()} == {
            "good": "done",
            "pinned": "done",
            "bad": "failed",
            "slow": "failed",
            "nothing": "done",
            "forbidden": "dead",
        }
        assert results["pinned"].data["stdout"] == "from gpu1\n"
        assert (results["bad"].data["returncode"], results["bad"].attempts) == (3, 2)
        assert results["slow"].error == "timeout"

    staged(bus, test)


def test_a_job_whose_worker_is_killed_runs_again_and_ends_once(
    bus: BusServer, conductor: ConductorProcess, workers: Workers
) -> None:
    worker = workers("gpu0")

    async def test(alice: Submitter, reader: JetStream) -> None:
        await conductor.leading()
        await alice.submit(
            "lost", cmd=["sh", "-c", "echo $$ >pid; test $ORGANISM_ATTEMPT -gt 1 || sleep 300; echo second"]
        )
        await asyncio.to_thread(await_file, worker.cache / "tasks/lost/1/work/pid")
        worker.signal(signal.SIGKILL)
        await worker.ended()
        worker.start()
        result = await alice.result(reader, "lost")
        assert (result.state, result.data["stdout"], result.attempts) == ("done", "second\n", 2)

    staged(bus, test)


def test_a_stopped_workers_job_moves_on_without_costing_a_try(
    bus: BusServer, conductor: ConductorProcess, workers: Workers
) -> None:
    worker = workers("gpu0", STOP_GRACE_SEC=0.2)

    async def test(alice: Submitter, reader: JetStream) -> None:
        await conductor.leading()
        script = "echo $$ >pid; test $ORGANISM_GPU_ID = gpu1 || sleep 300; echo moved"
        await alice.submit("moves", cmd=["sh", "-c", script], max_retries=0)
        await asyncio.to_thread(await_file, worker.cache / "tasks/moves/1/work/pid")
        workers("gpu1")
        worker.signal(signal.SIGTERM)
        assert await worker.ended() == 0
        result = await alice.result(reader, "moves")
        assert (result.state, result.data["stdout"]) == ("done", "moved\n")

    staged(bus, test)
