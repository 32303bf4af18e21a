# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole pool of processes for a test: nats-server, conductor, workers, and the command line as a user runs it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from organism.cli import maestroctl, validate
from organism.core._client_settings import ClientSettings
from service.client.conftest import settings_for
from service.support import HANG, BusServer
from service.worker.double import WorkerProcess


class ConductorProcess:
    """``organism-maestro`` as its own process, quick to notice a death."""

    def __init__(self, directory: Path, bus: BusServer, name: str = "a", *, policy: str = "", **settings: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "policy.toml").write_text(policy or '[users]\noperators = ["olga"]\n')
        values = {
            "NATS_URL": bus.url,
            "NKEY_FILE": bus.credentials("conductor", name),
            "NAME": name,
            "LEASE_TTL_SEC": 1.5,
            "HEARTBEAT_TTL_SEC": 3,
            "RETRY_BACKOFF_SEC": 0.1,
            "POLICY_FILE": directory / "policy.toml",
            **settings,
        }
        self.config = directory / "maestro.conf"
        self.config.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        self.log = directory / "maestro.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ConductorProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "organism.maestro.daemon"],
                env={**os.environ, "MAESTRO_CONF": str(self.config)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def kill9(self) -> None:
        assert self.process is not None, "it does not run"
        self.process.kill()
        self.process.wait(HANG)
        self.process = None

    def stop(self) -> None:
        """SIGTERM and wait; does nothing when it is not running."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(HANG)
            finally:
                self.process.kill()
                self.process = None


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its one JSON object."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class Pool:
    """Bus, conductor ``a``, a worker for each of ``gpus``; users alice and bob, operator olga."""

    def __init__(
        self,
        directory: Path,
        gpus: Sequence[str] = ("gpu0", "gpu1"),
        worker: Mapping[str, Any] | None = None,
        **conductor: Any,
    ) -> None:
        """``worker`` and ``conductor``: settings of theirs."""
        members = [("conductor", "a"), ("submitter", "alice"), ("submitter", "bob"), ("operator", "olga")]
        self.directory = directory
        self.gpus = list(gpus)
        self.bus = BusServer(directory / "bus", [*members, *(("worker", gpu) for gpu in gpus)])
        self.conductor = ConductorProcess(directory / "maestro", self.bus, **conductor)
        settings = {**WORKER, **(worker or {}), "neighbours": gpus}
        self.workers = {gpu: WorkerProcess(directory / f"worker-{gpu}", self.bus, gpu, **settings) for gpu in gpus}

    def start(self) -> Pool:
        self.bus.ready()
        self.conductor.start()
        for worker in self.workers.values():
            worker.start()
        return self

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.kill()
        self.conductor.stop()
        self.bus.stop()

    def settings(self, user: str = "alice") -> ClientSettings:
        return settings_for(self.bus, user, "operator" if user == "olga" else "submitter")

    def context(self, user: str = "alice") -> Path:
        """A client.toml of this user."""
        settings = self.settings(user)
        path = self.directory / f"{user}.toml"
        path.write_text(
            f'servers = ["{settings.servers[0]}"]\nuser = "{user}"\nkind = "{settings.kind}"\n'
            f'nkey_file = "{settings.nkey_file}"\n'
        )
        return path

    def command(self, *words: str, user: str = "alice", program: str = "maestroctl") -> list[str]:
        """The same as words for a process of its own."""
        return [sys.executable, "-m", f"organism.cli.{program}", "--context", str(self.context(user)), *words]

    def run(self, *words: str, user: str = "alice", program: str = "maestroctl", stdin: str = "") -> Done:
        """The command line of a user, to its end; in this process, since starting Python costs most of the time."""
        main = {"maestroctl": maestroctl.main, "validate": validate.main}[program]
        out, err = io.StringIO(), io.StringIO()
        before, sys.stdin = sys.stdin, io.StringIO(stdin)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = main(["--context", str(self.context(user)), *words])
        finally:
            sys.stdin = before
        return Done(code, out.getvalue(), err.getvalue())

    def logs(self) -> str:
        """What the processes said last, for a failing test."""
        files = [self.conductor.log, *(worker.log for worker in self.workers.values())]
        return "\n".join(f"==== {file}\n{file.read_text()[-1500:]}" for file in files if file.exists())


WORKER = {"HEARTBEAT_SEC": 0.5, "METRICS_SEC": 0.5, "STOP_GRACE_SEC": 1, "KILL_GRACE_SEC": 0.5}
