# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs in Python that are started so often that their imports are most of the cost: a process of their own each,
forked from one that has imported everything.

`serve` answers on a unix socket; `start` gives something like a Popen. What a process does, how it is killed and what
becomes of it then is as with a program that is executed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

Program = Callable[[Sequence[str]], int]
_PR_SET_NAME = 15  # linux/prctl.h
_LARGEST = 1 << 20


class Child:
    """A started program: the part of Popen's interface that its callers use."""

    def __init__(self, line: socket.socket, pid: int, stdout: IO[bytes]) -> None:
        self._line = line
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """What `wait` has learned."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutError."""
        if self.returncode is None:
            self._line.settimeout(timeout)
            told = self._line.recv(_LARGEST)
            if not told:
                raise RuntimeError("the process that forks has gone")
            self.returncode = int(told)
            self._line.close()
        return self.returncode

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, signal.SIGTERM)


def start(path: Path, words: Sequence[str], environment: Mapping[str, str], cwd: str = "/") -> Child:
    """Its output and its complaints come together. Raises OSError."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(str(path))
    reading, writing = os.pipe()
    asked = json.dumps({"words": list(words), "environment": dict(environment), "cwd": cwd})
    socket.send_fds(line, [asked.encode()], [writing])
    os.close(writing)
    return Child(line, int(line.recv(_LARGEST)), os.fdopen(reading, "rb"))


def serve(path: Path, programs: Mapping[str, Program]) -> None:
    """Fork at each request; ``programs``: by the name of their script. Says so when it listens. Ends by a signal."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(path))
    listening.listen(64)
    print("ready", flush=True)
    watched = selectors.DefaultSelector()
    watched.register(listening, selectors.EVENT_READ)
    lines: dict[int, tuple[int, socket.socket]] = {}
    gc.collect()
    gc.freeze()  # pages that are shared stay shared
    while True:
        for key, _events in watched.select():
            if key.fileobj is listening:
                line, _peer = listening.accept()
                pid = _forked(line, programs)
                descriptor = os.pidfd_open(pid)
                lines[descriptor] = pid, line
                watched.register(descriptor, selectors.EVENT_READ)
                _tell(line, pid)
            else:
                watched.unregister(key.fileobj)
                os.close(key.fd)
                pid, line = lines.pop(key.fd)
                _tell(line, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                line.close()


def _tell(line: socket.socket, number: int) -> None:
    try:
        line.send(b"%d" % number)
    except OSError:  # who asked has been killed
        line.close()


def _forked(line: socket.socket, programs: Mapping[str, Program]) -> int:
    told, (output,), _flags, _peer = socket.recv_fds(line, _LARGEST, 1)
    pid = os.fork()
    if pid == 0:
        asked = json.loads(told)
        os.chdir(asked["cwd"])
        become(programs, asked["words"], asked["environment"], output)
    os.close(output)
    return pid


def become(programs: Mapping[str, Program], words: Sequence[str], environment: Mapping[str, str], output: int) -> None:
    """In the process just forked: be that program, and end with its exit code."""
    code = 1
    try:
        name = Path(words[0]).name
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
        for number, taken in ((0, os.open("/dev/null", os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(taken, number)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(environment)
        code = programs[name](words[1:])
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - as at the end of a program: its complaint, then its exit code
        traceback.print_exc()
    finally:
        os._exit(code)
