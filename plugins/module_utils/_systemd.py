# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units of systemd: what they are now, what has to be done to have them as wanted, and doing it with ``systemctl``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ._root import Root

_PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NeedDaemonReload", "Result")


class CommandError(Exception):
    """A program ended with another status than 0; the text has its command line and what it said."""


Runner = Callable[[list[str]], str]
_SAID = 2000  # characters of a failed program's words


def run_command(argv: list[str], *, timeout: float = 120, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a program in the C locale; ``timeout`` (s) guards against a hang. Raises CommandError."""
    environment = {**os.environ, "LC_ALL": "C", "LANGUAGE": "C", **(env or {})}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    except FileNotFoundError:
        raise CommandError(f"{argv[0]} is not installed on this host") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"`{' '.join(argv)}` did not end within {timeout:g} s") from None
    if done.returncode:
        said = _shortened(done.stderr.strip() or done.stdout.strip())
        raise CommandError(f"`{' '.join(argv)}` ended with {done.returncode}: {said}")
    return done.stdout


def _shortened(text: str) -> str:
    """Beginning and end: some programs say what is wrong before their usage, others after all that they did."""
    return text if len(text) <= _SAID else f"{text[: _SAID // 2]}\n[...]\n{text[-_SAID // 2 :]}"


def booted(root: Root) -> bool:
    """Is systemd the running system manager (sd_booted(3))?"""
    return root.exists("/run/systemd/system")


@dataclass(frozen=True)
class UnitState:
    """A unit as ``systemctl show`` tells it; an unknown unit is not loaded, inactive and has no unit file state."""

    name: str
    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    unit_file: str = ""
    main_pid: int = 0
    needs_reload: bool = False
    result: str = "success"

    @property
    def enabled(self) -> bool:
        return self.unit_file in ("enabled", "enabled-runtime", "static", "indirect", "generated", "alias")

    @property
    def running(self) -> bool:
        return self.active in ("active", "reloading", "activating")


def parse_show(output: str) -> list[UnitState]:
    """The units in the output of ``systemctl show``: blocks of ``Property=value``, an empty line between two."""
    states = []
    for block in re.split(r"\n\s*\n", output.strip()):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" not in values:
            continue
        states.append(
            UnitState(
                name=values["Id"],
                load=values.get("LoadState", ""),
                active=values.get("ActiveState", ""),
                sub=values.get("SubState", ""),
                unit_file=values.get("UnitFileState", ""),
                main_pid=int(values.get("MainPID") or 0),
                needs_reload=values.get("NeedDaemonReload") == "yes",
                result=values.get("Result", ""),
            )
        )
    return states


def venv_of(root: Root, pid: int) -> str | None:
    """The virtual environment a Python process was started from (``/opt/x/bin/python3`` -> ``/opt/x``), or None.

    A console script's first line names the interpreter of its own virtual environment, so a daemon started through a
    symbolic link still shows the environment that it really uses (execve(2), interpreter scripts).
    """
    if pid <= 0:
        return None
    raw = root.read_or_none(f"/proc/{pid}/cmdline")
    interpreter = (raw or "").split("\0")[0]
    match = re.match(r"(/.*)/bin/python[0-9.]*\Z", interpreter)
    return match.group(1) if match else None


class Systemctl:
    """systemd's command line."""

    def __init__(self, run: Runner = run_command) -> None:
        self._run = run

    def show(self, names: Iterable[str]) -> dict[str, UnitState]:
        """States by unit name, in one call. Raises CommandError."""
        names = list(names)
        if not names:
            return {}
        output = self._run(["systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", *names])
        return {state.name: state for state in parse_show(output)}

    def state(self, name: str) -> UnitState:
        return self.show([name]).get(name, UnitState(name))

    def matching(self, patterns: Iterable[str]) -> dict[str, UnitState]:
        """Loaded units whose names match shell patterns, by name."""
        patterns = list(patterns)
        if not patterns:
            return {}
        listing = self._run(["systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", "--", *patterns])
        return self.show(line.split()[0] for line in listing.splitlines() if line.strip())

    def call(self, verb: str, *names: str) -> None:
        """``systemctl VERB UNITS``, to its end: a Type=notify unit is ready after a start. Raises CommandError."""
        self._run(["systemctl", "--no-ask-password", verb, *(["--", *names] if names else [])])

    def explain(self, name: str, lines: int = 15) -> str:
        """The unit's last journal lines, for an error message."""
        return self._run(["journalctl", "--no-pager", "--output=cat", f"--lines={lines}", f"--unit={name}"]).strip()
