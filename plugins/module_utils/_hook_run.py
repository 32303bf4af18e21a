# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running a hook's entries: each in a process group of its own, with a time limit, its output passed on line by line.

Proxmox VE reads a hookscript's output to its end, so that a process which an entry leaves behind would hold the VM's
lock as long as it keeps that output open. Entries therefore write into a pipe of ours, which is closed when they end.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ._hook import REFUSED, TIMED_OUT, Entry, Plan, next_step
from ._root import Root

GRACE_S = 2.0
"""Between SIGTERM and SIGKILL to an entry that has overrun its time."""

_BLOCK = 65536
_BLOCKS = 16  # fcntl(2): an unprivileged pipe holds at most 1 MiB
_LONGEST_LINE = 8192

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of an entry. ``code``: its exit code, 128 + signal, 124 timed out, 126 refused."""

    name: str
    path: str
    code: int
    reason: str
    seconds: float
    output: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.code == 0


@dataclass(frozen=True)
class Report:
    """``code`` is what the hook itself ends with: the first failure's."""

    vmid: int | None
    phase: str
    code: int
    outcomes: tuple[Outcome, ...]
    not_run: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "ok": self.code == 0}


def run_plan(plan: Plan, root: Root, environment: Mapping[str, str], say: Say) -> Report:
    """Run the entries: before a start up to the first failure, else all of them.

    ``say`` gets each line for the log: the entries' own, with their names, and ours.
    """
    outcomes: list[Outcome] = []
    ends = time.monotonic() + plan.total
    for position, entry in enumerate(plan.entries):
        outcome = _run(entry, plan, root, environment, ends, say)
        outcomes.append(outcome)
        if outcome.ok:
            continue
        say(f"organism-hook: {plan.phase} of VM {plan.vmid}: {entry.name} {outcome.reason}: {next_step(entry, plan)}")
        if plan.stops_at_failure:
            left = tuple(each.name for each in plan.entries[position + 1 :])
            say(f"organism-hook: VM {plan.vmid} is not started" + (f"; not run: {', '.join(left)}" if left else ""))
            return Report(plan.vmid, plan.phase, outcome.code, tuple(outcomes), left)
    code = next((outcome.code for outcome in outcomes if not outcome.ok), 0)
    return Report(plan.vmid, plan.phase, code, tuple(outcomes))


def _run(entry: Entry, plan: Plan, root: Root, environment: Mapping[str, str], ends: float, say: Say) -> Outcome:
    if entry.refused is not None:
        return Outcome(entry.name, entry.path, REFUSED, f"is refused: {entry.path} {entry.refused}", 0.0)
    started = time.monotonic()
    limit = min(entry.timeout, ends - started)
    if limit <= 0:
        return Outcome(entry.name, entry.path, TIMED_OUT, f"had no time left ({plan.total:g} s for the phase)", 0.0)
    try:
        process = subprocess.Popen(
            [str(root.path(entry.path)), str(plan.vmid), plan.phase],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a process group of its own, to end all of it
        )
    except OSError as error:  # a missing interpreter, a wrong format
        return Outcome(entry.name, entry.path, REFUSED, f"cannot be started: {error.strerror} ({entry.path})", 0.0)
    lines = _Lines("" if entry.foreign else f"{entry.name}: ", say)
    timed_out = _follow(process, started + limit, lines)
    took = time.monotonic() - started
    if timed_out:
        code, reason = TIMED_OUT, f"did not end within {limit:g} s and was ended"
    elif process.returncode < 0:
        code = 128 - process.returncode
        reason = f"was killed by {_signal_name(-process.returncode)}"
    else:
        code, reason = process.returncode, f"ended with {process.returncode}"
    return Outcome(entry.name, entry.path, code, reason, round(took, 3), tuple(lines.told))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _follow(process: subprocess.Popen[bytes], ends: float, lines: _Lines) -> bool:
    """Pass the output on until the process has ended; True when it had to be ended."""
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    timed_out = False
    os.set_blocking(process.stdout.fileno(), False)
    descriptor = os.pidfd_open(process.pid)
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    waiting.register(process.stdout, select.POLLIN)
    signals = [signal.SIGTERM, signal.SIGKILL]
    try:
        while True:
            left = ends - time.monotonic()
            ready = {number for number, _event in waiting.poll(max(0.0, left) * 1000)} if left > 0 else set()
            if process.stdout.fileno() in ready and lines.read(process.stdout.fileno()) is False:
                waiting.unregister(process.stdout)  # closed; the process may go on
            if descriptor in ready:
                break
            if time.monotonic() >= ends:
                timed_out = True
                _end_group(process.pid, signals.pop(0) if signals else signal.SIGKILL)
                ends = time.monotonic() + GRACE_S
    finally:
        os.close(descriptor)
    if timed_out:
        _end_group(process.pid, signal.SIGKILL)  # what its leader's end has left of the group
    process.wait()
    for _block in range(_BLOCKS):  # what was written before the end and lies in the pipe; no more than a pipe holds,
        if not lines.read(process.stdout.fileno()):  # since a process that was left behind may write for ever
            break
    lines.finish()
    process.stdout.close()
    return timed_out


def _end_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended meanwhile
        os.killpg(pid, number)


class _Lines:
    """Cuts a stream of bytes into lines for the log."""

    def __init__(self, prefix: str, say: Say) -> None:
        self._prefix, self._say = prefix, say
        self._rest = b""
        self.told: list[str] = []

    def read(self, descriptor: int) -> bool | None:
        """True when there was something, False at the end of the stream, None when nothing is there now."""
        try:
            block = os.read(descriptor, _BLOCK)
        except BlockingIOError:
            return None
        *whole, self._rest = (self._rest + block).split(b"\n")
        for line in whole:
            self._tell(line)
        if len(self._rest) > _LONGEST_LINE:
            self._tell(self._rest)
            self._rest = b""
        return bool(block)

    def finish(self) -> None:
        if self._rest:
            self._tell(self._rest)

    def _tell(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.told.append(text)
        self._say(self._prefix + text)
