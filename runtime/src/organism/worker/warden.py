# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small process beside each worker that starts its jobs and outlives nothing: no job's process survives it.

It is the *subreaper* of every job (prctl(2)): a process that daemonises becomes the warden's child, so nothing gets
away by double forking or by a session of its own. When the worker dies, however hard, the socket to it ends, and the
warden kills the whole tree and leaves. It needs nothing but the standard library: ``python -I -S warden.py FD``.

Over a SOCK_SEQPACKET socket, JSON both ways, one job at a time:
``{"op": "start"}`` with three descriptors (the request, stdout, stderr), ``{"op": "stop", "grace": 5}`` ->
``{"event": "started", "pid": 1}``, ``{"event": "failed", "message": "..."}``, ``{"event": "ended", "status": -9}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def parents() -> dict[int, int]:
    """Every process's parent, from /proc."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib would double the time that this process takes to start
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as stream:  # noqa: PTH123 - a process that must start fast
                    # the name in parentheses may itself hold blanks and parentheses
                    fields = stream.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it has just ended
            if fields[0] not in (b"Z", b"X"):
                found[int(name)] = int(fields[1])
    return found


def descendants(top: int) -> list[int]:
    """All live processes below ``top``."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    waiting = [top]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile: what was wanted
            os.kill(pid, number)


class Warden:
    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.pid = 0
        """The job's first process, 0 when none runs."""
        self.kill_at: float | None = None
        self.status: int | None = None

    def run(self) -> None:
        """Until the worker is gone."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the worker decides; it says so over the socket, or dies
        while True:
            wait = None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())
            ready, _, _ = select.select([self.link.fileno(), wake_read], [], [], wait)
            if wake_read in ready:
                os.read(wake_read, 4096)
                self.reap()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self.kill_at = None
                self.kill_tree()
            if self.link.fileno() in ready and not self.obey():
                return

    def obey(self) -> bool:
        """One message of the worker; False when there is no worker any more."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.link, 4096, 3)
        except ConnectionResetError:
            return False
        if not data:
            return False
        for descriptor in descriptors:
            # or a job would hold second copies of its own output (recv_fds of Python 3.11 to 3.13 ignores its flags)
            os.set_inheritable(descriptor, False)
        request = json.loads(data)
        if request["op"] == "start":
            self.start(*descriptors)
        elif self.pid:
            below = descendants(os.getpid())
            signal_all(below, signal.SIGTERM)
            signal_all(below, signal.SIGCONT)  # a stopped one has to hear it
            stop_at = time.monotonic() + request["grace"]
            self.kill_at = stop_at if self.kill_at is None else min(stop_at, self.kill_at)
        return True

    def tell(self, **event: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the worker is gone: the next read tells
            self.link.send(json.dumps(event).encode())

    def start(self, request_fd: int, stdout: int, stderr: int) -> None:
        with os.fdopen(request_fd, "rb") as stream:
            request = json.load(stream)
        failure_read, failure_write = os.pipe2(os.O_CLOEXEC)
        self.status = None
        request["warden"] = os.getpid()
        pid = os.fork()
        if pid == 0:
            run_job(request, stdout, stderr, failure_write)
        for descriptor in (stdout, stderr, failure_write):
            os.close(descriptor)
        with os.fdopen(failure_read, "rb") as stream:
            failure = stream.read().decode("utf-8", "replace")
        if failure:
            os.waitpid(pid, 0)
            self.tell(event="failed", message=failure)
            return
        self.pid = pid
        self.kill_at = time.monotonic() + request["limit"]
        self.tell(event="started", pid=pid)

    def reap(self) -> None:
        """Collect whoever has ended; when the job itself has, its leftovers end too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)
        if self.pid and self.status is not None:
            self.kill_tree()
            self.kill_at = None
            self.pid = 0
            self.tell(event="ended", status=self.status)

    def kill_tree(self) -> None:
        """SIGKILL everything below, again and again until nothing is left: a fork in between escapes one round only."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == self.pid and pid:
                self.status = os.waitstatus_to_exitcode(status)
            if pid:
                continue
            below = descendants(os.getpid())
            signal_all(below, signal.SIGSTOP)  # first nobody may fork, then all go
            signal_all(below, signal.SIGKILL)
            # wait for one to end instead of spinning; SIGKILL cannot be refused
            pid, status = os.waitpid(-1, 0)
            if pid == self.pid:
                self.status = os.waitstatus_to_exitcode(status)


def run_job(request: dict[str, Any], stdout: int, stderr: int, failure: int) -> None:
    """In the child: become the job's user, then its program. Never returns."""
    step = "start"
    try:
        signal.set_wakeup_fd(-1)
        # an ignored signal stays ignored over exec, and Python ignores two that programs count on
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        with open("/proc/self/oom_score_adj", "w") as stream:  # noqa: PTH123 - as above
            stream.write("500")  # rather the job than the worker
        user = request.get("user")
        if user is not None:
            step = f"become user {user['name']}"
            os.setgroups(user["groups"])
            os.setgid(user["gid"])
            os.setuid(user["uid"])
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != request["warden"]:
            os._exit(127)  # the warden died before the line above
        os.umask(0o022)
        step = f"enter {request['cwd']}"
        os.chdir(request["cwd"])
        step = f"run {request['argv'][0]!r}"
        os.execvpe(request["argv"][0], request["argv"], request["env"])  # noqa: S606 - starting it is the task
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        os.write(failure, f"cannot {step}: {reason}".encode())
    finally:
        os._exit(127)


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    warden = Warden(link)
    try:
        warden.run()
    finally:
        warden.kill_tree()


if __name__ == "__main__":
    main()
