# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo's jobs and their accounts: what is submitted, what must come of each, and the comparison (no I/O here)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FINAL = frozenset({"done", "failed", "cancelled", "dead"})
STATES = ("enqueued", "waiting_gpu", "scheduled", "running", "retry", "done", "failed", "cancelled", "dead")


@dataclass(frozen=True)
class Job:
    """One job of the batch and the only end that is right for it.

    ``want`` is the final state, ``error`` a word its error must hold, ``returncode`` the exit code of its program,
    ``output`` a word its standard output must hold. Empty or None: not looked at.
    """

    title: str
    argv: tuple[str, ...]
    want: str = "done"
    error: str = ""
    returncode: int | None = None
    output: str = ""
    retries: int = 0
    timeout: float | None = None
    cancel: bool = False
    victim: bool = False  # its worker is killed under it, so it has to run a second time

    def order(self) -> dict[str, object]:
        """The job as ``maestroctl submit --jsonl`` takes it."""
        order: dict[str, object] = {"cmd": list(self.argv), "max_retries": self.retries, "labels": {"demo": self.label}}
        return order if self.timeout is None else {**order, "timeout": self.timeout}

    @property
    def label(self) -> str:
        return self.title.replace(" ", "-")


def _compute(number: int) -> Job:
    # Some real work (hash 24 MB), a file in the job's own directory in the GPU's cache, and a second of waiting.
    script = (
        f"head -c 24000000 /dev/zero | sha256sum > sum-{number}.txt; sleep 1; cat sum-{number}.txt; echo part-{number}"
    )
    return Job(f"hash block {number}", ("sh", "-c", script), returncode=0, output=f"part-{number}", retries=3)


# Its first attempt lasts until its worker is killed under it, on a slow machine as well; the second ends at once.
_SLOW_SCRIPT = '[ "$ORGANISM_ATTEMPT" -gt 1 ] || sleep 90; echo survived'
_SLOW = Job("loses its worker", ("sh", "-c", _SLOW_SCRIPT), output="survived", retries=3, victim=True)


def batch() -> list[Job]:
    """Twenty-four jobs: eighteen succeed, four fail, one overruns, one is cancelled while it runs."""
    failing = ("sh", "-c", "echo cannot open the model >&2; exit 3")
    jobs = [
        Job("to be cancelled", ("sleep", "75"), "cancelled", cancel=True),
        Job("overruns 2 s", ("sleep", "70"), "failed", error="timeout", timeout=2),
    ]
    for number in range(1, 19):
        jobs.append(_SLOW if number == 9 else _compute(number))
        if number in (3, 7, 11, 15):
            jobs.append(Job("exits with 3", failing, "failed", returncode=3))
    return jobs


@dataclass(frozen=True)
class Account:
    """What became of one submitted job. ``problems`` is empty when it is exactly what was wanted."""

    task_id: str
    title: str
    want: str
    got: str
    gpu: str
    attempt: int
    problems: tuple[str, ...]


def _judge(job: Job, listed: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> list[str]:
    problems = []
    if job.victim and listed and int(listed[-1].get("attempt") or 0) < 2:
        problems.append("it ran once only, although its worker was killed")
    if len(listed) != 1:
        problems.append(f"listed {len(listed)} times")
    if len(results) != 1:
        problems.append(f"{len(results)} results")
    states = {str(record.get("state", "none")) for record in (*listed, *results)}
    if states != {job.want}:
        problems.append(f"state {' and '.join(sorted(states)) or 'unknown'}, not {job.want}")
    if not states <= FINAL:
        problems.append("not in a final state")
    for result in results:
        data = result.get("data") or {}
        ends = [event for event in result.get("history") or [] if event.get("state") in FINAL]
        if len(ends) != 1:
            problems.append(f"{len(ends)} final states in its history")
        if bool(result.get("ok")) != (job.want == "done"):
            problems.append(f"its result says ok={result.get('ok')}")
        if job.error and job.error not in str(result.get("error") or ""):
            problems.append(f"error {result.get('error')!r}, not {job.error!r}")
        if job.returncode is not None and data.get("returncode") != job.returncode:
            problems.append(f"exit code {data.get('returncode')}, not {job.returncode}")
        if job.output and job.output not in str(data.get("stdout", "")):
            problems.append(f"its output lacks {job.output!r}")
    return problems


def audit(
    jobs: Mapping[str, Job], listed: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> list[Account]:
    """Compare what was submitted (task id -> job) with what Maestro lists and with the results it gave."""
    accounts = []
    for task_id, job in jobs.items():
        mine = [record for record in listed if record.get("task_id") == task_id]
        ends = [record for record in results if record.get("task_id") == task_id]
        last = mine[-1] if mine else {}
        got = str((ends[-1] if ends else last).get("state", "lost"))
        accounts.append(
            Account(
                task_id, job.title, job.want, got, str(last.get("gpu") or "-"), int(last.get("attempt") or 0),
                tuple(_judge(job, mine, ends)),
            )
        )  # fmt: skip
    return accounts


def counts(jobs: Mapping[str, Job], listed: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many of the submitted jobs are in which state; ``unseen`` for those not listed yet."""
    states = {str(record.get("task_id")): str(record.get("state")) for record in listed}
    return Counter(states.get(task_id, "unseen") for task_id in jobs)


def victim(jobs: Mapping[str, Job], listed: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The (GPU, task id) whose worker may be killed now: it runs the job that is meant to lose its worker."""
    for record in listed:
        job = jobs.get(str(record.get("task_id")))
        if job is not None and job.victim and record.get("state") == "running" and record.get("gpu"):
            return str(record["gpu"]), str(record["task_id"])
    return None
