# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool to measure: a real nats-server as the role sets it up, real conductors, real workers with simulated GPUs.

All on this machine, without name spaces: nothing is cut here. The server syncs always, everybody has a key and its
permissions. ``delay`` seconds are added to each fsync by strace, which also counts them (it costs the server some
processor time: figures with and without it are not to be compared).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.jobs.bus import Keys, binary
from chaos.jobs.parts import HANG, Part, python, wait_for, write_settings

from organism.bus import topology
from organism.bus.connection import BusClient, connect
from organism.bus.jetstream import JetStream
from organism.client import AsyncMaestro
from organism.core import _bus, _bus_plan, _nats_config
from organism.core._client_settings import ClientSettings

USER = "alice"
TICK = os.sysconf("SC_CLK_TCK")
LIMITS = _bus.Limits(
    queue_bytes=2048 * _bus.MIB,
    results_bytes=2048 * _bus.MIB,
    events_bytes=2048 * _bus.MIB,
    dead_bytes=16 * _bus.MIB,
    telemetry_bytes=16 * _bus.MIB,
    jobs_bytes=1024 * _bus.MIB,
    logs_bytes=16 * _bus.MIB,
)
CONDUCTOR = {"HEARTBEAT_TTL_SEC": 15, "MAX_QUEUE": 5_000_000, "LOG_LEVEL": "info"}
WORKER = {"HEARTBEAT_SEC": 5, "METRICS_SEC": 5, "LAUNCHER": "process", "JOB_USER": "", "STOP_GRACE_SEC": 1}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Usage:
    """Of one process: seconds of processor time so far, bytes of resident memory."""

    cpu: float
    rss: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return cls((int(fields[11]) + int(fields[12])) / TICK, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Shape:
    """What a pool consists of. ``crowd``: workers in one process (1: as on a machine with GPUs)."""

    gpus: int = 12
    crowd: int = 1
    conductors: Sequence[str] = ("a",)
    delay: float = 0.0
    traced: bool = False
    settings: dict[str, object] = field(default_factory=dict)
    """Of the conductors."""


class Pool:
    """Made and ended by :func:`pool`."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder, self.shape = folder, shape
        folder.mkdir(parents=True)
        self.gpus = [f"gpu{number}" for number in range(shape.gpus)]
        members = [("admin", "setup"), ("submitter", USER)]
        members += [*(("conductor", name) for name in shape.conductors), *(("worker", gpu) for gpu in self.gpus)]
        self.keys = Keys(folder / "keys", members)
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.server = self._server()
        self.conductors = [self._conductor(name) for name in shape.conductors]
        self.workers = self._workers()
        self.ended: Part | None = None
        """The part whose end nobody wanted."""

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _server(self) -> Part:
        self.pid_file = self.folder / "nats.pid"
        self.syncs_file = self.folder / "syncs"
        settings = _nats_config.Settings(
            server_name="bench",
            store_dir=str(self.folder / "store"),
            max_file_store=LIMITS.total + 512 * _bus.MIB,
            members=self.keys.members(),
            port=self.port,
            http_port=None,
            extra={"pid_file": str(self.pid_file)},
        )
        config = self.folder / "nats-server.conf"
        config.write_text(_nats_config.render(settings))
        words = [binary(), "-c", str(config)]
        if self.shape.delay or self.shape.traced:
            if shutil.which("strace") is None:
                raise SystemExit("bench: no strace to slow down and count fsyncs with: `apt-get install strace`")
            calls = "fsync,fdatasync"
            slow = ["-e", f"inject={calls}:delay_exit={int(self.shape.delay * 1e6)}"] if self.shape.delay else []
            words = ["strace", "-D", "-qq", "-f", "--seccomp-bpf", "-e", f"trace={calls}", "-e", "signal=none", *slow,
                     "-o", str(self.syncs_file), "--", *words]  # fmt: skip
        return Part("server", lambda: words, self.folder / "nats-server.log", inside=[], env={})

    def _conductor(self, name: str) -> Part:
        config = write_settings(
            self.folder / f"maestro-{name}.conf",
            {"NATS_URL": self.url, "NKEY_FILE": self.keys.of("conductor", name), "NAME": name,
             "POLICY_FILE": self.folder / "policy.toml", **CONDUCTOR, **self.shape.settings},
        )  # fmt: skip
        words = python("-m", "organism.maestro.daemon", "--config", str(config))
        return Part(f"conductor.{name}", lambda: words, self.folder / f"conductor-{name}.log", inside=[], env={})

    def _workers(self) -> list[Part]:
        made = []
        crowd = self.shape.crowd
        for group in (self.gpus[at : at + crowd] for at in range(0, len(self.gpus), crowd)):
            configs = [str(self._worker_config(gpu)) for gpu in group]
            if crowd == 1:
                words = python("-m", "organism.worker.daemon", "--gpu", group[0], "--config", configs[0])
            else:
                pairs = [f"{gpu}={config}" for gpu, config in zip(group, configs, strict=True)]
                words = python("-m", "bench.jobs_crowd", *pairs)
            log = self.folder / f"worker-{group[0]}.log"
            made.append(Part(f"worker.{group[0]}", lambda words=words: words, log, inside=[], env={}))  # type: ignore[misc]  # bound now
        return made

    def _worker_config(self, gpu: str) -> Path:
        folder = self.folder / f"worker-{gpu}"
        folder.mkdir()
        device = {"id": gpu, "backend": "simulated", "address": "sim:0", "model": "Simulated GPU (no hardware)"}
        (folder / "gpus.json").write_text(json.dumps({"version": 1, "gpus": [device]}))
        return write_settings(
            folder / "gpu-worker.conf",
            {"NATS_URL": self.url, "NKEY_FILE": self.keys.of("worker", gpu), "GPU_MAP": folder / "gpus.json",
             "WORK_ROOT": folder / "cache", "BASE_ROOT": folder / "base", "RAM_ROOT": folder / "ram",
             "POLICY_FILE": folder / "policy.toml", **WORKER},
        )  # fmt: skip

    # ---- life --------------------------------------------------------------------------------------------------------

    async def up(self, *, workers: bool = True) -> None:
        self.server.start()
        wait_for(self._listening, f"nats-server does not listen (see {self.server.log})")
        nc = await self.connected("admin", "setup")
        try:
            js = JetStream(nc, timeout=30.0)
            wanted = _bus.topology(limits=LIMITS)
            await topology.carry_out(js, _bus_plan.plan(await topology.read(js, wanted), wanted))
        finally:
            await nc.close()
        for part in self.conductors:
            part.start()
        if workers:
            await self.start_workers()
        await self.leading()

    async def start_workers(self) -> None:
        for part in self.workers:
            part.start()
        async with asyncio.timeout(3 * HANG):
            while not all("serves" in part.log.read_text() for part in self.workers):  # noqa: ASYNC110 - see below
                await asyncio.sleep(0.1)  # a log tells nobody

    async def leading(self, times: int = 1, parts: Sequence[Part] | None = None) -> None:
        """Until one of these conductors (all by default) has said so many times that it leads."""
        async with asyncio.timeout(20 * HANG):
            while not self._said(times, parts or self.conductors):  # noqa: ASYNC110 - see below
                await asyncio.sleep(0.02)  # a log tells nobody

    async def watch(self, whose: asyncio.Task[Any] | None) -> None:
        """Cancel the task when a part ends that nobody has stopped: it would wait for it in vain."""
        while whose is not None:
            await asyncio.sleep(1.0)  # a look now and then is enough
            for part in (self.server, *self.conductors, *self.workers):
                if not part.held and not part.running:
                    self.ended = part
                    whose.cancel()
                    return

    @staticmethod
    def _said(times: int, parts: Sequence[Part]) -> bool:
        return any(part.log.read_text().count("leading shard") >= times for part in parts)

    def _listening(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def down(self) -> None:
        for part in (*self.workers, *self.conductors):
            part.kill()
        if self.pid_file.exists() and self.server.running:
            # the server itself: strace, when it is there, ends with it
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(int(self.pid_file.read_text()), signal.SIGKILL)
        self.server.kill()

    # ---- looking -----------------------------------------------------------------------------------------------------

    async def connected(self, kind: str, name: str) -> BusClient:
        label = _bus.Component(kind, name).label
        return await connect(
            servers=[self.url], label=label, nkey_file=self.keys.of(kind, name), give_up_after=HANG
        )  # fmt: skip

    def client(self, *, listen: bool = True) -> AsyncMaestro:
        settings = ClientSettings(servers=(self.url,), user=USER, nkey_file=self.keys.of("submitter", USER))
        return AsyncMaestro(settings, listen=listen)

    def usage(self) -> dict[str, Usage]:
        """By kind: the workers' are summed."""
        workers = [Usage.of(part.pid) for part in self.workers if part.running]
        return {
            "server": Usage.of(int(self.pid_file.read_text())),
            "conductor": self._sum([Usage.of(part.pid) for part in self.conductors if part.running]),
            "workers": self._sum(workers),
            "client": Usage.of(os.getpid()),
        }

    @staticmethod
    def _sum(many: Sequence[Usage]) -> Usage:
        return Usage(sum(one.cpu for one in many), sum(one.rss for one in many))

    def syncs(self) -> int:
        """fsyncs of a traced server so far."""
        return self.syncs_file.read_text(errors="replace").count("= 0") if self.syncs_file.exists() else 0


@asynccontextmanager
async def pool(
    folder: Path, shape: Shape | None = None, *, workers: bool = True, kind: type[Pool] = Pool
) -> AsyncIterator[Pool]:
    """A running pool, which ends with the context and leaves nothing."""
    made = kind(folder, shape or Shape())
    watching = asyncio.create_task(made.watch(asyncio.current_task()))
    try:
        await made.up(workers=workers)
        yield made
    except asyncio.CancelledError:
        if made.ended is None:
            raise
        raise SystemExit(f"bench: {made.ended.name} has ended: {made.ended.log.read_text()[-1500:]}") from None
    finally:
        watching.cancel()
        made.down()
        shutil.rmtree(folder)
