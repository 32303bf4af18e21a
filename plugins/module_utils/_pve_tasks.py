# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tasks of Proxmox VE: what a UPID says, and waiting for one by a deadline.

A task has succeeded with exit status ``OK`` or ``WARNINGS: n`` (PVE::Tools, upid_status_is_error). Start and stop of a
VM under HA answer with a task ``hastart``/``hastop`` that ends when the request is queued: the caller then has to look
at the VM itself.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._pve_errors import PveError, PveTaskFailed, PveTimeout, PveUnreachable

LAST_LINES = 12
HA_REQUESTS = frozenset({"hastart", "hastop", "hashutdown", "hamigrate", "harelocate"})

_UPID = re.compile(
    r"UPID:(?P<node>[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?):(?P<pid>[0-9A-Fa-f]{8}):(?P<pstart>[0-9A-Fa-f]{8,9})"
    r":(?P<started>[0-9A-Fa-f]{8}):(?P<type>[^:\s]+):(?P<id>[^:\s]*):(?P<user>[^:\s]+):"
)


@dataclass(frozen=True)
class Upid:
    """The parts of ``UPID:node:pid:pstart:starttime:type:id:user:`` that callers use. ``started``: Unix time."""

    text: str
    node: str
    type: str
    id: str
    user: str
    started: int

    @property
    def path(self) -> str:
        return f"/nodes/{self.node}/tasks/{self.text}"

    @property
    def only_a_request(self) -> bool:
        """Ends before the VM has changed its state: HA does the work afterwards."""
        return self.type in HA_REQUESTS

    def __str__(self) -> str:
        return f"task {self.type} {self.id}".strip() + f" on {self.node}"


def parse_upid(text: str) -> Upid:
    """Raises PveError for what is no UPID."""
    found = _UPID.fullmatch(text)
    if not found:
        raise PveError(f"{text!r} is no task id (UPID); this is a bug of the caller")
    return Upid(text, found["node"], found["type"], found["id"], found["user"], int(found["started"], 16))


def is_upid(answer: Any) -> bool:
    return isinstance(answer, str) and _UPID.fullmatch(answer) is not None


@dataclass(frozen=True)
class TaskResult:
    """A task that has succeeded. ``warnings``: how many it had; ``log``: its last lines where there were warnings."""

    upid: Upid
    exitstatus: str
    warnings: int = 0
    log: tuple[str, ...] = ()


def wait(
    get: Callable[..., Any],
    upid: str,
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> TaskResult:
    """Ask for a task's status until it has stopped. ``timeout``: seconds.

    An API that goes away in the middle (a restart of pveproxy) is asked again until the deadline.
    Raises PveTaskFailed, PveTimeout, PveError.
    """
    task = parse_upid(upid)
    deadline = clock() + timeout
    pause = 0.1
    trouble: PveError | None = None
    while True:
        try:
            status = get(f"{task.path}/status")
            trouble = None
        except PveUnreachable as error:  # the only kind that can pass by itself
            trouble, status = error, {}
        if status.get("status") == "stopped":
            return _ended(get, task, str(status.get("exitstatus", "")))
        left = deadline - clock()
        if left <= 0:
            raise _late(get, task, timeout, trouble)
        sleep(min(pause, left))
        pause = min(pause * 1.5, 2.0)


def _ended(get: Callable[..., Any], task: Upid, exitstatus: str) -> TaskResult:
    if exitstatus == "OK":
        return TaskResult(task, exitstatus)
    log = last_lines(get, task)
    warned = re.fullmatch(r"WARNINGS: (\d+)", exitstatus)
    if warned:
        return TaskResult(task, exitstatus, int(warned[1]), log)
    raise PveTaskFailed(
        f"{task} failed: {exitstatus or 'no exit status'}{_told(log)}", path=task.path, exitstatus=exitstatus, log=log
    )


def _late(get: Callable[..., Any], task: Upid, timeout: float, trouble: PveError | None) -> PveTimeout:
    if trouble is not None:
        return PveTimeout(
            f"{task}: whether it ended within {timeout:g} s is unknown, for {trouble}. When the API is back: "
            f"pvenode task status {task.text}",
            path=task.path,
        )
    log = last_lines(get, task)
    return PveTimeout(
        f"{task} did not end within {timeout:g} s and still runs; stop it with 'pvesh delete {task.path}' or wait "
        f"longer{_told(log)}",
        path=task.path,
        log=log,
    )


def last_lines(get: Callable[..., Any], task: Upid, count: int = LAST_LINES) -> tuple[str, ...]:
    """The end of a task's log; empty when it cannot be read, for the failure it explains is told anyway."""
    try:
        lines = get(f"{task.path}/log", start=0, limit=5000)
    except PveError:
        return ()
    return tuple(str(line.get("t", "")) for line in lines or [])[-count:]


def _told(log: tuple[str, ...]) -> str:
    return "".join(f"\n  | {line}" for line in log) if log else ""
