# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole pool of processes in their own networks: servers, two conductors, twelve workers, the submitter."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from chaos.jobs.bus import Keys, Server, certificates, probe_words
from chaos.jobs.net import Network
from chaos.jobs.parts import HANG, Clock, Part, python, write_settings
from chaos.jobs.plan import CONDUCTORS, GPUS, MAX_LOST, MAX_RETRIES, USERS, Plan

from organism.bus import topology
from organism.bus.connection import BusClient, connect
from organism.bus.errors import BusError
from organism.bus.jetstream import JetStream
from organism.core import _bus, _bus_plan, _nats_config

LIMITS = _bus.Limits(
    queue_bytes=64 * _bus.MIB,
    results_bytes=64 * _bus.MIB,
    events_bytes=64 * _bus.MIB,
    dead_bytes=16 * _bus.MIB,
    telemetry_bytes=16 * _bus.MIB,
    jobs_bytes=32 * _bus.MIB,
    logs_bytes=16 * _bus.MIB,
)
GIVE_UP = 60.0
WORKER = {"HEARTBEAT_SEC": 0.5, "METRICS_SEC": 1, "STOP_GRACE_SEC": 1, "KILL_GRACE_SEC": 0.5, "LAUNCHER": "process"}
CONDUCTOR = {"LEASE_TTL_SEC": 4, "HEARTBEAT_TTL_SEC": 6, "RETRY_BACKOFF_SEC": 0.1, "LOG_LEVEL": "info"}


class Pool:
    """Made by the suite's process, which is root in namespaces of its own."""

    def __init__(self, folder: Path, plan: Plan, network: Network, env: dict[str, str] | None = None) -> None:
        self.folder, self.plan, self.network = folder, plan, network
        self.env = env or {}
        folder.chmod(0o755)
        (folder / "logs").mkdir()
        self.ran = folder / "ran"
        self.ran.mkdir()
        self.book = folder / "submitter.jsonl"
        members = [("admin", "setup"), *(("submitter", user) for user in USERS)]
        members += [*(("conductor", name) for name in CONDUCTORS), *(("worker", gpu) for gpu in GPUS)]
        self.keys = Keys(folder / "keys", members)
        self.servers = self._servers()
        self.urls = [
            f"{'tls' if self.tls else 'nats'}://{server.address}:{server.settings.port}" for server in self.servers
        ]
        self.clocks: dict[str, Clock] = {}
        self.conductors = [self._conductor(name) for name in CONDUCTORS]
        self.workers = [self._worker(gpu) for gpu in GPUS]
        self.submitter = self._submitter()
        self.probes = (
            [self._probe(server) for server in self.servers] if "full disk" not in plan.options.without else []
        )
        self.parts: dict[str, Part] = {
            part.name: part
            for part in (*self.servers, *self.probes, *self.conductors, *self.workers, self.submitter)
        }  # fmt: skip

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _servers(self) -> list[Server]:
        count = self.plan.options.servers
        names = [f"server.{number}" for number in range(count)]
        addresses = [self.network.join(name) for name in names]
        self.tls = certificates(self.folder / "tls", addresses) if count > 1 else None
        made = []
        for name, address in zip(names, addresses, strict=True):
            routes = tuple(f"{other}:6222" for other in addresses if other != address)
            settings = _nats_config.Settings(
                server_name=name.replace(".", "-"),
                store_dir="",
                max_file_store=320 * _bus.MIB,
                members=self.keys.members(),
                host="0.0.0.0",
                tls=self.tls,
                cluster=_nats_config.Cluster("chaos", routes, address) if count > 1 else None,
            )
            made.append(
                Server(name, self.folder / name, settings, address=address, inside=self.network.inside(name), env={})
            )
        return made

    def _part(self, name: str, words: list[str], *, clock: bool = False) -> Part:
        self.network.join(name)
        env = dict(self.env)
        if clock and Clock.library():
            self.clocks[name] = Clock(self.folder / f"{name}.clock")
            env |= self.clocks[name].env()
        log = self.folder / "logs" / f"{name}.log"
        return Part(name, lambda: words, log, inside=self.network.inside(name), env=env)

    def _common(self, kind: str, name: str) -> dict[str, object]:
        given: dict[str, object] = {"NATS_URL": ",".join(self.urls), "NKEY_FILE": self.keys.of(kind, name)}
        return given | ({"CA_FILE": self.tls.ca} if self.tls else {})

    def _conductor(self, name: str) -> Part:
        order: dict[str, object] = {"AGING_PER_HOUR": 600, "FAIR_SHARE_HALF_LIFE_SEC": 60}
        if self.plan.options.strict:
            order = {"AGING_PER_HOUR": 0, "FAIR_SHARE_HALF_LIFE_SEC": 0}
        policy = self.folder / "policy.toml"
        policy.write_text('[users]\noperators = ["olga"]\n')
        config = write_settings(
            self.folder / f"maestro-{name}.conf",
            {**self._common("conductor", name), "NAME": name, "POLICY_FILE": policy, "MAX_LOST": MAX_LOST,
             "MAX_RETRIES": MAX_RETRIES, **CONDUCTOR, **order},
        )  # fmt: skip
        return self._part(
            f"conductor.{name}", python("-m", "organism.maestro.daemon", "--config", str(config)), clock=True
        )

    def _worker(self, gpu: str) -> Part:
        folder = self.folder / f"worker-{gpu}"
        folder.mkdir()
        device = {"id": gpu, "backend": "simulated", "address": "sim:0", "model": "Simulated GPU (no hardware)"}
        (folder / "gpus.json").write_text(json.dumps({"version": 1, "gpus": [device]}))
        config = write_settings(
            folder / "gpu-worker.conf",
            {**self._common("worker", gpu), "GPU_MAP": folder / "gpus.json", "WORK_ROOT": folder / "cache",
             "BASE_ROOT": folder / "base", "RAM_ROOT": folder / "ram",
             "POLICY_FILE": folder / "policy.toml", "JOB_USER": "", **WORKER},
        )  # fmt: skip
        words = python("-m", "organism.worker.daemon", "--gpu", gpu, "--config", str(config))
        return self._part(f"worker.{gpu}", words, clock=True)

    def _submitter(self) -> Part:
        return self._part("submitter", python("-m", "chaos.jobs.submitter", str(self.folder / "submitter.json")))

    def tell_submitter(self, started: float) -> None:
        """``started``: the monotonic time from which the plan's times count."""
        config = {
            "options": asdict(self.plan.options),
            "book": str(self.book),
            "servers": self.urls,
            "keys": {user: self.keys.of("submitter", user) for user in USERS},
            "ca": self.tls.ca if self.tls else None,
            "ran": str(self.ran),
            "started": started,
        }
        self.book.touch()
        (self.folder / "submitter.json").write_text(json.dumps(config))

    def _probe(self, server: Server) -> Part:
        log = self.folder / "logs" / f"watch-{server.name}.log"
        return Part(f"watch.{server.name}", lambda: probe_words(server), log, inside=server.inside, env={})

    # ---- life --------------------------------------------------------------------------------------------------------

    async def up(self) -> None:
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.ready()
        nc = await self.connected("admin", "setup")
        try:
            js = JetStream(nc, timeout=20.0)
            await self._answering(js)
            wanted = _bus.topology(replicas=_nats_config.replicas_for(len(self.servers)), limits=self.limits)
            await topology.carry_out(js, _bus_plan.plan(await topology.read(js, wanted), wanted))
        finally:
            await nc.close()
        for server in self.servers:
            server.disk.sync()  # as the role nats does after the topology
        for part in (*self.probes, *self.conductors, *self.workers):
            part.start()
        # starting Python so often takes seconds on a small machine: nobody is to be thought dead for it
        async with asyncio.timeout(HANG):
            while not all("serves" in worker.log.read_text() for worker in self.workers):  # noqa: ASYNC110 - see below
                await asyncio.sleep(0.1)  # a log tells nobody

    async def _answering(self, js: JetStream) -> None:
        """A cluster has to find itself first; a question asked too early is never answered."""
        async with asyncio.timeout(2 * HANG):
            while True:
                try:
                    await js.api("INFO", timeout=1.0)
                    await js.api("STREAM.NAMES", timeout=1.0)
                    return
                except BusError:
                    await asyncio.sleep(0.5)  # it tells nobody when it is ready

    @property
    def limits(self) -> _bus.Limits:
        return _bus.Limits(**{**asdict(LIMITS), "duplicate_window": self.plan.window})

    async def connected(self, kind: str, name: str) -> BusClient:
        """The suite's own connections: their cables are never cut."""
        return await connect(
            servers=self.urls,
            label=_bus.Component(kind, name).label,
            nkey_file=self.keys.of(kind, name),
            ca_file=self.tls.ca if self.tls else None,
            give_up_after=GIVE_UP,
        )

    def down(self) -> None:
        """Everything ends, whatever state it is in."""
        for part in self.parts.values():
            part.thaw()
            part.kill()
        for server in self.servers:
            server.disk.remove()
