# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One attempt from order to report: directory, environment, process tree, time-out, output, outcome on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from organism.bus import messages
from organism.bus.messages import Report, RunOrder, TaskRef
from organism.worker.cache_full import CacheFull
from organism.worker.devices.base import Backend, Binding, DeviceError, together
from organism.worker.disk import DiskGuard, DiskLimits
from organism.worker.handlers import SCRIPT, Handler
from organism.worker.launch import Ending, Launch, Launcher, LaunchError, Process
from organism.worker.output import Capture, PipeReader
from organism.worker.progress import PROGRESS_FILE
from organism.worker.store import Attempt, OutsideError, Taken, TaskStore

log = logging.getLogger(__name__)

Why = Literal["cancelled", "shutdown", "timeout", "disk", "cache_full", "discard"]
"""Why a running job is stopped: ``discard`` means that nobody wants its report (revoked, or this worker was reset)."""

VALUE_LIMIT = 256 * 1024
"""Bytes of JSON that a job may hand back as its value."""
PIPE_PATIENCE = 5.0
"""Seconds for the rest of the output to arrive once the whole tree has ended."""
UNKILLABLE = 30.0
"""Seconds after SIGKILL from which on a tree is held to be stuck in the kernel (state D: a hung GPU)."""
DISK_EVERY = 1.0
"""Seconds between two looks at what a job has written, at least."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class RunSettings:
    """What of the worker's settings a job feels; sizes in bytes, times in seconds."""

    gpu: str
    cache: Path
    timeout: float = 3600
    kill_grace: float = 5
    report_bytes: int = messages.OUTPUT_LIMIT
    log_bytes: int = 64 * 1024 * 1024
    inherit: tuple[str, ...] = ("LANG", "TZ")
    disk: DiskLimits = field(default_factory=DiskLimits)
    hidden: tuple[Path, ...] = ()
    """Directories with the other GPUs' files, beside those of this GPU's jobs."""


class Stop:
    """A wish to end the running job; the first reason stays."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.why: Why | None = None
        self.reason = ""

    def ask(self, why: Why, reason: str) -> None:
        if self.why is None or why == "discard":
            self.why, self.reason = why, reason
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


class Stuck(RuntimeError):
    """A tree that SIGKILL does not end; this GPU must get no further job until someone has looked."""


def _no_other(gpu: str) -> Backend:
    raise DeviceError(f"this worker knows no device {gpu}")


class Runner:
    """Runs one order at a time on one device."""

    def __init__(
        self,
        settings: RunSettings,
        store: TaskStore,
        launcher: Launcher,
        device: Backend,
        handlers: dict[str, Handler],
        allows: Callable[[str], bool],
        environ: Mapping[str, str] = os.environ,
        open_other: Callable[[str], Backend] = _no_other,
    ) -> None:
        self.settings = settings
        self.store = store
        self.launcher = launcher
        self.device = device
        self.handlers = handlers
        self.allows = allows
        self.environ = environ
        self.open_other = open_other

    @property
    def types(self) -> list[str]:
        """The job types that this worker would run."""
        return sorted(name for name in self.handlers if self.allows(name))

    def starts_nothing(self, order: RunOrder) -> bool:
        """Whether more such orders may have come at the same time: nothing of theirs is ever on disk."""
        return order.spec.type in messages.STARTS_NOTHING and self._refusal(order) is None

    async def run(self, order: RunOrder, stop: Stop, started: Callable[[], None] = lambda: None) -> Report | None:
        """The attempt's report, or None when the attempt was discarded. Raises Stuck.

        It is on disk when it is returned, except a noop's, which can as well be run again.
        """
        refusal = self._refusal(order)
        if refusal is not None:
            return refusal
        argv = self.handlers[order.spec.type].command(order.spec)
        if argv is None:
            now = messages.now()
            return self.report(order, returncode=0, started=now, finished=now)
        return await self._run_process(order, argv, stop, started)

    def _refusal(self, order: RunOrder) -> Report | None:
        kind = order.spec.type
        if kind not in self.handlers:
            return self.report(
                order,
                error="refused",
                message=f"job type {kind} is not installed on this worker (it has {', '.join(self.types)})",
            )
        if not self.allows(kind):
            return self.report(order, error="refused", message=f"job type {kind} is not allowed by this site's policy")
        try:
            messages.check_spec(order.spec)
            self.handlers[kind].check(order.spec)
        except messages.BadMessage as error:
            return self.report(order, error="refused", message=str(error))
        return None

    def report(self, order: RunOrder, **fields: Any) -> Report:
        """A report of this order; ``fields`` as in :class:`organism.bus.messages.Report`."""
        return Report(
            ts=messages.now(),
            task_id=order.task_id,
            attempt=order.attempt,
            gpu_id=self.settings.gpu,
            incarnation=order.incarnation,
            type=order.spec.type,
            **fields,
        )

    async def _run_process(
        self, order: RunOrder, argv: list[str], stop: Stop, started: Callable[[], None]
    ) -> Report | None:
        begun = messages.now()
        attempt = self.store.attempt(TaskRef(order.task_id, order.attempt))
        try:
            attempt = self.store.place(attempt.ref, on_disk=order.on_disk)
            attempt.create(Taken(order=order, incarnation=order.incarnation, started=begun), self.store.owner)
            cwd = attempt.inside(order.spec.cwd)
            env = self._environment(order, attempt)
            argv = [str(self._script(order, attempt)) if word == SCRIPT else word for word in argv]
        except OutsideError as error:
            return self._finish(attempt, self.report(order, error="refused", message=str(error)))
        except (OSError, DeviceError) as error:
            return self._not_begun(order, attempt, f"job directory or device: {error}")
        started()
        limits = {"report_bytes": self.settings.report_bytes, "file_bytes": self.settings.log_bytes}
        try:
            captures = [Capture(attempt.log(stream), **limits) for stream in ("stdout", "stderr")]
        except OSError as error:
            return self._not_begun(order, attempt, f"log files: {error}")
        self.device.busy(True)
        guard, ram = self._disk_guard(attempt), CacheFull(self.store, attempt)
        try:
            with captures[0] as out, captures[1] as err:
                ending, notes = await self._supervise(order, argv, env, cwd, attempt, (out, err), stop, guard, ram)
        finally:
            self.device.busy(False)
        if stop.why == "discard":
            attempt.abandon(stop.reason)
            return None
        value, trouble = _value(attempt.work / "value.json")
        fields = _verdict(ending, stop, order.timeout or self.settings.timeout)
        full = ram.blames(fields["error"], (out.text(), err.text()))
        if full:
            fields |= {"error": "cache_full", "message": f"{fields['message']}; {full}"}
        if fields["error"] == "cache_full":
            # one that was ended for what it had taken leaves nothing of it behind, wherever in the cache it lies
            notes += await _wiped(guard, None if stop.why == "cache_full" else attempt.work)
        notes = [note for note in (fields.pop("message"), *notes, trouble) if note]
        report = self.report(
            order,
            **fields,
            message="; ".join(notes),
            stdout=out.text(),
            stderr=err.text(),
            stdout_bytes=out.total,
            stderr_bytes=err.total,
            cwd=str(cwd),
            started=begun,
            finished=messages.now(),
            value=value,
        )
        return self._finish(attempt, report)

    def _not_begun(self, order: RunOrder, attempt: Attempt, why: str) -> Report:
        full = CacheFull(self.store, attempt).blames("start", (why,))
        error = "cache_full" if full else "start"
        return self._finish(attempt, self.report(order, error=error, message=f"{why}; {full}" if full else why))

    def _finish(self, attempt: Attempt, report: Report) -> Report:
        try:
            attempt.finish(report)
        except OSError as error:
            # told all the same: the report is in memory, and a worker that dies now costs one more attempt
            log.error("outcome of %s attempt %d cannot be written: %s", report.task_id, report.attempt, error)
        return report

    def _binding(self, order: RunOrder) -> Binding:
        """Of this worker's device, and of the others of this machine that the job has too. Raises DeviceError."""
        devices = [self.device, *(self.open_other(gpu) for gpu in order.also)]
        return together([device.binding(confined=self.launcher.confined) for device in devices])

    def _script(self, order: RunOrder, attempt: Attempt) -> Path:
        """The file with a Python job's text; its directory is the first in which that looks for modules."""
        return _leave(attempt.work / "script.py", order.spec.python or "")

    def _environment(self, order: RunOrder, attempt: Attempt) -> dict[str, str]:
        """By white-list: nothing of the worker's own environment gets through unless a site names it.

        Raises OSError or DeviceError.
        """
        env = {"PATH": PATH}
        env |= {name: self.environ[name] for name in self.settings.inherit if name in self.environ}
        env |= {"HOME": str(attempt.work), "TMPDIR": "/tmp"}  # noqa: S108 - private to the job under systemd
        env |= order.spec.env
        if order.spec.args is not None:
            env["ORGANISM_ARGS"] = str(_leave(attempt.work / "args.json", json.dumps(order.spec.args)))
        # after the job's own: it must not talk itself onto another device
        env |= self._binding(order).env
        env |= {
            "ORGANISM_GPU_ID": self.settings.gpu,
            "ORGANISM_GPU_IDS": ",".join([self.settings.gpu, *order.also]),
            "ORGANISM_TASK_ID": order.task_id,
            "ORGANISM_USER": order.user,
            "ORGANISM_GROUP": order.group,
            "ORGANISM_ATTEMPT": str(order.attempt),
            "ORGANISM_WORKDIR": str(self.settings.cache),
            "ORGANISM_JOBDIR": str(attempt.work),
            "ORGANISM_VALUE": str(attempt.work / "value.json"),
            "ORGANISM_PROGRESS": str(attempt.work / PROGRESS_FILE),
        }
        return env

    async def _supervise(
        self,
        order: RunOrder,
        argv: list[str],
        env: dict[str, str],
        cwd: Path,
        attempt: Attempt,
        captures: tuple[Capture, Capture],
        stop: Stop,
        guard: DiskGuard,
        ram: CacheFull,
    ) -> tuple[Ending, list[str]]:
        timeout = order.timeout or self.settings.timeout
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in captures]
        readers = [PipeReader(read, capture) for (read, _), capture in zip(pipes, captures, strict=True)]
        launch = Launch(
            name=f"{self.settings.gpu}-{order.task_id}-{order.attempt}",
            argv=argv,
            env=env,
            cwd=cwd,
            work=attempt.work,
            cache=self.settings.cache,
            stdout=pipes[0][1],
            stderr=pipes[1][1],
            # only felt when this worker is frozen itself
            limit=timeout + self.settings.kill_grace + 10,
            nodes=self._binding(order).nodes,
            hidden=tuple(top for top in (*self.settings.hidden, *self.store.tops) if top.is_dir()),
        )
        watches = [asyncio.create_task(_watch_disk(guard, ram, stop)), asyncio.create_task(ram.watch())]
        notes: list[str] = []
        try:
            try:
                process = await self.launcher.start(launch)
                ending = await self._until_end(process, stop, timeout)
            except LaunchError as error:
                return Ending(None, str(error)), []
            finally:
                for watch in watches:
                    watch.cancel()
                await asyncio.wait(watches)
            if stop.why == "disk":
                notes += await _wiped(guard)
            for reader, capture in zip(readers, captures, strict=True):
                if not await reader.finished(PIPE_PATIENCE):
                    notes.append(f"{capture.path.name} was still open after the job's end")
                if reader.trouble is not None:
                    notes.append(f"{capture.path.name} is incomplete: {reader.trouble.strerror or reader.trouble}")
            return ending, notes
        finally:
            for reader in readers:
                reader.stop()

    def _disk_guard(self, attempt: Attempt) -> DiskGuard:
        begun = attempt.work.stat()  # by the clock that its files get
        # a job of the worker's own user: beside its directory nothing tells its files from the worker's
        tops = (attempt.work,) if begun.st_uid == os.geteuid() else (attempt.work, self.settings.cache)
        return DiskGuard(self.settings.disk, tops, begun.st_uid, begun.st_ctime)

    async def _until_end(self, process: Process, stop: Stop, timeout: float) -> Ending:
        end = asyncio.create_task(process.wait())
        wish = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({end, wish}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                return end.result()
            if not wish.done():
                stop.ask("timeout", f"no end after {timeout:g} s")
            grace = self.settings.kill_grace
            stopping = asyncio.create_task(process.stop(grace))
            await asyncio.wait({end, stopping}, timeout=grace + UNKILLABLE, return_when=asyncio.FIRST_EXCEPTION)
            if stopping.done():
                stopping.result()
            else:  # a service manager that does not answer
                stopping.cancel()  # not awaited: CPython 3.11 hangs in a process's start that is cancelled
            if not end.done():
                raise Stuck(f"processes of the job did not end {UNKILLABLE:g} s after SIGKILL (stuck in the kernel?)")
            return end.result()
        finally:
            for task in (end, wish):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


def _leave(path: Path, text: str) -> Path:
    """A file for the job to read. Raises OSError."""
    path.write_text(text, encoding="utf-8", newline="")
    path.chmod(0o644)
    return path


async def _wiped(guard: DiskGuard, only: Path | None = None) -> list[str]:
    """Remove what the job wrote, or it would be full for the next one as well; returns what is to be said of it."""
    try:
        await asyncio.to_thread(guard.wipe, only)
    except OSError as error:
        return [f"what it wrote could not be removed: {error}"]
    return []


async def _watch_disk(guard: DiskGuard, ram: CacheFull, stop: Stop) -> None:
    """Ask for the job's end once it has taken too much."""
    clock = asyncio.get_running_loop().time
    while True:
        begun = clock()
        try:
            reason = await asyncio.to_thread(guard.look)
        except OSError as error:
            log.warning("what the job has written cannot be measured: %s", error)
            reason = ""
        if reason:
            full = ram.offer(reason) if guard.short else ""
            stop.ask("cache_full" if full else "disk", full or reason)
            return
        # a large tree takes long: at most a twentieth of a core for it
        await asyncio.sleep(max(DISK_EVERY, 20 * (clock() - begun)))


def _verdict(ending: Ending, stop: Stop, timeout: float) -> dict[str, Any]:
    """returncode, error and message of a report."""
    code = ending.returncode
    if stop.why == "timeout":
        return {"returncode": code, "error": "timeout", "message": f"stopped after its time-out of {timeout:g} s"}
    if stop.why is not None and stop.why != "discard":
        return {"returncode": code, "error": stop.why, "message": stop.reason}
    if code is None:
        return {"returncode": None, "error": "start", "message": ending.message}
    if code == 0:
        return {"returncode": 0, "error": None, "message": ending.message}
    if code < 0:
        return {"returncode": code, "error": "signal", "message": ending.message or f"ended by signal {-code}"}
    return {"returncode": code, "error": "exit", "message": ending.message or f"exit status {code}"}


def _value(path: Path) -> tuple[Any, str]:
    """What a job left as its value, and what was wrong with it. The file is the job's: nothing about it is trusted."""
    try:
        # O_NONBLOCK: a fifo must not stop the worker
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"value.json cannot be read: {error.strerror}"
    try:
        status = os.fstat(descriptor)
        # before fdopen, which raises for a directory
        if not stat.S_ISREG(status.st_mode) or status.st_size > VALUE_LIMIT:
            return None, f"value.json is ignored: it must be a file of at most {VALUE_LIMIT} bytes"
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(VALUE_LIMIT + 1)
    except OSError as error:
        return None, f"value.json cannot be read: {error.strerror}"
    finally:
        os.close(descriptor)
    try:
        return json.loads(data), ""
    except (ValueError, RecursionError) as error:
        return None, f"value.json is not JSON: {error}"
