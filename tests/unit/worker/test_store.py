# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The jobs' directories: what is in them after every kind of end, and that nothing leads out of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from organism.bus.messages import JobSpec, Report, RunOrder, TaskRef
from organism.worker.store import Attempt, OutsideError, Owner, Taken, TaskStore, remove_tree


def order(task: str = "job", attempt: int = 1) -> RunOrder:
    return RunOrder(
        ts="t",
        task_id=task,
        attempt=attempt,
        gpu="gpu0",
        incarnation="i",
        user="u",
        timeout=1,
        spec=JobSpec(),
        enq_seq=1,
    )


def begun(store: TaskStore, task: str = "job", attempt: int = 1) -> Attempt:
    made = store.attempt(TaskRef(task, attempt))
    made.create(Taken(order=order(task, attempt), incarnation="i", started="s"), Owner())
    return made


def report(task: str = "job", attempt: int = 1) -> Report:
    return Report(ts="t", task_id=task, attempt=attempt, gpu_id="gpu0", incarnation="i", type="cmd", returncode=0)


def test_after_a_death_outcomes_are_told_from_attempts_that_died(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    begun(store, "finished").finish(report("finished"))
    begun(store, "died")
    done = begun(store, "done")
    done.finish(report("done"))
    done.acknowledge()
    begun(store, "revoked").abandon("revoked")
    damaged = begun(store, "damaged")
    (damaged.path / "outcome.json").write_text('{"task_id": ')
    unreported, died = store.leftovers()
    assert [(attempt.ref.task_id, told.returncode) for attempt, told in unreported] == [("finished", 0)]
    assert sorted(attempt.ref.task_id for attempt in died) == ["damaged", "died"]


def test_an_id_that_comes_again_finds_nothing_of_the_job_before(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    first = begun(store)
    (first.work / "result.txt").write_text("old")
    first.finish(report())
    first.acknowledge()
    again = begun(store)
    assert list(again.work.iterdir()) == []
    assert again.outcome() is None
    assert not again.closed


@pytest.mark.parametrize("task", ["../x", "a/b", "", ".", "a.b", "x" * 65])
def test_only_identifiers_name_directories(tmp_path: Path, task: str) -> None:
    with pytest.raises(OutsideError):
        TaskStore(tmp_path).attempt(TaskRef(task, 1))
    assert TaskStore(tmp_path).latest(task) is None


@pytest.mark.parametrize("cwd", ["..", "a/../..", "/etc", "link", "link/deeper"])
def test_a_job_starts_inside_its_directory_or_not_at_all(tmp_path: Path, cwd: str) -> None:
    made = begun(TaskStore(tmp_path / "cache"))
    (made.work / "link").symlink_to("/tmp")
    with pytest.raises(OutsideError, match="leads out of the job's directory"):
        made.inside(cwd)


def test_a_directory_that_a_job_asks_for_is_made(tmp_path: Path) -> None:
    made = begun(TaskStore(tmp_path))
    assert made.inside("a/b/../c") == (made.work / "a/c").resolve()
    assert (made.work / "a/c").is_dir()
    assert made.inside(None) == made.work


def test_the_latest_attempt_is_the_highest_number(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    for number in (2, 10, 9):
        begun(store, "job", number)
    latest = store.latest("job")
    assert latest is not None
    assert latest.ref == TaskRef("job", 10)
    assert store.latest("other") is None


def test_cleaning_takes_the_old_and_the_many_but_never_the_open(tmp_path: Path) -> None:
    store = TaskStore(tmp_path)
    begun(store, "running")
    for age, task in enumerate(["new", "middle", "old"]):
        made = begun(store, task)
        made.acknowledge()
        os.utime(made.path, (1000 - age * 100, 1000 - age * 100))
    assert store.clean(now=1000, keep=2, keep_seconds=1000) == 1
    assert store.clean(now=1000, keep=2, keep_seconds=50) == 1
    assert sorted(path.name for path in store.top.iterdir()) == ["new", "running"]


def test_whatever_modes_a_job_leaves_its_tree_goes_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    tree = tmp_path / "tree"
    (tree / "locked/deep").mkdir(parents=True)
    (tree / "locked/deep/file").touch()
    (tree / "link").symlink_to(kept)
    (tree / "locked/deep").chmod(0)
    (tree / "locked").chmod(0)
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "file").read_text() == "mine"
