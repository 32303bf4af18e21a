# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs as transient systemd units: own control group, unprivileged user, only their GPU's device nodes, a private /tmp,
a read-only system, no network unless the site allows it, no sight of the other jobs' directories or of the keys."""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from organism.worker.launch import Ending, Launch, LaunchError
from organism.worker.process import JobUser
from organism.worker.sandbox import HIDDEN, SystemdLimits, properties

log = logging.getLogger(__name__)

PREFIX = "organism-job"
AGAIN = 0.2
"""Seconds until the stop of a unit that systemd does not know yet is asked for again."""
_NODE_GROUPS = ("render", "video")
# what execve and its preparation answer in systemd's own words (systemd.exec(5), "Process exit codes")
_START_FAILED = range(200, 246)
# CLD_EXITED, CLD_KILLED, CLD_DUMPED of sigaction(2), as systemd shows them
_HOW = {"1": "exited", "2": "killed", "3": "dumped"}
_RESULTS = {
    "oom-kill": "out of memory",
    "timeout": "ended by systemd's own guard",
    "resources": "systemd lacked a resource to start it",
}


def unit_name(name: str) -> str:
    """Ids are at most 64 plain characters each, so this stays below systemd's 255 and needs no escaping."""
    return f"{PREFIX}-{name}.service"


def command_line(launch: Launch, program: str, settings: list[str]) -> list[str]:
    """The whole systemd-run call; systemd expands ``$`` in arguments, so each is doubled.

    The job's environment is put on by env(1), as the job's user: set on the unit it would be that of ExecStopPost= too,
    and so a job's LD_PRELOAD would be loaded as root.
    """
    job = ["/usr/bin/env", "-i", "--", *(f"{name}={value}" for name, value in launch.env.items())]
    if "=" in program:  # env would take it for a variable
        job += ["/bin/sh", "-c", 'exec "$0" "$@"']
    job += [program, *launch.argv[1:]]
    return [
        "systemd-run",
        "--quiet",
        "--pipe",
        "--wait",
        "--service-type=exec",
        f"--unit={unit_name(launch.name)}",
        f"--description=Job {launch.name}",
        f"--working-directory={launch.cwd}",
        *(f"--property={setting}" for setting in settings),
        "--",
        *(word.replace("$", "$$") for word in job),
    ]


def find_program(argv: list[str], env: dict[str, str], cwd: Path) -> str:
    """The absolute path of a job's program, by the job's own PATH and directory. Raises OSError as execve(2) would."""
    name = argv[0]
    if "/" not in name:
        found = shutil.which(name, path=env.get("PATH", os.defpath))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return str(cwd / found)
    path = cwd / name
    if not os.access(path, os.X_OK) or path.is_dir():
        number = errno.EACCES if path.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number))
    return str(path)


def own_unit(cgroup: str) -> str:
    """The worker's unit by the text of /proc/self/cgroup, or nothing when it was started by hand."""
    found = re.search(r"/(gpu-worker@[^/\s]+\.service)\s*$", cgroup, re.MULTILINE)
    return found[1] if found else ""


def shown_status(text: str) -> str | None:
    """What ``systemctl show`` says of a unit that has failed, in the words that the unit itself writes; None when its
    main process never ran."""
    shown = dict(line.partition("=")[::2] for line in text.splitlines())
    how = _HOW.get(shown.get("ExecMainCode", ""))
    return None if how is None else f"{shown.get('Result', '')} {how} {shown.get('ExecMainStatus', '')}"


def on_disks(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Of these paths one for each file system that lies on a block device; systemd finds the disk behind it."""
    found: dict[int, Path] = {}
    for path in paths:
        device = path.stat().st_dev
        if os.major(device) != 0:  # 0: tmpfs, overlayfs, ZFS: no single disk to be slowed down
            found.setdefault(device, path)
    return tuple(found.values())


def read_ending(status: str | None, code: int, unit: str) -> Ending:
    """How a job ended: ``status`` is what the unit wrote (``exit-code exited 3``), ``code`` systemd-run's own."""
    if status is None:
        if code == 0:
            return Ending(0)
        return Ending(
            None, f"systemd did not start {unit} (systemd-run ended with {code}; see stderr and `journalctl -u {unit}`)"
        )
    result, how, what = [*status.split(), "", "", ""][:3]
    message = _RESULTS.get(result, "")
    if how == "exited" and what.isdecimal():
        number = int(what)
        if number in _START_FAILED and code == 1:  # a program that ran would have had its own code passed on
            return Ending(None, f"systemd could not start it (status {number}; see systemd.exec(5), exit codes)")
        return Ending(number, message)
    if how in ("killed", "dumped"):
        with suppress(KeyError):
            return Ending(-signal.Signals[f"SIG{what}"].value, message)
        return Ending(-int(what) if what.isdecimal() else -9, message)
    return Ending(None, message or f"systemd did not start it ({result or 'no result'})")


class SystemdLauncher:
    confined = True

    def __init__(self, gpu: str, user: JobUser | None, limits: SystemdLimits, hidden: tuple[str, ...] = HIDDEN) -> None:
        self._gpu = gpu
        self._user = user
        self._limits = limits
        self._hidden = hidden
        self._groups = [name for name in _NODE_GROUPS if _group_exists(name)]
        try:
            self._bind_to = own_unit(Path("/proc/self/cgroup").read_text(encoding="ascii"))
        except OSError as error:
            raise LaunchError(f"cannot tell which unit this worker is: {error}") from error
        self._running: set[SystemdProcess] = set()

    async def start(self, launch: Launch) -> SystemdProcess:
        status = launch.work.parent / "end" / "status"
        try:
            try:
                status.parent.mkdir(mode=0o700)
                disks = on_disks((Path("/"), launch.cache, launch.work))
            except OSError as error:
                raise LaunchError(f"the job's directory {status.parent.parent}: {error.strerror or error}") from error
            settings = properties(
                launch,
                self._limits,
                user=self._user,
                groups=self._groups,
                bind_to=self._bind_to,
                status=status,
                disks=disks,
                hidden=self._hidden,
            )
            try:
                program = find_program(launch.argv, launch.env, launch.cwd)
                runner = await asyncio.create_subprocess_exec(
                    *command_line(launch, program, settings),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=launch.stdout,
                    stderr=launch.stderr,
                )
            except OSError as error:  # no such program, argument list too long
                return SystemdProcess(
                    unit_name(launch.name), None, status, launch.argv[0], error.strerror or str(error)
                )
        finally:
            os.close(launch.stdout)
            os.close(launch.stderr)
        process = SystemdProcess(unit_name(launch.name), runner, status, launch.argv[0])
        self._running.add(process)
        process.ended.add_done_callback(lambda _: self._running.discard(process))
        return process

    async def clear(self, gpu: str) -> list[str]:
        """Units that outlived an earlier worker (BindsTo= usually ended them already)."""
        pattern = f"{PREFIX}-{gpu}-*.service"
        listing = await _systemctl("list-units", "--all", "--plain", "--no-legend", "--full", pattern)
        units = [line.split()[0] for line in listing.splitlines() if line.strip()]
        if units:
            for verb in ("stop", "reset-failed"):
                with suppress(_NotLoaded):  # gone by itself meanwhile
                    await _systemctl(verb, *units)
        return units

    async def close(self) -> None:
        for process in list(self._running):
            await process.stop(0)
            await process.wait()


class SystemdProcess:
    """One job's unit."""

    def __init__(
        self, unit: str, runner: asyncio.subprocess.Process | None, status: Path, name: str, trouble: str = ""
    ) -> None:
        self.unit = unit
        self._runner = runner
        self._status = status
        self._name = name
        self._trouble = trouble
        self.ended: asyncio.Task[Ending] = asyncio.create_task(self._watch())

    async def _watch(self) -> Ending:
        if self._runner is None:
            return Ending(None, f"cannot run {self._name!r}: {self._trouble}")
        code = await self._runner.wait()
        try:
            status = self._status.read_text(encoding="ascii") or None
        except FileNotFoundError:
            status = None
        if code != 0:
            if status is None:
                # what the job left in RAM still counts against its limit: then nothing else can run in its group
                status = shown_status(
                    await _systemctl("show", "--property=Result,ExecMainCode,ExecMainStatus", self.unit)
                )
            with suppress(_NotLoaded):
                await _systemctl("reset-failed", self.unit)  # or systemd would keep it for ever
        return read_ending(status, code, self.unit)

    async def wait(self) -> Ending:
        return await asyncio.shield(self.ended)

    async def stop(self, grace: float) -> None:
        """systemd itself waits KILL_GRACE_SEC between the two signals; no grace is SIGKILL at once.

        A wish to stop may overtake systemd-run, which tells nobody when systemd has got the unit: until then it is
        repeated, or the job would start all the same.
        """
        verb = ("kill", "--signal=SIGKILL") if grace <= 0 else ("stop", "--no-block")
        while not self.ended.done():
            try:
                await _systemctl(*verb, self.unit)
                return
            except _NotLoaded:
                await asyncio.wait({self.ended}, timeout=AGAIN)


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


class _NotLoaded(LaunchError):
    """systemd does not know the unit: not yet, or no more."""


async def _systemctl(*arguments: str) -> str:
    """Its output. Raises LaunchError, and _NotLoaded in particular."""
    process = await asyncio.create_subprocess_exec(
        "systemctl", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    text = err.decode("utf-8", "replace").strip()
    if process.returncode != 0:
        # 5 by systemctl(1); kill answers 1 for it
        kind = _NotLoaded if process.returncode == 5 or "not loaded" in text else LaunchError
        raise kind(f"systemctl {' '.join(arguments)} ended with {process.returncode}: {text}")
    return out.decode("utf-8", "replace")
