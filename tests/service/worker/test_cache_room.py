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

from organism.core import _ramlayer as ramlayer
from organism.core._overlay import mounts
from organism.core._ramlayer import Layer
from organism.core._ramlayer_spill import Spilled, spill
from organism.core._root import Root
from service.support import HANG, BusServer
from service.worker.double import Conductor, await_file
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
        full = await conductor.run("full", cmd=script("head -c 40000000 /dev/zero >big"))
        assert full.returncode != 0  # its own directory was in RAM
        assert ramlayer.usage(cache).percent > 95
        report = await conductor.run("next", cmd=script("head -c 40000000 /dev/urandom >big && pwd"))
        assert (report.returncode, report.stdout) == (0, f"{cache.base.parent}/jobs/next/1/work\n")
        await conductor.settled()
        assert (await conductor.control(op="logs", task_id="next")).text.endswith("work\n")

    conducted(bus, test)
