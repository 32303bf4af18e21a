# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hook, guard and mlmode of a node of the storm, forked instead of executed: ``python -m chaos.guard.warm TOP SOCKET``.

Starting Python and importing the guard takes ten times as long as what the guard does then, and a thousand sequences
start it some twenty thousand times. Processes, locks, time limits and kills are as with the installed commands, which
the storms among the service tests run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from pvesim.warm import Program, become, serve

from organism.core import _hook, _hook_run
from organism.core._root import Root
from organism.host import guard, mlmode

PROGRAMS: dict[str, Program] = {"organism-guard": guard.main, "mlmode": mlmode.main}


class Entry:
    """An entry of the hook as a process: its line ``exec`` says which program. As Popen, where `_hook_run` looks."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], **_streams: object) -> None:
        path, vmid, _phase = argv
        line = next(each for each in Path(path).read_text(encoding="utf-8").splitlines() if each.startswith("exec "))
        words = [vmid if word == "$1" else word for word in shlex.split(line)[1:]]
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            become(PROGRAMS, words, env, writing)
        os.close(writing)
        self.stdout = os.fdopen(reading, "rb")

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _dispatcher(top: str) -> Program:
    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def main(words: Sequence[str]) -> int:
        root = Root(top)
        vmid, phase = _hook.check_call(list(words))
        plan = _hook.plan(root, phase, vmid, _hook.settings(root), owner=os.geteuid())
        return _hook_run.run_plan(plan, root, os.environ, say).code

    return main


if __name__ == "__main__":
    streams = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL", "STDOUT")}
    setattr(_hook_run, "subprocess", SimpleNamespace(Popen=Entry, **streams))  # noqa: B010 - not what mypy knows there
    PROGRAMS["organism-hook"] = _dispatcher(sys.argv[1])
    serve(Path(sys.argv[2]), PROGRAMS)
