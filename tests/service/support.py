# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real nats-server for a test: own directory, own port, the product's own configuration, keys and topology.

Tests drive asyncio themselves: ``asyncio.run(main())``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from organism.bus import keys, topology
from organism.bus.connection import BusClient, connect
from organism.bus.jetstream import JetStream
from organism.core import _bus, _bus_plan, _nats_config

REPO = Path(__file__).resolve().parents[2]
HANG = 60.0
"""Seconds after which a test gives up on something that must happen; never part of what it asserts."""

SMALL = _bus.Limits(
    queue_bytes=256 * _bus.MIB,
    results_bytes=256 * _bus.MIB,
    events_bytes=64 * _bus.MIB,
    dead_bytes=32 * _bus.MIB,
    telemetry_bytes=16 * _bus.MIB,
    jobs_bytes=32 * _bus.MIB,
    logs_bytes=64 * _bus.MIB,
)
"""Room for tests; the store is sparse, so this is no disk space."""


def nats_server_binary() -> str:
    """The server's path; skips the test when there is none."""
    found = os.environ.get("ORGANISM_NATS_SERVER") or shutil.which("nats-server", path=f"{REPO}/.cache/bin")
    found = found or shutil.which("nats-server")
    if not found or not Path(found).exists():
        pytest.skip("no nats-server: `./run test` installs it in .cache/bin, or set ORGANISM_NATS_SERVER")
    return found


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Certificates:
    """A certificate authority and one server certificate for localhost, as files."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl command to make test certificates with")
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory / "ca.pem", directory / "server.pem", directory / "server.key")

        def openssl(*arguments: str | Path) -> None:
            subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=HANG)

        elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        openssl("req", "-x509", *elliptic, "-keyout", directory / "ca.key", "-out", made.ca, "-subj", "/CN=test CA")
        openssl("req", *elliptic, "-keyout", made.key, "-out", directory / "server.csr", "-subj", "/CN=localhost")
        names = directory / "names"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl(
            *("x509", "-req", "-in", directory / "server.csr", "-CA", made.ca, "-CAkey", directory / "ca.key"),
            *("-CAcreateserial", "-days", "2", "-extfile", names, "-out", made.cert),
        )
        return made


class BusServer:
    """One nats-server process. ``members`` are the components that may connect, as ``(kind, name)``."""

    def __init__(
        self,
        directory: Path,
        members: Iterable[tuple[str, str]] = (),
        *,
        certificates: Certificates | None = None,
        cluster: _nats_config.Cluster | None = None,
        keys_from: BusServer | None = None,
        max_file_store: int = 2048 * _bus.MIB,
        monitoring: bool = False,
        extra: dict[str, object] | None = None,
    ) -> None:
        self.binary = nats_server_binary()
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.http_port = free_port() if monitoring else None
        self.certificates = certificates
        self.cluster = cluster
        self.max_file_store = max_file_store
        self.extra = extra or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.members: dict[tuple[str, str], Path] = dict(keys_from.members) if keys_from else {}
        if not keys_from:
            self.admit(("admin", "setup"), *members)

    # ---- who may connect ---------------------------------------------------------------------------------------------

    def admit(self, *members: tuple[str, str]) -> None:
        """Make keys for components; a running server learns of them at :meth:`reload`."""
        for kind, name in members:
            path = self.directory / "keys" / f"{kind}.{name}.nk"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                keys.create(path)
            self.members[kind, name] = path
        self.write_config()

    def credentials(self, kind: str, name: str) -> Path:
        """The seed file of a component that was admitted."""
        return self.members[kind, name]

    # ---- the process -------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"{'tls' if self.certificates else 'nats'}://localhost:{self.port}"

    @property
    def ca_file(self) -> str | None:
        return str(self.certificates.ca) if self.certificates else None

    @property
    def config(self) -> Path:
        return self.directory / "nats-server.conf"

    @property
    def log(self) -> Path:
        return self.directory / "nats-server.log"

    def settings(self) -> _nats_config.Settings:
        made = self.certificates
        return _nats_config.Settings(
            server_name=self.directory.name,
            store_dir=str(self.directory / "store"),
            max_file_store=self.max_file_store,
            port=self.port,
            http_port=self.http_port,
            tls=_nats_config.Tls(str(made.cert), str(made.key), str(made.ca)) if made else None,
            cluster=self.cluster,
            members=_nats_config.members(
                {"kind": kind, "name": name, "public_key": keys.public_key(path)}
                for (kind, name), path in self.members.items()
            ),
            extra=self.extra,
        )

    def write_config(self) -> None:
        self.config.write_text(_nats_config.render(self.settings()))

    def start(self) -> None:
        """Start it and wait until it accepts connections (not: until JetStream answers, see :meth:`wait`)."""
        assert self.process is None, "it runs already"
        self.write_config()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "-c", str(self.config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + HANG
        while True:
            if self.process.poll() is not None:
                pytest.fail(
                    f"nats-server ended at once with {self.process.returncode}:\n{self.log.read_text()[-2000:]}"
                )
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if time.monotonic() > deadline:
                pytest.fail(f"nats-server does not listen:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)  # the server has no other sign of being ready

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None, "it does not run"
        self.process.send_signal(number)

    def kill9(self) -> None:
        """SIGKILL, as an out-of-memory killer or a crash would."""
        self.signal(signal.SIGKILL)
        self._reap()

    def stop(self) -> None:
        """SIGTERM and wait; does nothing when it is not running."""
        if self.process is not None:
            self.process.terminate()
            self._reap()

    def restart(self) -> None:
        self.stop()
        self.start()

    def reload(self) -> None:
        """Make the running server read its configuration again (SIGHUP), and wait until it has."""
        self.write_config()
        before = self.log.read_text().count("Reloaded")
        self.signal(signal.SIGHUP)
        deadline = time.monotonic() + HANG
        while self.log.read_text().count("Reloaded") == before:
            if time.monotonic() > deadline:
                pytest.fail(f"nats-server did not reload:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def _reap(self) -> None:
        assert self.process is not None
        try:
            self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(HANG)
            pytest.fail("nats-server did not end")
        finally:
            self.process = None

    # ---- connections -------------------------------------------------------------------------------------------------

    async def connected(self, kind: str, name: str, **options: object) -> BusClient:
        """A connection with this component's key, as the product makes it."""
        return await connect(
            label=_bus.Component(kind, name).label,
            nkey_file=str(self.credentials(kind, name)),
            ca_file=self.ca_file,
            **{"servers": [self.url], "give_up_after": HANG, **options},  # type: ignore[arg-type]  # a test's own options, checked by connect
        )

    async def apply_topology(self, *, replicas: int = 1, limits: _bus.Limits = SMALL) -> _bus_plan.Plan:
        """Streams and buckets by the code that the product uses."""
        nc = await self.connected("admin", "setup")
        try:
            js = JetStream(nc, timeout=20.0)
            wanted = _bus.topology(replicas=replicas, limits=limits)
            plan = _bus_plan.plan(await topology.read(js, wanted), wanted)
            await topology.carry_out(js, plan)
            return plan
        finally:
            await nc.close()

    def ready(self) -> BusServer:
        """Started, with the topology."""
        self.start()
        asyncio.run(self.apply_topology())
        return self
