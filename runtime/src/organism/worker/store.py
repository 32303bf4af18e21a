# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The jobs' directories in a GPU's cache: ``tasks/<job>/<attempt>/`` with

=================  ====================================================================================================
``order.json``     the order, and under which incarnation it was started: written before anything runs
``stdout.log``,    the output, bounded
``stderr.log``
``work/``          the job's own directory, the only one that belongs to the user it runs as
``outcome.json``   the report, synced before the conductor hears of it
``acknowledged``   the conductor has stored the report, or does not want it
``owed``           the whole output is still to be sent to the bus
``abandoned``      the worker died, or the attempt was revoked: there is no outcome and never will be
=================  ====================================================================================================

A new attempt gets its directory on disk instead, under ``jobs`` beside the cache's base, when the cache is nearly full
or an earlier attempt has found it full (organism.worker.cache_full).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from organism.bus import messages
from organism.bus.messages import Report, RunOrder, TaskRef
from organism.core import _bus
from organism.core._atomic import write_atomic

log = logging.getLogger(__name__)

ORDER, OUTCOME, ACKNOWLEDGED, ABANDONED = "order.json", "outcome.json", "acknowledged", "abandoned"
OWED = "owed"
STREAMS = ("stdout", "stderr")


class Taken(msgspec.Struct, kw_only=True):
    """Content of ``order.json``."""

    order: RunOrder
    incarnation: str
    started: str


class OutsideError(ValueError):
    """A path that leads out of the job's own directory."""


@dataclass(frozen=True)
class Owner:
    """Whose a job's own directory is; -1 keeps the worker's."""

    uid: int = -1
    gid: int = -1


class Attempt:
    """The directory of one attempt of one job."""

    def __init__(self, top: Path, ref: TaskRef) -> None:
        if not _bus.is_identifier(ref.task_id) or ref.attempt < 0:
            raise OutsideError(f"{ref.task_id!r} attempt {ref.attempt} cannot name a directory")
        self.ref = ref
        self.path = top / ref.task_id / str(ref.attempt)
        self.work = self.path / "work"

    def log(self, stream: str) -> Path:
        return self.path / f"{stream}.log"

    def create(self, taken: Taken, owner: Owner) -> None:
        """Make it anew and empty (an id may come again when the bus was built anew). Raises OSError."""
        for directory in (self.path.parent.parent, self.path.parent):
            directory.mkdir(exist_ok=True, parents=True)
            directory.chmod(0o711)  # a job reaches its own directory and cannot list the others
        if self.path.exists():
            remove_tree(self.path)
        self.path.mkdir(mode=0o711)
        self.path.chmod(0o711)
        self.work.mkdir(mode=0o700)
        if owner.uid != -1:
            os.chown(self.work, owner.uid, owner.gid)
        write_atomic(self.path / ORDER, msgspec.json.encode(taken), mode=0o600, durable=False)

    def inside(self, relative: str | None) -> Path:
        """The directory that a job asked to start in, made if need be. Raises OutsideError or OSError."""
        if not relative:
            return self.work
        target = (self.work / relative).resolve()
        if not target.is_relative_to(self.work.resolve()):
            raise OutsideError(f"cwd {relative!r} leads out of the job's directory")
        missing = [path for path in [target, *target.parents] if not path.exists()]
        target.mkdir(parents=True, exist_ok=True)
        owner = self.work.stat()
        for path in missing:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        return target

    def finish(self, report: Report) -> None:
        """Make the outcome durable; from here on it is reported until it is acknowledged. Raises OSError."""
        write_atomic(self.path / OUTCOME, messages.encode(report), mode=0o600)

    def acknowledge(self) -> None:
        """The conductor needs it no more; not synced: after a crash it is merely reported again."""
        write_atomic(self.path / ACKNOWLEDGED, b"", mode=0o600, durable=False)

    def owe(self) -> None:
        """Its whole output is to be sent to the bus. Raises OSError."""
        write_atomic(self.path / OWED, b"", mode=0o600, durable=False)

    def settle(self) -> None:
        """Nothing of it is to be sent any more."""
        (self.path / OWED).unlink(missing_ok=True)

    def abandon(self, why: str) -> None:
        write_atomic(self.path / ABANDONED, why, mode=0o600, durable=False)

    @property
    def closed(self) -> bool:
        return (self.path / ACKNOWLEDGED).exists() or (self.path / ABANDONED).exists()

    def outcome(self) -> Report | None:
        """The report on disk, or None when there is none (or only a damaged one, which is as good as none)."""
        try:
            return messages.decode((self.path / OUTCOME).read_bytes(), Report)
        except FileNotFoundError:
            return None
        except (messages.BadMessage, OSError) as error:
            log.warning("outcome of %s attempt %d is unreadable: %s", self.ref.task_id, self.ref.attempt, error)
            return None


@dataclass(frozen=True)
class Disk:
    """Where attempts go when the cache is fuller than ``above_percent``: ``top`` is on a disk, outside the cache."""

    top: Path
    above_percent: float


class TaskStore:
    """All attempts that a worker has directories of."""

    def __init__(self, work_root: Path, owner: Owner | None = None, disk: Disk | None = None) -> None:
        self.top = work_root / "tasks"
        self.disk = disk
        self.owner = owner or Owner()

    @property
    def tops(self) -> list[Path]:
        """Directories that hold attempts, the usual one first."""
        return [self.top] if self.disk is None else [self.top, self.disk.top]

    def place(self, ref: TaskRef, *, on_disk: bool = False) -> Attempt:
        """Where a new attempt goes: into the cache, or onto the disk when the cache is nearly full. Raises OSError.

        ``on_disk``: onto the disk in any case, where there is one below the cache.
        """
        chosen = self.top
        if self.disk is not None and (on_disk or _fill_percent(self.top.parent) >= self.disk.above_percent):
            chosen = self.disk.top
            why = "an earlier attempt found the cache full" if on_disk else "the cache is nearly full"
            log.warning("%s: %s attempt %d works on disk", why, ref.task_id, ref.attempt)
        for top in self.tops:
            other = Attempt(top, ref)
            if top != chosen and other.path.exists():
                remove_tree(other.path)  # of an earlier bus: an attempt has one directory
        return Attempt(chosen, ref)

    def attempt(self, ref: TaskRef) -> Attempt:
        """The attempt where it is; in the cache when it is nowhere yet."""
        found = [Attempt(top, ref) for top in self.tops]
        return next((attempt for attempt in found if attempt.path.exists()), found[0])

    def latest(self, task_id: str) -> Attempt | None:
        """The job's newest attempt on this worker."""
        if not _bus.is_identifier(task_id):
            return None
        numbers = [int(name) for top in self.tops for name in _names(top / task_id) if name.isdecimal()]
        return self.attempt(TaskRef(task_id, max(numbers))) if numbers else None

    def attempts(self) -> Iterator[Attempt]:
        for top in self.tops:
            for task in _names(top):
                if not _bus.is_identifier(task):
                    continue
                for number in _names(top / task):
                    if number.isdecimal():
                        yield Attempt(top, TaskRef(task, int(number)))

    def leftovers(self) -> tuple[list[tuple[Attempt, Report]], list[Attempt]]:
        """What an earlier run of the worker left: outcomes still to be reported, and attempts that died with it."""
        unreported: list[tuple[Attempt, Report]] = []
        died: list[Attempt] = []
        for attempt in self.attempts():
            if attempt.closed:
                continue
            report = attempt.outcome()
            if report is not None:
                unreported.append((attempt, report))
            else:
                died.append(attempt)
        return unreported, died

    def owing(self) -> Iterator[Attempt]:
        """Attempts whose whole output is still to be sent to the bus."""
        return (attempt for attempt in self.attempts() if (attempt.path / OWED).exists())

    def clean(self, *, now: float, keep: int, keep_seconds: float) -> int:
        """Remove directories of closed attempts that are too old or too many; ``now`` is in Unix time.

        Returns how many.
        """
        closed: list[tuple[float, Attempt]] = []
        for attempt in self.attempts():
            if attempt.closed:
                with contextlib.suppress(FileNotFoundError):  # removed by someone else: nothing to clean
                    closed.append((attempt.path.stat().st_mtime, attempt))
        closed.sort(key=lambda entry: entry[0], reverse=True)
        surplus = [a for position, (age, a) in enumerate(closed) if position >= keep or now - age > keep_seconds]
        for attempt in surplus:
            remove_tree(attempt.path)
            with contextlib.suppress(OSError):  # other attempts of the job are still there
                attempt.path.parent.rmdir()
        return len(surplus)


def _fill_percent(cache: Path) -> float:
    """How full a mounted cache is (overlayfs tells its upper's numbers); 0 for a directory that is no mount."""
    if not cache.is_mount():
        return 0.0
    status = os.statvfs(cache)
    return 100.0 * (status.f_blocks - status.f_bavail) / status.f_blocks if status.f_blocks else 0.0


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_tree(path: Path) -> None:
    """Remove a directory that a job could write to, whatever modes it left; links in it are never followed."""

    def retry(function: Callable[..., object], name: str, _error: object) -> None:
        parent = Path(name).parent
        for directory in (parent, Path(name)):
            if not directory.is_symlink() and directory.is_dir():
                directory.chmod(stat.S_IRWXU)
        if Path(name).is_dir() and not Path(name).is_symlink():
            shutil.rmtree(name)
        elif function is not os.lstat:
            Path(name).unlink(missing_ok=True)

    try:
        shutil.rmtree(path, onerror=retry)
    except OSError as error:
        log.warning("job directory %s cannot be removed completely: %s", path, error)
