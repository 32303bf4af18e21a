# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long work in short slices, and no long pauses of the garbage collector: heartbeats and the lease do not wait.

A conductor has one thread. Whatever it does about each of a hundred thousand jobs at once would keep everything else
waiting: on a machine that gives it a tenth of a processor, ten times as long as the work takes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from organism.maestro.ledger import Job, Ledger

T = TypeVar("T")

SLICE = 0.005
"""Seconds of work after which the event loop turns once."""
FEW = 2_000
"""Jobs; a collection of all there is takes a few milliseconds when there are no more."""


async def still(jobs: Ledger, *, newest_first: bool = False) -> AsyncIterator[Job]:
    """The unfinished jobs of a moment, in slices; without those that end meanwhile."""
    snapshot = list(reversed(jobs.jobs.values()) if newest_first else jobs.jobs.values())
    async for job in sliced(snapshot):
        if job.seq in jobs.jobs:
            yield job


async def sliced(items: Iterable[T]) -> AsyncIterator[T]:
    """``items``, letting the event loop turn every few milliseconds. They must bear being changed meanwhile."""
    began = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - began >= SLICE:
            await asyncio.sleep(0)
            began = time.monotonic()


_counts: list[Callable[[], int]] = []
"""Of each term of this process (of one shard each): how many jobs it knows."""


def _watch(phase: str, info: dict[str, Any]) -> None:
    if info["generation"] != 2:
        return
    if phase == "stop":
        gc.freeze()
    elif sum(count() for count in _counts) <= FEW:
        gc.unfreeze()


@contextmanager
def short_collections(jobs: Callable[[], int]) -> Iterator[None]:
    """What a full collection has looked at is not looked at again while many jobs are known (``gc.freeze``).

    Jobs are no cycles: they go when nobody needs them, frozen or not. What else is frozen with them and becomes a cycle
    later is found when few jobs are left, or a term ends.
    """
    if not _counts:
        gc.callbacks.append(_watch)
    _counts.append(jobs)
    try:
        yield
    finally:
        _counts.remove(jobs)
        if not _counts:
            gc.callbacks.remove(_watch)
        gc.unfreeze()
