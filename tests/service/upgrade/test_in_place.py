# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An upgrade in place, jobs in flight: earlier conductor, workers and streams, then the present ones; nothing is lost.

The earlier ones are taken from this repository's own history: the conductor and worker as they were before jobs could
wait for each other, users had limits and turns were fair.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.client import AsyncMaestro
from organism.core import _bus
from service.client.pool import WORKER, ConductorProcess, Pool
from service.maestro.stage import eventually
from service.support import HANG, REPO
from service.worker.double import WorkerProcess

EARLIER = "1a7a676"
"""The last commit before ef92f3f ("Let jobs run after others ...")."""
GPUS = ["gpu0", "gpu1", "gpu2"]
JOBS = 45
SCRIPT = (
    'echo "$ORGANISM_ATTEMPT" >> "$0/$ORGANISM_TASK_ID.begun"; sleep 0.3;'
    ' echo "$ORGANISM_ATTEMPT" >> "$0/$ORGANISM_TASK_ID.ended"; exit "$1"'
)


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The earlier runtime, to be put on PYTHONPATH."""
    made = tmp_path_factory.mktemp("earlier")
    try:
        packed = subprocess.run(
            ["git", "-C", str(REPO), "archive", EARLIER, "runtime/src", "plugins/module_utils"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no git: the earlier version comes from the repository's history")
    if packed.returncode != 0:
        pytest.skip(f"commit {EARLIER} is not in this copy of the repository (a shallow clone, or a release's archive)")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(made)  # our own history's
    return made / "runtime" / "src"


def as_before(worker: WorkerProcess, place: Path) -> None:
    """Only the settings that the earlier worker knows, as its own role would have written them."""
    known = (place / "organism/core/_worker_settings.py").read_text()
    lines = worker.config.read_text().splitlines()
    kept = [line for line in lines if f'Key("{line.partition("=")[0]}"' in known]
    worker.config.write_text("".join(f"{line}\n" for line in kept))


@contextmanager
def imported_from(place: Path) -> Iterator[None]:
    """Programs started meanwhile are those of ``place``."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(place)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def apply_topology(pool: Pool, queue_mib: int, *words_of_its_own: str, **more: int) -> str:
    """``organism-bus topology apply`` of whichever version is imported; what it has changed.

    ``more``: sizes in MiB that only the present one knows.
    """
    sizes = {"queue_bytes": queue_mib, "results_bytes": 64, "events_bytes": 64, "dead_bytes": 16, "jobs_bytes": 32}
    limits = json.dumps({name: size * _bus.MIB for name, size in {**sizes, "telemetry_bytes": 16, **more}.items()})
    words = ["topology", "apply", *words_of_its_own, "--limits", limits, "--server", pool.bus.url]
    words += ["--key", str(pool.bus.credentials("admin", "setup"))]
    done = subprocess.run(
        [sys.executable, "-m", "organism.cli.bus", *words], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Machines:
    """The pool's processes, of the one version or the other."""

    def __init__(self, directory: Path) -> None:
        self.pool = Pool(directory, GPUS)
        self.pool.bus.admit(("conductor", "b"))
        self.directory = directory
        self.old = self.pool.conductor
        self.new = ConductorProcess(directory / "maestro-b", self.pool.bus, "b")

    def worker(self, gpu: str) -> WorkerProcess:
        """Another program over the same folders, as after an upgrade."""
        return WorkerProcess(self.directory / f"worker-{gpu}", self.pool.bus, gpu, **WORKER)

    def stop(self) -> None:
        self.new.stop()
        self.pool.stop()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    made.stop()


def lines(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("how", ["told to stop", "killed"])
def test_an_upgrade_with_jobs_in_flight_loses_nothing(
    machines: Machines, earlier: Path, tmp_path: Path, how: str
) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()
    pool = machines.pool
    pool.bus.start()
    with imported_from(earlier):
        apply_topology(pool, 48, "--gpus", ",".join(GPUS))
        machines.old.start()
        for worker in pool.workers.values():
            as_before(worker, earlier)
            worker.start()

    async def main() -> None:
        async with AsyncMaestro(pool.settings()) as maestro, asyncio.timeout(3 * HANG):
            jobs: list[dict[str, Any]] = [
                {
                    "cmd": ["sh", "-c", SCRIPT, str(ran), "3" if number % 9 == 0 else "0"],
                    "task_id": f"j{number}",
                    "max_retries": 1,
                }
                for number in range(JOBS)
            ]
            handles = await maestro.submit_many(jobs)
            results = maestro.as_completed(handles)
            found = [await anext(results) for _number in range(6)]

            changed = await asyncio.to_thread(apply_topology, pool, 64, logs_bytes=64)
            assert "max_bytes" in changed and _bus.STREAM_LOGS in changed, "the streams are migrated"
            machines.new.start()
            if how == "killed":
                await asyncio.to_thread(machines.old.kill9)
            else:
                await asyncio.to_thread(machines.old.stop)
            for gpu in GPUS:
                found.append(await anext(results))
                before, after = pool.workers[gpu], machines.worker(gpu)
                if how == "killed":
                    await asyncio.to_thread(before.kill)
                else:
                    assert before.process is not None
                    before.process.terminate()
                    await before.ended()
                pool.workers[gpu] = after.start()
            found += [result async for result in results]
            assert Counter(result.state for result in found) == {"failed": 5, "done": JOBS - 5}
            for result in found:
                begun, ended = lines(ran / f"{result.task_id}.begun"), lines(ran / f"{result.task_id}.ended")
                assert len(set(begun)) == len(begun), f"{result.task_id}: an attempt was run twice: {begun}"
                assert ended[-1] == result.attempts
            # what only the present version can do, after results of the earlier one
            later = await maestro.submit(["true"], after=["j1", "j9:failed"])
            assert (await later.result(HANG)).state == "done"
            assert (await maestro.submit(**jobs[1])).duplicate
            again = await asyncio.gather(*(maestro.result(f"j{number}") for number in range(JOBS)))
            assert {one.task_id: one.state for one in again} == {one.task_id: one.state for one in found}
            await eventually(states_told)

    async def states_told() -> bool:
        nc = await pool.bus.connected("admin", "setup")
        try:
            js = JetStream(nc)
            told = [await js.last(_bus.STREAM_EVENTS, _bus.state_subject(f"j{number}")) for number in range(JOBS)]
        finally:
            await nc.close()
        states = [messages.decode(one.data, messages.StateEvent).state for one in told if one is not None]
        return len(states) == JOBS and all(state in messages.FINAL_STATES for state in states)

    try:
        asyncio.run(main())
    except TimeoutError:
        pytest.fail(f"the upgrade did not come to its end:\n{pool.logs()}\n{machines.new.log.read_text()[-2000:]}")


def test_a_worker_that_is_upgraded_before_the_conductor_waits_for_it(machines: Machines, earlier: Path) -> None:
    """As level 7 comes before level 8: an order of the earlier conductor would lie where the worker does not look."""
    pool = machines.pool
    pool.bus.start()
    with imported_from(earlier):
        apply_topology(pool, 48, "--gpus", ",".join(GPUS))
        machines.old.start()
    worker = machines.worker(GPUS[0]).start()
    pool.workers = {GPUS[0]: worker}

    async def main() -> None:
        async with AsyncMaestro(pool.settings()) as maestro, asyncio.timeout(2 * HANG):
            job = await maestro.submit(["true"], max_retries=0)
            await eventually(drained)
            for _ in range(4):
                await asyncio.sleep(0.5)  # a job that is not dispatched tells nobody
                assert (await maestro.status(job.task_id)).attempt == 0
            await asyncio.to_thread(apply_topology, pool, 64, logs_bytes=64)
            machines.new.start()
            await asyncio.to_thread(machines.old.stop)
            result = await job.result(HANG)
            assert (result.state, result.attempts) == ("done", 1)

    async def drained() -> bool:
        return "the conductor is of an earlier version" in worker.log.read_text()

    asyncio.run(main())
