# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs that wait for the end of others. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from organism.bus.messages import After
from organism.maestro.ledger import Job

Ended = tuple[str, str]
"""(final state, user) of a finished job."""
Visible = Callable[[str, str], bool]
"""Whether the first user may know of the second one's jobs."""

SHOWN = 3
"""Ids that a sentence names."""


def sort_out(
    job: Job, unfinished: Mapping[str, Job], ended: Mapping[str, Ended], may_see: Visible
) -> tuple[list[After], str]:
    """(what the job still waits for, why it can never run); the second is empty when it can.

    ``ended`` tells of those in ``job.after`` that are no longer unfinished. A job that its submitter may not see is to
    him none at all.
    """
    waiting = []
    for need in job.after:
        other = unfinished.get(need.task_id)
        if other is not None and may_see(job.user, other.user):
            waiting.append(need)
            continue
        state, user = ended.get(need.task_id, ("", ""))
        if not state or not may_see(job.user, user):
            return [], f"it was to run after {need.task_id}, and there is no such job"
        if not need.met(state):
            return [], unmet(need, state)
    return waiting, ""


def unmet(need: After, state: str) -> str:
    wanted = "its success" if need.on == "ok" else "its failure"
    return f"it was to run after {need.task_id}, on {wanted}, and that one is {state}"


class Dependencies:
    """Who waits for whom."""

    def __init__(self) -> None:
        self._needs: dict[int, dict[str, After]] = {}
        self._jobs: dict[int, Job] = {}
        self._waiting_for: dict[str, set[int]] = {}

    def __contains__(self, job: Job) -> bool:
        return job.seq in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def hold(self, job: Job, needs: list[After]) -> None:
        """The job waits for these, all unfinished."""
        self._jobs[job.seq] = job
        self._needs[job.seq] = {need.task_id: need for need in needs}
        for need in needs:
            self._waiting_for.setdefault(need.task_id, set()).add(job.seq)

    def release(self, job: Job) -> None:
        """The job waits for nothing any more: it has ended."""
        self._jobs.pop(job.seq, None)
        for task_id in self._needs.pop(job.seq, {}):
            waiting = self._waiting_for[task_id]
            waiting.discard(job.seq)
            if not waiting:
                del self._waiting_for[task_id]

    def ended(self, task_id: str, state: str) -> tuple[list[Job], list[tuple[Job, str]]]:
        """A job has ended: (jobs that may go now, jobs that can never go and why), in order of arrival."""
        ready: list[Job] = []
        never: list[tuple[Job, str]] = []
        for seq in sorted(self._waiting_for.get(task_id, ())):
            job, needs = self._jobs[seq], self._needs[seq]
            need = needs[task_id]
            if not need.met(state):
                never.append((job, unmet(need, state)))
                self.release(job)
                continue
            del needs[task_id]
            if not needs:
                ready.append(job)
                del self._jobs[seq], self._needs[seq]
        self._waiting_for.pop(task_id, None)
        return ready, never

    def needs(self, job: Job) -> list[str]:
        """Ids of the jobs that a held job still waits for."""
        return list(self._needs.get(job.seq, ()))

    def why(self, job: Job) -> str:
        """What a held job waits for, in one sentence; empty when it is not held."""
        needs = self._needs.get(job.seq)
        if not needs:
            return ""
        named = ", ".join(list(needs)[:SHOWN])
        more = len(needs) - SHOWN
        return f"waits for the end of {named}{f' and {more} more' if more > 0 else ''}"
