# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-gpu-worker --gpu gpu0``: the worker of one GPU, as a service.

Exit codes: 0 told to stop, 1 something failed (systemd starts it again), 2 usage or settings.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from organism._version import VERSION
from organism.bus.connection import BusClient, connect
from organism.bus.errors import BusError
from organism.bus.jetstream import JetStream
from organism.core import _bus, _policy
from organism.core._keyvalue import Settings, SettingsError
from organism.core._root import Root
from organism.core._worker_settings import CONFIG, check_cpuset, load_settings
from organism.worker.cache_use import CacheUse
from organism.worker.devices import open_device
from organism.worker.devices.base import DeviceError
from organism.worker.disk import DiskLimits
from organism.worker.exporter import Exporter
from organism.worker.handlers import load_handlers
from organism.worker.launch import Launcher, LaunchError
from organism.worker.notify import Notifier
from organism.worker.process import JobUser, ProcessLauncher, find_user
from organism.worker.runner import Runner, RunSettings
from organism.worker.sandbox import HIDDEN, SystemdLimits
from organism.worker.service import Pace, Worker
from organism.worker.state import WorkerState
from organism.worker.store import Disk, Owner, TaskStore
from organism.worker.systemd import SystemdLauncher
from organism.worker.uploader import Uploader

log = logging.getLogger("organism.worker")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="organism-gpu-worker", description="Serve one GPU: run its jobs, one at a time."
    )
    parser.add_argument("--gpu", default=os.environ.get("GPU_ID", ""), help="logical id of the GPU (default: $GPU_ID)")
    parser.add_argument("--config", default=CONFIG, help="settings file (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check settings, device, user and bus, then leave")
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def reach_bus(urls: list[str], timeout: float = 2.0) -> None:
    """Does one of the servers accept a connection within ``timeout`` seconds each? Raises OSError that names them."""
    trouble = []
    for url in urls:
        place = urlsplit(url)
        try:
            with socket.create_connection((place.hostname or "", place.port or 4222), timeout):
                return
        except OSError as error:
            trouble.append(f"{url}: {error.strerror or error}")
    raise OSError(f"no server of the bus can be reached ({'; '.join(trouble)}); is nats-server running there?")


class Misconfigured(Exception):
    """Settings that cannot work on this machine; the text says what to change."""


def job_user(settings: Settings) -> JobUser | None:
    """Who jobs run as; None for the worker's own user, which only a worker that is not root may choose by default."""
    name = settings.text("JOB_USER")
    if os.geteuid() != 0 or not name:
        return None
    try:
        return find_user(name)
    except KeyError:
        raise Misconfigured(f"JOB_USER={name}: there is no such user (the role gpu_worker makes it)") from None


def choose_launcher(settings: Settings, gpu: str, user: JobUser | None) -> Launcher:
    """By LAUNCHER; ``auto`` takes systemd where it runs and the worker may start units."""
    kind = settings.text("LAUNCHER")
    able = os.geteuid() == 0 and Path("/run/systemd/system").is_dir() and shutil.which("systemd-run") is not None
    if kind == "systemd" and not able:
        raise Misconfigured("LAUNCHER=systemd needs root, a running systemd and systemd-run")
    if kind == "process" or not able:
        return ProcessLauncher(user, adopt=True)
    limits = SystemdLimits(
        memory_max=settings.text("JOB_MEMORY_MAX"),
        tasks_max=settings.integer("JOB_TASKS_MAX"),
        cpu_percent=settings.integer("JOB_CPU_PERCENT"),
        cpu_weight=settings.integer("JOB_CPU_WEIGHT"),
        io_weight=settings.integer("JOB_IO_WEIGHT"),
        io_read_max=settings.text("JOB_IO_READ_MAX"),
        io_write_max=settings.text("JOB_IO_WRITE_MAX"),
        tmp_max=settings.text("JOB_TMP_MAX"),
        network=settings.flag("JOB_NETWORK"),
        cpuset=settings.text("GPU_WORKER_CPUSET"),
        cache_writable=settings.text("JOB_CACHE") == "write",
        kill_grace=settings.number("KILL_GRACE_SEC"),
    )
    keys = settings.text("NKEY_FILE")
    return SystemdLauncher(gpu, user, limits, (*HIDDEN, keys) if keys else HIDDEN)


def prepare_cache(cache: Path, settings: Settings, user: JobUser | None) -> None:
    """Let jobs write into the GPU's cache if the site wants it: sticky, so that no job can move another's files or the
    directory of the jobs itself. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    if user is not None and settings.text("JOB_CACHE") == "write":
        os.chown(cache, -1, user.gid)
        cache.chmod(0o1775)


def disk_of(settings: Settings, root: Root, gpu: str) -> Disk | None:
    """The persistent side of the GPU's cache, where there is one: jobs go there when the cache is nearly full."""
    persistent = root.path(f"{settings.text('BASE_ROOT')}/{gpu}")
    if not persistent.is_dir():
        return None
    return Disk(persistent / "jobs", settings.number("JOB_DISK_ABOVE_PERCENT"))


def build_runner(settings: Settings, root: Root, gpu: str) -> Runner:
    """Raises Misconfigured, DeviceError, PolicyError or OSError."""
    if settings.text("GPU_WORKER_CPUSET"):
        check_cpuset(settings.text("GPU_WORKER_CPUSET"), root)
    user = job_user(settings)
    cache = root.path(settings.text("WORK_ROOT"))
    prepare_cache(cache, settings, user)
    policy = _policy.load(root, settings.text("POLICY_FILE"))
    return Runner(
        RunSettings(
            gpu=gpu,
            cache=cache,
            timeout=settings.number("TASK_TIMEOUT_DEFAULT"),
            kill_grace=settings.number("KILL_GRACE_SEC"),
            log_bytes=settings.integer("LOG_MAX_MB") * 1024 * 1024,
            inherit=tuple(settings.words("JOB_ENV_PASS")),
            disk=DiskLimits(
                settings.integer("JOB_DISK_MAX_MB") * 1024 * 1024, settings.number("JOB_DISK_FREE_PERCENT")
            ),
            hidden=tuple(root.path(settings.text(name)) for name in ("BASE_ROOT", "RAM_ROOT")),
        ),
        TaskStore(cache, Owner(user.uid, user.gid) if user else None, disk_of(settings, root, gpu)),
        choose_launcher(settings, gpu, user),
        open_device(root, settings.text("GPU_MAP"), gpu),
        load_handlers(python=settings.text("JOB_PYTHON")),
        policy.allows,
        open_other=lambda other: open_device(root, settings.text("GPU_MAP"), other),
    )


def uploader_of(settings: Settings, bus: BusClient, runner: Runner, cache: CacheUse) -> Uploader | None:
    """None where a site keeps long outputs on the workers alone."""
    rate = settings.number("LOG_UPLOAD_MB_SEC") * 1024 * 1024
    return Uploader(JetStream(bus), runner.settings.gpu, runner.store, cache, rate) if rate else None


async def serve(settings: Settings, root: Root, gpu: str, notifier: Notifier) -> int:
    runner = build_runner(settings, root, gpu)
    loop = asyncio.get_running_loop()
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, me.cancel)  # until there is something to wind down
    alive = asyncio.create_task(notifier.keep_alive())
    lost = asyncio.Event()
    component = _bus.Component("worker", gpu)
    try:
        bus = await connect(
            servers=settings.words("NATS_URL"),
            label=component.label,
            nkey_file=settings.text("NKEY_FILE") or None,
            ca_file=settings.text("CA_FILE") or None,
            on_closed=lost.set,
        )
        try:
            state = WorkerState(
                gpu=gpu,
                host=socket.gethostname(),
                device=runner.device.device,
                workdir=str(runner.settings.cache),
                nats_url=",".join(settings.words("NATS_URL")),
                types=runner.types,
                shard=settings.text("SHARD"),
            )
            pace = Pace(
                heartbeat=settings.number("HEARTBEAT_SEC"),
                metrics=settings.number("METRICS_SEC"),
                stop_grace=settings.number("STOP_GRACE_SEC"),
                keep_tasks=settings.integer("KEEP_TASKS"),
                keep_seconds=settings.number("KEEP_HOURS") * 3600,
            )
            use = CacheUse(root.path(settings.text("RAM_ROOT")), gpu)
            exporter = Exporter(root, settings.text("TEXTFILE_COLLECTOR"), state)
            uploader = uploader_of(settings, bus, runner, use)
            worker = Worker(bus, state, runner, pace, use, exporter, uploader)
            await worker.prepare()
            await bus.listen(_bus.control_subject(gpu), worker.control)
            await bus.hear(_bus.order_subject(gpu), worker.order)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, worker.stop)
            notifier.send(f"READY=1\nSTATUS=serving {state.device.model or state.device.backend} as {gpu}")
            with bus.on_reconnect(worker.heart.nudge):  # an order may have got lost with the connection
                await _until_over(worker, lost)
            notifier.send("STOPPING=1")
            exporter.withdraw()
        finally:
            await bus.close()
    finally:
        alive.cancel()
        await runner.launcher.close()
    return 1 if lost.is_set() else 0


async def _until_over(worker: Worker, lost: asyncio.Event) -> None:
    """The worker's end, or the connection's (a revoked key): then the service starts anew."""
    running = asyncio.create_task(worker.run())
    closed = asyncio.create_task(lost.wait())
    try:
        await asyncio.wait({running, closed}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        for task in (running, closed):
            task.cancel()
        await asyncio.gather(running, closed, return_exceptions=True)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        # the journal has time and unit already
        format="%(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(levelname)s %(message)s",
    )
    if not options.gpu:
        parser.error("which GPU? give --gpu ID (the unit gpu-worker@ID does)")
    root = Root()
    try:
        settings = load_settings(root, options.gpu, options.config)
        if options.check:
            runner = build_runner(settings, root, options.gpu)
            reach_bus(settings.words("NATS_URL"))
            sys.stdout.write(f"{options.gpu}: {runner.device.device.model}, job types {', '.join(runner.types)}\n")
            return 0
        return asyncio.run(serve(settings, root, options.gpu, Notifier()))
    except (SettingsError, Misconfigured, ValueError) as error:
        log.error("%s", error)
        return 2
    except (BusError, DeviceError, LaunchError, OSError) as error:
        log.error("%s", error)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 0


if __name__ == "__main__":
    sys.exit(main())
