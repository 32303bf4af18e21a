# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the end of an attempt means for its job: final, or another try, and when. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from organism.bus.messages import Report
from organism.maestro.ledger import Job

FinalState = Literal["done", "failed", "cancelled", "dead"]


@dataclass(frozen=True)
class Rules:
    """``backoff`` and ``max_backoff`` in seconds (RETRY_BACKOFF_SEC, RETRY_BACKOFF_MAX_SEC), ``max_lost`` attempts."""

    backoff: float = 1.0
    max_backoff: float = 300.0
    max_lost: int = 5


@dataclass(frozen=True)
class Final:
    """The job is over."""

    state: FinalState
    error: str | None
    reason: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Again:
    """Another attempt, not before ``wait`` seconds from now. ``lost``: it costs a loss and no try."""

    err: str
    wait: float
    lost: bool = False


def backoff(tries: int, rules: Rules) -> float:
    """Seconds to wait after the ``tries``-th failure: doubled each time, up to a limit."""
    doublings = min(max(tries, 1) - 1, 30)
    return min(rules.backoff * 2.0**doublings, max(rules.max_backoff, rules.backoff))


def of_report(job: Job, report: Report, rules: Rules) -> Final | Again:
    """What a worker's report of the present attempt leads to."""
    data = report_data(report)
    if job.also:
        data["gpu_ids"] = [report.gpu_id, *job.also]
    if report.error is None and report.returncode in (0, None):
        return Final("done", None, f"done on {report.gpu_id}", data)
    if report.error == "shutdown":
        return Again("shutdown", 0.0)
    if report.error == "cache_full" and not job.on_disk:
        return Again("cache_full", 0.0)
    if report.error == "cancelled":
        # nobody cancelled it here: the worker stopped it for a reason of its own, such as an expired lease
        return of_loss(job, "the worker stopped it", rules)
    if report.error == "refused":
        why = report.message or "refused by the worker"
        return Final("dead", "refused", f"refused by the worker of {report.gpu_id}: {why}", data)
    return of_failure(job, report.error or "exit", _described(report), data, rules)


def of_failure(job: Job, error: str, described: str, data: dict[str, Any], rules: Rules) -> Final | Again:
    """An attempt that ended by the job's own fault."""
    tries = job.tries + 1
    if tries <= job.max_retries:
        return Again(error, backoff(tries, rules))
    attempts = "1 try" if tries == 1 else f"{tries} tries"
    return Final("failed", error, f"{described} on {job.gpu}, after {attempts}", data)


def of_loss(job: Job, why: str, rules: Rules) -> Final | Again:
    """An attempt that ended with its worker."""
    if job.lost + 1 > rules.max_lost:
        return Final(
            "dead", "lost", f"lost with its worker {job.lost + 1} times (MAX_LOST is {rules.max_lost}), last: {why}", {}
        )
    return Again("lost", 0.0, lost=True)


def report_data(report: Report) -> dict[str, Any]:
    """The ``data`` of a result (S1j-027)."""
    data: dict[str, Any] = {
        "task_id": report.task_id,
        "gpu_id": report.gpu_id,
        "type": report.type,
        "returncode": report.returncode,
        "stdout": report.stdout,
        "stderr": report.stderr,
        "stdout_bytes": report.stdout_bytes,
        "stderr_bytes": report.stderr_bytes,
        "cwd": report.cwd,
        "started": report.started,
        "finished": report.finished,
    }
    if report.value is not None:
        data["value"] = report.value
    if report.message:
        data["message"] = report.message
    return data


def _described(report: Report) -> str:
    if report.error == "timeout":
        return "stopped at its time limit"
    if report.error == "signal":
        return f"ended by a signal ({report.message or report.returncode})"
    if report.error == "start":
        return f"could not be started ({report.message or 'no reason given'})"
    if report.error in (None, "exit"):
        return f"ended with return code {report.returncode}"
    return f"ended with {report.error}{': ' + report.message if report.message else ''}"
