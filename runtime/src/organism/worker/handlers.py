# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Types of job: each turns a job's specification into a command line, or into nothing at all (``noop``).

A handler only *names* the program. Whatever a type does is done by a process inside the job's own containment, never
inside the worker, so that a type that a site installs can neither stop the heartbeats nor reach the worker's key.

A site adds a type by a Python package with an entry point::

    [project.entry-points."organism.job_types"]
    embed = "my_package:EmbedHandler"

whose class has ``check(spec)`` and ``command(spec)`` like those below. The command finds the job's ``args`` as JSON in
the file that ``ORGANISM_ARGS`` names and may leave its result as JSON in the file that ``ORGANISM_VALUE`` names.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

from organism.bus.messages import BadMessage, JobSpec

log = logging.getLogger(__name__)

GROUP = "organism.job_types"
SCRIPT = "\0script"
"""In a command: the file in the job's directory that has the text of a ``python`` job. No word of a user's can be equal
to it, since those hold no NUL byte."""


class Handler(Protocol):
    def check(self, spec: JobSpec) -> None:
        """Raises BadMessage when the specification lacks what this type needs."""

    def command(self, spec: JobSpec) -> list[str] | None:
        """Program and arguments, or None when there is nothing to start."""


class CmdHandler:
    """``cmd``: the argument list as it is, no shell anywhere."""

    def check(self, spec: JobSpec) -> None:
        if not spec.cmd:
            raise BadMessage("a cmd job needs `cmd`: a list with at least the program's name")

    def command(self, spec: JobSpec) -> list[str] | None:
        return list(spec.cmd or [])


class ShellHandler:
    """``shell``: a script for /bin/sh; off unless the site's policy allows it."""

    def check(self, spec: JobSpec) -> None:
        if not spec.shell:
            raise BadMessage("a shell job needs `shell`: the script's text")

    def command(self, spec: JobSpec) -> list[str] | None:
        return ["/bin/sh", "-c", spec.shell or ""]


class PythonHandler:
    """``python``: a program's text for the site's interpreter, a file at its start, so that tracebacks show its lines
    and its size is not that of one word of a command (128 KiB, execve(2))."""

    def __init__(self, interpreter: str) -> None:
        self.interpreter = interpreter

    def check(self, spec: JobSpec) -> None:
        if not spec.python:
            raise BadMessage("a python job needs `python`: the program's text")

    def command(self, spec: JobSpec) -> list[str] | None:
        # -u: what it prints is seen at once, and not lost with a job that is killed
        return [self.interpreter, "-u", SCRIPT, *spec.argv]


class NoopHandler:
    """``noop``: starts nothing, leaves nothing; measures the road there and back."""

    def check(self, spec: JobSpec) -> None:
        """Anything will do."""

    def command(self, spec: JobSpec) -> list[str] | None:  # noqa: ARG002 - the handlers' interface
        return None


def builtin_handlers(python: str = "") -> dict[str, Handler]:
    """``python``: path of the interpreter of Python jobs; without one this worker offers none of them."""
    handlers: dict[str, Handler] = {"cmd": CmdHandler(), "shell": ShellHandler(), "noop": NoopHandler()}
    if python and not (Path(python).is_file() and os.access(python, os.X_OK)):
        log.error("no python jobs on this worker: JOB_PYTHON=%s is no program (install it, or name another)", python)
    elif python:
        handlers["python"] = PythonHandler(python)
    return handlers


def load_handlers(found: list[EntryPoint] | None = None, *, python: str = "") -> dict[str, Handler]:
    """The built-in types and those of installed packages. A package that does not load costs its type, not the worker;
    the built-in names cannot be taken."""
    handlers = builtin_handlers(python)
    for entry in entry_points(group=GROUP) if found is None else found:
        if entry.name in handlers or entry.name == "python":
            log.error("job type %s of %s is ignored: the name is taken", entry.name, entry.value)
            continue
        try:
            handler = entry.load()()
        except Exception:  # a site's own code may raise anything at import; it is told, and left out
            log.error("job type %s of %s cannot be loaded", entry.name, entry.value, exc_info=sys.exc_info())
            continue
        if not (callable(getattr(handler, "check", None)) and callable(getattr(handler, "command", None))):
            log.error("job type %s of %s is ignored: it lacks check() or command()", entry.name, entry.value)
            continue
        handlers[entry.name] = handler
    return handlers
