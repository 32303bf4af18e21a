# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tasks: a thread for each, its log, and how it ended (PVE::RESTEnvironment, fork_worker)."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import warm
from .access import Caller
from .errors import ApiError, Died

MAX_ENDED = 1000


@dataclass
class Task:
    """A task's record. ``warnings`` counts what ``log_warn`` said; a plain ``warn`` does not count."""

    upid: str
    type: str
    id: str
    user: str
    node: str
    pid: int
    started: float
    lines: list[str] = field(default_factory=list)
    warnings: int = 0
    exitstatus: str | None = None
    ended: float | None = None
    stop: bool = False
    child: subprocess.Popen[bytes] | warm.Child | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def log(self, text: str) -> None:
        with self.changed:
            self.lines += text.rstrip("\n").split("\n")
            self.changed.notify_all()

    def end(self, status: str) -> None:
        with self.changed:
            self.lines.append(
                f"TASK {status}" if status in ("OK",) or status.startswith("WARNINGS") else f"TASK ERROR: {status}"
            )
            self.exitstatus = status
            self.ended = time.time()
            self.changed.notify_all()

    def interrupted(self) -> None:
        """Where a worker can be stopped: raises what the signal's handler raises."""
        if self.stop:
            raise Died("received interrupt")

    def wait(self, timeout: float | None = None) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.exitstatus is not None, timeout)

    @property
    def failed(self) -> bool:
        return not (self.exitstatus == "OK" or (self.exitstatus or "").startswith("WARNINGS: "))


class Tasks:
    """All tasks of a node."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.by_upid: dict[str, Task] = {}
        self.lock = threading.Lock()
        self._pids = itertools.count(0x1000)

    def run(self, kind: str, object_id: str, caller: Caller, work: Callable[[Task], object]) -> Task:
        """Start a worker; it is told its task and fails by raising ApiError."""
        started = time.time()
        pid = next(self._pids)
        upid = f"UPID:{self.node}:{pid:08X}:{pid * 7:08X}:{int(started):08X}:{kind}:{object_id}:{caller.name}:"
        task = Task(upid, kind, object_id, caller.name, self.node, pid, started)
        with self.lock:
            self.by_upid[upid] = task
            ended = [each for each in self.by_upid.values() if each.ended]
            for old in ended[: max(0, len(ended) - MAX_ENDED)]:
                del self.by_upid[old.upid]
        threading.Thread(target=self._work, args=(task, work), name=upid, daemon=True).start()
        return task

    @staticmethod
    def _work(task: Task, work: Callable[[Task], object]) -> None:
        try:
            work(task)
        except ApiError as error:
            # one newline is cut off, the others become blanks; a parameter error brings its list along
            text = error.text if error.errors else error.message
            task.end(text.removesuffix("\n").replace("\n", " "))
        except Exception as error:
            task.end(f"pvesim broke: {error!r}")
            raise
        else:
            task.end(f"WARNINGS: {task.warnings}" if task.warnings else "OK")

    def find(self, upid: str) -> Task:
        with self.lock:
            task = self.by_upid.get(upid)
        if task is None:
            raise Died(
                "unable to read tail (got 0 bytes)"
                if upid.startswith("UPID:")
                else f"unable to parse worker upid '{upid}'"
            )
        return task

    def abort(self, task: Task) -> None:
        task.stop = True
        child = task.child
        if child is not None and child.poll() is None:
            child.terminate()

    def running(self) -> list[Task]:
        with self.lock:
            return [task for task in self.by_upid.values() if task.ended is None]


def status(task: Task) -> dict[str, Any]:
    """The answer of ``/tasks/{upid}/status``."""
    found: dict[str, Any] = {
        "id": task.id,
        "node": task.node,
        "pid": task.pid,
        "pstart": task.pid * 7,
        "starttime": int(task.started),
        "status": "stopped" if task.exitstatus is not None else "running",
        "type": task.type,
        "upid": task.upid,
        "user": task.user.partition("!")[0],
    }
    if "!" in task.user:
        found["tokenid"] = task.user.partition("!")[2]
    if task.exitstatus is not None:
        found["exitstatus"] = task.exitstatus
    return found
