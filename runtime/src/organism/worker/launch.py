# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every way of starting a job has in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Launch:
    """One process tree to start. ``stdout`` and ``stderr`` are the writing ends of pipes, closed by the launcher."""

    name: str
    """Of this attempt, unique on the machine: ``<gpu>-<task>-<attempt>``."""
    argv: list[str]
    env: dict[str, str]
    cwd: Path
    work: Path
    """The job's own directory."""
    cache: Path
    """The GPU's cache, which the job may read, and write if the site allows it."""
    stdout: int
    stderr: int
    limit: float
    """Seconds after which the launcher itself ends the tree, a second guard behind the worker's own time-out."""
    nodes: tuple[str, ...] = field(default=())
    """Device nodes of the job's GPU."""
    hidden: tuple[Path, ...] = field(default=())
    """Directories of other jobs, outside the cache as well."""


@dataclass(frozen=True)
class Ending:
    """How a process tree ended; ``returncode`` is negative for a signal and None when nothing could be started."""

    returncode: int | None
    message: str = ""


class Process(Protocol):
    """A started tree."""

    async def wait(self) -> Ending:
        """How it ended; returns when nothing of the tree is left."""

    async def stop(self, grace: float) -> None:
        """Ask the tree to end (SIGTERM), and after ``grace`` seconds kill what is left of it. Returns at once."""


class Launcher(Protocol):
    confined: bool
    """True when a job sees no device node but its own GPU's (which changes how devices are counted)."""

    async def start(self, launch: Launch) -> Process:
        """Raises LaunchError when the machinery (not the job's program) fails."""

    async def clear(self, gpu: str) -> list[str]:
        """End whatever an earlier worker of this GPU has left running; returns what it was."""

    async def close(self) -> None:
        """End everything this launcher has started."""


class LaunchError(RuntimeError):
    """The launcher itself is broken; the job is not to blame."""
