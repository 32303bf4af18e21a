# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""End a piece of work before its Nth system call: a fork runs it under ptrace(2) and is killed there.

SIGKILL at the entry of a system call: the call is not made any more (ptrace(2), "syscall-enter-stop"; the kernel skips
it for a task with a fatal signal). So the Nth kill leaves exactly what the first N - 1 calls have done.

Calls that only look (read, stat, getdents, an open that makes nothing) are not counted: who is killed before one leaves
what the next call that is counted finds. That also makes N mean the same in each run, however many processes there are
in /proc to be looked at. What is not known to only look is counted; on other processors than x86-64 every call is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_GET_SYSCALL_INFO = 0x420E
_SYSGOOD, _EXITKILL = 1, 0x100000
# by number on x86-64 (arch/x86/entry/syscalls/syscall_64.tbl)
_LOOKS = frozenset({
    0, 3, 4, 5, 6, 7, 8,  # read close stat fstat lstat poll lseek
    9, 10, 11, 12, 13, 14, 17,  # mmap mprotect munmap brk rt_sigaction rt_sigprocmask pread64
    21, 22, 25, 28, 32, 33, 35, 39,  # access pipe mremap madvise dup dup2 nanosleep getpid
    56, 58, 61, 72, 73, 78, 79, 89,  # clone vfork wait4 fcntl flock getdents getcwd readlink
    96, 102, 104, 107, 108, 110, 131, 137, 138,  # gettimeofday getuid getgid .. sigaltstack statfs fstatfs
    186, 191, 192, 193, 194, 195, 196, 202,  # gettid getxattr lgetxattr fgetxattr listxattr .. futex
    217, 228, 230, 247, 262, 267, 269, 271,  # getdents64 clock_gettime .. waitid newfstatat readlinkat faccessat ppoll
    292, 293, 318, 332, 334, 435, 439,  # dup3 pipe2 getrandom statx rseq clone3 faccessat2
})  # fmt: skip
_OPENAT = 257
_MAKES = os.O_CREAT | os.O_TRUNC
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _LIBC.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace request {request}: {os.strerror(code)}")


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info (ptrace(2), Linux 5.3), as at the entry of a call."""

    _fields_ = [
        ("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64), ("stack", ctypes.c_uint64), ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6), ("more", ctypes.c_uint64 * 2),
    ]  # fmt: skip


def _only_looks(pid: int) -> bool:
    """Whether the call that a process is about to make leaves everything as it is."""
    if platform.machine() != "x86_64":
        return False
    info = _Info()
    if _LIBC.ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"the system call cannot be seen: {os.strerror(code)}")
    if info.number == _OPENAT:
        return not info.arguments[2] & _MAKES
    return info.number in _LOOKS


def run_until(work: Callable[[], object], last: int | None = None) -> int:
    """Run ``work`` in a fork up to the ``last``-th system call that counts, and kill it before that one is made.

    None: to its end. Returns the number of such calls that were made. Raises RuntimeError when the work fails.
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
            if entering and not _only_looks(pid):
                if last is not None and made + 1 >= last:
                    return made
                made += 1
            entering = not entering
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
