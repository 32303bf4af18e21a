# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker and its GPU's cache: it is not emptied under a job, and a full one sends the next job to the disk."""

from __future__ import annotations

import asyncio
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest

from organism.bus.messages import JobSpec, RunOrder, TaskRef
from organism.core._ramlayer_spill import lock_files
from organism.worker import cache_full
from organism.worker import store as stores
from organism.worker.cache_full import CacheFull
from organism.worker.cache_use import CacheBusyError, CacheUse
from organism.worker.sandbox import SystemdLimits, properties
from organism.worker.store import Disk, Owner, Taken, TaskStore

from .test_systemd import LAUNCH

GUARD = 30.0


@pytest.fixture
def locks(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / ".lock").mkdir()
    return lock_files(tmp_path, "gpu0")


def free(path: Path) -> bool:
    """Could an emptying take this lock now?"""
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_last_holder_gives_the_cache_back(tmp_path: Path, locks: tuple[Path, Path]) -> None:
    gate, jobs = locks

    async def main() -> None:
        use = CacheUse(tmp_path, "gpu0")
        async with use.hold():
            assert free(gate)
            with use.hold_now():
                assert not free(jobs)
            assert not free(jobs)
        assert free(jobs)

    asyncio.run(main())


def test_an_emptying_is_waited_for_and_told_to_who_cannot_wait(tmp_path: Path, locks: tuple[Path, Path]) -> None:
    gate, _jobs = locks

    async def main() -> None:
        use = CacheUse(tmp_path, "gpu0")
        entered = asyncio.Event()

        async def job() -> None:
            async with use.hold():
                entered.set()

        with gate.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            waiting = asyncio.create_task(job())
            await asyncio.sleep(0)
            with pytest.raises(CacheBusyError), use.hold_now():
                raise AssertionError("held")
            assert not entered.is_set()
        await asyncio.wait_for(waiting, GUARD)
        assert entered.is_set()

    asyncio.run(main())


def test_a_running_job_does_not_meet_the_gate_again(tmp_path: Path, locks: tuple[Path, Path]) -> None:
    gate, _jobs = locks

    async def main() -> None:
        use = CacheUse(tmp_path, "gpu0")
        async with use.hold():
            with gate.open("a") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                with use.hold_now():
                    pass

    asyncio.run(main())


def test_without_caches_nothing_is_locked(tmp_path: Path) -> None:
    async def main() -> None:
        async with CacheUse(tmp_path / "absent", "gpu0").hold(), CacheUse(None, "gpu0").hold():
            assert not (tmp_path / "absent").exists()

    asyncio.run(main())


@pytest.fixture
def store(tmp_path: Path) -> TaskStore:
    return TaskStore(tmp_path / "cache", disk=Disk(tmp_path / "data/gpu0/jobs", 85))


def fill(monkeypatch: pytest.MonkeyPatch, percent: float) -> None:
    monkeypatch.setattr(stores, "_fill_percent", lambda _cache: percent)


def begun(store: TaskStore, task: str) -> stores.Attempt:
    made = store.place(TaskRef(task, 1))
    order = RunOrder(
        ts="t", task_id=task, attempt=1, gpu="gpu0", incarnation="i", user="u", timeout=1, spec=JobSpec(), enq_seq=1
    )
    made.create(Taken(order=order, incarnation="i", started="s"), Owner())
    return made


def test_a_nearly_full_cache_sends_new_jobs_to_the_disk(
    store: TaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/gpu0").mkdir(parents=True)
    fill(monkeypatch, 84.9)
    inside = begun(store, "a")
    fill(monkeypatch, 85)
    outside = begun(store, "b")
    assert inside.path.is_relative_to(tmp_path / "cache/tasks")
    assert outside.path == tmp_path / "data/gpu0/jobs/b/1"
    fill(monkeypatch, 0)
    # found again wherever it is
    assert store.attempt(outside.ref).path == outside.path
    latest = store.latest("b")
    assert latest is not None and latest.path == outside.path
    assert {attempt.ref.task_id for attempt in store.attempts()} == {"a", "b"}
    assert [attempt.ref.task_id for attempt in store.leftovers()[1]] == ["a", "b"]
    for attempt in (inside, outside):
        attempt.abandon("over")
    assert store.clean(now=0, keep=0, keep_seconds=0) == 2
    assert not outside.path.exists() and not inside.path.exists()


def test_an_attempt_has_one_directory(store: TaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(monkeypatch, 0)
    first = begun(store, "a")
    fill(monkeypatch, 99)
    second = begun(store, "a")
    assert not first.path.exists()
    assert store.attempt(first.ref).path == second.path


def room(monkeypatch: pytest.MonkeyPatch, store: TaskStore, *, cache: tuple[int, int], disk: int) -> None:
    """``cache``: free blocks and inodes of 1,000 each; ``disk``: its free blocks."""
    assert store.disk is not None
    told = {store.top.parent: (1000, *cache), store.disk.top.parent: (100_000, disk, 1000)}

    def statvfs(path: Path) -> os.statvfs_result:
        blocks, free, inodes = told[path]
        return os.statvfs_result((4096, 4096, blocks, free, free, 1000, inodes, inodes, 0, 255))

    monkeypatch.setattr(cache_full.os, "statvfs", statvfs)
    monkeypatch.setattr(Path, "is_mount", lambda _path: True)


@pytest.mark.parametrize(
    ("cache", "disk", "error", "said", "blamed"),
    [
        ((9, 900), 50_000, "exit", "", True),
        ((900, 9), 50_000, "signal", "", True),  # inodes are space too
        ((900, 900), 50_000, "exit", "cp: write error: No space left on device", True),
        ((900, 900), 50_000, "exit", "Error: (os error 28)", True),
        ((900, 900), 50_000, "exit", "bad", False),
        ((9, 900), 999, "exit", "", False),  # the disk would not help
        ((9, 900), 50_000, None, "", False),
        ((9, 900), 50_000, "timeout", "No space left on device", False),
        ((9, 900), 50_000, "disk", "", False),  # its own limit
    ],
)
def test_whose_fault_a_failure_in_the_cache_is(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, cache: tuple[int, int], disk: int, error: str | None, said: str,
    blamed: bool,
) -> None:  # fmt: skip
    room(monkeypatch, store, cache=cache, disk=disk)
    inside = CacheFull(store, stores.Attempt(store.top, TaskRef("a", 1)))
    assert bool(inside.blames(error, ("", said))) is blamed
    assert store.disk is not None
    outside = CacheFull(store, stores.Attempt(store.disk.top, TaskRef("a", 1)))
    assert outside.blames(error, ("", said)) == ""


def test_a_cache_that_was_full_for_a_moment_is_remembered(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, store, cache=(0, 900), disk=50_000)
    running = CacheFull(store, stores.Attempt(store.top, TaskRef("a", 1)))
    running.look()
    room(monkeypatch, store, cache=(900, 900), disk=50_000)
    assert running.blames("exit", ()).endswith("the next attempt works on disk")


def test_an_attempt_goes_to_the_disk_when_it_is_told_to(
    store: TaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, 0)
    ref = TaskRef("a", 2)
    assert store.place(ref, on_disk=True).path == tmp_path / "data/gpu0/jobs/a/2"
    # a worker without a disk below its cache has one place only
    assert TaskStore(tmp_path / "cache").place(ref, on_disk=True).path == tmp_path / "cache/tasks/a/2"


def test_a_directory_that_is_no_mount_is_never_full(tmp_path: Path) -> None:
    assert stores._fill_percent(tmp_path) == 0


def test_a_job_does_not_see_the_others_on_disk() -> None:
    launch = replace(LAUNCH, hidden=(LAUNCH.cache / "tasks", Path("/data/gpucache/gpu0/jobs")))
    found = properties(
        launch, SystemdLimits(), user=None, groups=[], bind_to="", status=Path("/run/organism-worker/x/status")
    )
    assert found.count(f"TemporaryFileSystem={LAUNCH.cache}/tasks:ro") == 1
    hidden = found.index("TemporaryFileSystem=/data/gpucache/gpu0/jobs:ro")
    assert hidden < found.index(f"BindPaths={LAUNCH.work}")
