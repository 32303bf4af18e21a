# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The most recently finished jobs, for quick answers; ORG_RESULTS has them all."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from organism.bus.messages import Result
from organism.bus.rpc_types import JobInfo

REMEMBERED = 5_000
"""Finished jobs whose outline is kept."""
CACHED_BYTES = 16 * 1024 * 1024
"""Of whole results."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The outline of a result. ``attempts`` tells a repeated report from a stale one."""

    info: JobInfo
    digest: str
    enq_seq: int


def outline(result: Result) -> Finished:
    """What is worth remembering of a result."""
    gpu = result.data.get("gpu_id")
    info = JobInfo(
        task_id=result.task_id,
        state=result.state,
        user=result.user,
        type=str(result.data.get("type") or ""),
        gpu=gpu if isinstance(gpu, str) else None,
        attempt=result.attempts,
        tries=result.history[-1].tries if result.history else 0,
        submitted=result.submitted,
        since=result.ts,
        reason=result.reason,
        err=result.error or "",
        labels=result.labels,
    )
    return Finished(info, result.digest, result.enq_seq)


class Archive:
    """Outlines by id, oldest first, the newest whole results, and how many of each final state there were."""

    def __init__(self) -> None:
        self.recent: OrderedDict[str, Finished] = OrderedDict()
        self.counts: Counter[str] = Counter()
        self._whole: OrderedDict[str, tuple[Result, int]] = OrderedDict()
        self._bytes = 0

    def add(self, result: Result, size: int, *, counted: bool = True) -> Finished:
        """Remember a result; ``size`` is that of its message."""
        finished = outline(result)
        self.recent[result.task_id] = finished
        self.recent.move_to_end(result.task_id)
        if len(self.recent) > REMEMBERED:
            self.recent.popitem(last=False)
        if counted:
            self.counts[result.state] += 1
        previous = self._whole.pop(result.task_id, None)
        if previous is not None:
            self._bytes -= previous[1]
        self._whole[result.task_id] = (result, size)
        self._bytes += size
        while self._bytes > CACHED_BYTES:
            _, (_, old) = self._whole.popitem(last=False)
            self._bytes -= old
        return finished

    def add_older(self, result: Result) -> None:
        """Remember the outline of a result from before this conductor took over."""
        if result.task_id not in self.recent and len(self.recent) < REMEMBERED:
            self.recent[result.task_id] = outline(result)
            self.recent.move_to_end(result.task_id, last=False)

    def whole(self, task_id: str) -> Result | None:
        entry = self._whole.get(task_id)
        return entry[0] if entry else None
