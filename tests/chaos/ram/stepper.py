# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""End a piece of work before its Nth system call: a fork runs it under ptrace(2) and is killed there.

SIGKILL at the entry of a system call: the call is not made any more (ptrace(2), "syscall-enter-stop"; the kernel skips
it for a task with a fatal signal). So the Nth kill leaves exactly what the first N - 1 calls have done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_SYSGOOD, _EXITKILL = 1, 0x100000
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _LIBC.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace request {request}: {os.strerror(code)}")


def run_until(work: Callable[[], object], last: int | None = None) -> int:
    """Run ``work`` in a fork up to its ``last``-th system call, and kill it before that one is made.

    None: to its end. Returns the number of system calls that were made. Raises RuntimeError when the work fails.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a fork must never come back into the test that made it
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        os.waitpid(pid, 0)
        _ptrace(_SETOPTIONS, pid, _SYSGOOD | _EXITKILL)
        made, entering, forwarded = 0, True, 0
        while True:
            _ptrace(_SYSCALL, pid, forwarded)
            _pid, status = os.waitpid(pid, 0)
            forwarded = 0
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                if status != 0:
                    raise RuntimeError(f"the work ended with status {status:#x} after {made} system calls")
                pid = 0
                return made
            if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
                forwarded = os.WSTOPSIG(status)  # a signal of its own (SIGCHLD)
                continue
            if entering:
                if last is not None and made + 1 >= last:
                    return made
                made += 1
            entering = not entering
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
