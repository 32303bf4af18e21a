# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long work lets others run, and what a collection has looked at is left alone while many jobs are known."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from organism.bus.messages import JobSpec
from organism.maestro import slices
from organism.maestro.ledger import Ledger
from organism.maestro.slices import FEW, SLICE, short_collections, sliced, still


def test_others_run_between_two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=lambda: now))

    async def main() -> tuple[list[int], list[int]]:
        nonlocal now
        done: list[int] = []
        seen: list[int] = []

        async def other() -> None:
            while True:
                seen.append(len(done))
                await asyncio.sleep(0)

        running = asyncio.create_task(other())
        async for number in sliced(range(40)):
            done.append(number)
            now += SLICE / 10
        running.cancel()
        return done, seen

    done, seen = asyncio.run(main())
    assert done == list(range(40))
    assert len(seen) >= 3, "it ran after each slice"
    assert max(later - earlier for earlier, later in itertools.pairwise(seen)) <= 11


@pytest.mark.parametrize("newest_first", [False, True])
def test_jobs_that_end_and_come_between_two_slices_are_left_out(
    monkeypatch: pytest.MonkeyPatch, newest_first: bool
) -> None:
    monkeypatch.setattr(slices, "SLICE", 0.0)
    ledger = Ledger()

    def submit(seq: int) -> None:
        ledger.submitted(seq, "alice", JobSpec(cmd=["true"]), b"{}", 900.0)

    async def main() -> list[int]:
        seen: list[int] = []

        def meanwhile() -> None:
            assert len(seen) == 1, "others run after each job"
            del ledger.jobs[3]
            submit(6)

        asyncio.get_running_loop().call_soon(meanwhile)
        async for job in still(ledger, newest_first=newest_first):
            seen.append(job.seq)  # noqa: PERF401 - the other looks at it meanwhile
        return seen

    for seq in range(1, 6):
        submit(seq)
    assert asyncio.run(main()) == ([5, 4, 2, 1] if newest_first else [1, 2, 4, 5])


def test_short_work_is_not_cut() -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        asyncio.get_running_loop().call_soon(seen.append, "other")
        async for _ in sliced(()):
            raise AssertionError("there is nothing")
        return list(seen)

    assert asyncio.run(main()) == []


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_a_full_collection_freezes_what_it_has_looked_at_until_few_jobs_are_left() -> None:
    jobs = FEW + 1
    gc.unfreeze()
    with short_collections(lambda: jobs):
        gc.collect(1)
        assert gc.get_freeze_count() == 0, "young objects come and go"
        gc.collect()
        frozen = gc.get_freeze_count()
        assert frozen > 1000
        looked_at: list[int] = []

        def count(phase: str, _info: dict[str, int]) -> None:
            if phase == "start":
                looked_at.append(gc.get_freeze_count())

        gc.callbacks.append(count)
        try:
            gc.collect()
            jobs = FEW
            gc.collect()
        finally:
            gc.callbacks.remove(count)
        assert looked_at[0] >= frozen - 100, "many jobs: what is frozen stays so"
        assert looked_at[1] == 0, "few jobs: all of it is looked at"
    assert gc.get_freeze_count() == 0
    assert slices._watch not in gc.callbacks


@pytest.mark.usefixtures("thawed")
def test_the_jobs_of_all_terms_of_a_process_count() -> None:
    with short_collections(lambda: FEW), short_collections(lambda: 1):
        assert gc.callbacks.count(slices._watch) == 1
        gc.collect()
        frozen = gc.get_freeze_count()
        with short_collections(lambda: 0):
            pass
        assert gc.get_freeze_count() == 0, "what an ended term left is looked at"
        gc.collect()
        slices._watch("start", {"generation": 2})
        assert gc.get_freeze_count() >= frozen - 100
        assert slices._watch in gc.callbacks
    assert slices._watch not in gc.callbacks
