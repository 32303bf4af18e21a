# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real worker on a real cache: it is emptied between two jobs, never under one, and a full one does not stop jobs."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from organism.bus.jetstream import JetStream
from organism.core import _ramlayer as ramlayer
from organism.core._overlay import mounts
from organism.core._ramlayer import Layer
from organism.core._ramlayer_spill import Spilled, spill
from organism.core._root import Root
from service.maestro.stage import ConductorProcess
from service.support import HANG, BusServer
from service.worker.double import Conductor, await_file
from service.worker.test_with_conductor import Submitter, staged
from service.worker.test_worker import Workers, conducted, script

ROOT = Root()
MIB = 1024 * 1024


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Layer]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    places = {name: tmp_path / f"{name}/gpu0" for name in ("run", "srv")}
    disk = tmp_path / "data/gpu0"
    made = Layer(
        "gpu0", ram=places["run"], base=disk / "base", persist=disk / "persist", merged=places["srv"], size_mb=32
    )
    made.base.mkdir(parents=True)
    try:
        ramlayer.mount(made, ROOT)
    except ramlayer.LayerError as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    yield made
    for mount in reversed(mounts(ROOT)):
        if mount.target.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", mount.target], check=True)


def settings(cache: Layer) -> dict[str, object]:
    return {"WORK_ROOT": cache.merged, "RAM_ROOT": cache.ram.parent, "BASE_ROOT": cache.base.parent.parent}


def emptied(cache: Layer, wait: float = HANG) -> Spilled:
    return spill(cache, ROOT, to_percent=10, pins=(), wait=wait)


def test_the_cache_is_emptied_between_two_jobs(bus: BusServer, workers: Workers, cache: Layer) -> None:
    workers(**settings(cache))

    async def test(conductor: Conductor) -> None:
        fill = (
            "head -c 16777216 /dev/urandom >big; cksum big; echo ready >ready; while [ ! -e go ]; do sleep 0.05; done"
        )
        await conductor.order("first", cmd=script(f"{fill}; cksum big"))
        work = cache.merged / "tasks/first/1/work"
        await asyncio.to_thread(await_file, work / "ready")
        with pytest.raises(ramlayer.LayerError, match="a job is using it"):
            emptied(cache, wait=0)
        emptying = asyncio.create_task(asyncio.to_thread(emptied, cache))
        (work / "go").touch()
        report = await conductor.until(lambda: next(iter(conductor.reports), None))
        assert report.returncode == 0
        first, second = report.stdout.splitlines()
        assert first == second
        spilled = await asyncio.wait_for(emptying, HANG)
        assert spilled.size >= 16 * MIB
        assert (cache.base / "tasks/first/1/work/big").exists()
        again = await conductor.run("second", cmd=script(f"cksum <{work}/big"))
        assert again.stdout.split() == first.split()[:2]
        await conductor.settled()

    conducted(bus, test)


def test_a_full_cache_does_not_fail_the_next_jobs_writes(bus: BusServer, workers: Workers, cache: Layer) -> None:
    workers(**settings(cache))

    async def test(conductor: Conductor) -> None:
        (cache.merged / "model").write_bytes(os.urandom(30 * MIB))
        report = await conductor.run("next", cmd=script("head -c 40000000 /dev/urandom >big && pwd"))
        assert (report.returncode, report.stdout) == (0, f"{cache.base.parent}/jobs/next/1/work\n")
        await conductor.settled()
        assert (await conductor.control(op="logs", task_id="next")).text.endswith("work\n")

    conducted(bus, test)


TOO_MUCH = "head -c 40000000 /dev/zero >big"
"""More than the cache in RAM has, less than the disk."""


@pytest.mark.parametrize("guarded", [5, 0], ids=["ended by the worker", "ended by itself"])
def test_a_job_that_outgrows_the_cache_is_not_to_blame(
    bus: BusServer, workers: Workers, cache: Layer, guarded: int
) -> None:
    workers(**settings(cache), JOB_DISK_FREE_PERCENT=guarded)

    async def test(conductor: Conductor) -> None:
        full = await conductor.run("full", cmd=script(f"{TOO_MUCH} || {{ sleep {2 * guarded}; exit 7; }}"))
        assert (full.error, "; the next attempt works on disk" in full.message) == ("cache_full", True), full.message
        # what it wrote would fill the cache for the next job as well
        assert ramlayer.usage(cache).percent < 10
        again = await conductor.run("full", attempt=2, on_disk=True, cmd=script(f"{TOO_MUCH} && pwd"))
        assert (again.returncode, again.stdout) == (0, f"{cache.base.parent}/jobs/full/2/work\n")
        await conductor.settled()

    conducted(bus, test)


def test_a_job_that_removes_what_did_not_fit_is_taken_at_its_word(
    bus: BusServer, workers: Workers, cache: Layer
) -> None:
    workers(**settings(cache))

    async def test(conductor: Conductor) -> None:
        # the whole of it is refused at once, so that there is nothing to be seen of it
        refused = await conductor.run("at-once", cmd=["fallocate", "-l", "40000000", "big"])
        assert refused.error == "cache_full"
        assert "No space left on device" in refused.stderr
        own_fault = await conductor.run("own-fault", cmd=script("echo bad >&2; exit 3"))
        assert (own_fault.error, own_fault.returncode) == ("exit", 3)
        await conductor.settled()

    conducted(bus, test)


def test_a_job_that_outgrows_the_cache_is_run_again_on_disk_and_pays_no_try(
    bus: BusServer, workers: Workers, cache: Layer, tmp_path: Path
) -> None:
    conductor = ConductorProcess(bus, tmp_path / "maestro").start()
    workers(**settings(cache))

    async def test(alice: Submitter, reader: JetStream) -> None:
        await conductor.leading()
        await alice.submit("large", cmd=script(f"{TOO_MUCH} && pwd"), max_retries=0)
        await alice.submit("hopeless", cmd=script(f"{TOO_MUCH} && exit 4"), max_retries=0)
        large = await alice.result(reader, "large")
        assert (large.state, large.attempts) == ("done", 2)
        assert large.data["stdout"] == f"{cache.base.parent}/jobs/large/2/work\n"
        assert [(step.state, step.err) for step in large.history if step.err] == [("retry", "cache_full")]
        hopeless = await alice.result(reader, "hopeless")
        assert (hopeless.state, hopeless.error, hopeless.attempts) == ("failed", "exit", 2)

    try:
        staged(bus, test)
    finally:
        conductor.stop()
