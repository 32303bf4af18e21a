# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One nats-server of the pool, on a disk of its own that can be full, slow, or lose its power."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from chaos.jobs.parts import Part, wait_for
from chaos.jobs.trouble import Stuck, Unavailable
from chaos.ram.disks import CUTS, Disk

from organism.bus import keys
from organism.core import _nats_config

REPO = Path(__file__).resolve().parents[3]
DISK_MIB = 384
PROBE_PORT = 8222


def binary() -> str:
    found = os.environ.get("ORGANISM_NATS_SERVER") or shutil.which("nats-server", path=f"{REPO}/.cache/bin")
    found = found or shutil.which("nats-server")
    if not found:
        raise Unavailable("no nats-server: `./run setup` installs it in .cache/bin, or set ORGANISM_NATS_SERVER")
    return found


class Keys:
    """Seed files of all components."""

    def __init__(self, folder: Path, members: list[tuple[str, str]]) -> None:
        self.places = {member: folder / f"{member[0]}.{member[1]}.nk" for member in members}
        folder.mkdir(parents=True, exist_ok=True)
        for place in self.places.values():
            keys.create(place)

    def of(self, kind: str, name: str) -> str:
        return str(self.places[kind, name])

    def members(self) -> tuple[_nats_config.Member, ...]:
        return _nats_config.members(
            {"kind": kind, "name": name, "public_key": keys.public_key(place)}
            for (kind, name), place in self.places.items()
        )


def certificates(folder: Path, addresses: list[str]) -> _nats_config.Tls:
    """An authority and one certificate for all servers, as files. Raises Unavailable."""
    folder.mkdir(parents=True, exist_ok=True)
    names = folder / "names"
    names.write_text("subjectAltName=" + ",".join(f"IP:{address}" for address in addresses) + "\n")
    elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for words in (
        ["req", "-x509", *elliptic, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=chaos CA"],
        ["req", *elliptic, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=chaos"],
        ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
         "-extfile", "names", "-out", "server.pem"],
    ):  # fmt: skip
        done = subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"openssl {words[0]}: {done.stderr.strip()[-200:]}")
    return _nats_config.Tls(str(folder / "server.pem"), str(folder / "server.key"), str(folder / "ca.pem"))


class Server(Part):
    """``delay`` seconds are added to each fsync of the next start."""

    def __init__(
        self, name: str, folder: Path, settings: _nats_config.Settings, *, address: str, inside: list[str],
        env: Mapping[str, str],
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = address
        self.disk = Disk(folder, size=DISK_MIB)
        self.delay = 0.0
        self.pid_file = folder / "pid"
        self.settings = replace(
            settings, store_dir=str(self.disk.place / "store"), extra={**settings.extra, "pid_file": str(self.pid_file)}
        )
        self.config = folder / "nats-server.conf"
        self.config.write_text(_nats_config.render(self.settings))
        super().__init__(name, self._words, folder / "nats-server.log", inside=inside, env=env)

    def _words(self) -> list[str]:
        words = [binary(), "-c", str(self.config)]
        if self.delay:
            slow = [f"inject=fsync,fdatasync:delay_exit={int(self.delay * 1e6)}", "-o", "/dev/null", "--"]
            words = ["strace", "-D", "-f", "--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-e", *slow, *words]
        return words

    def listening(self) -> bool:
        with closing(socket.socket()) as probe:
            probe.settimeout(0.5)
            return probe.connect_ex((self.address, self.settings.port)) == 0

    def ready(self) -> None:
        """Wait until it accepts connections. Raises Stuck."""
        try:
            wait_for(self.listening, f"{self.name} does not listen")
        except Stuck as error:
            raise Stuck(f"{error}: {self.log.read_text()[-800:]}") from None

    def cut_power(self, how: str) -> None:
        """What it had not synced is gone; it stays down until it is started."""
        self.disk.lose(CUTS[how])
        self.kill()
        self.disk.come_back()

    @property
    def filler(self) -> Path:
        return self.disk.place / "filler"

    def fill(self) -> None:
        """Not a block is left."""
        with self.filler.open("wb", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):
                block = bytes(size)
                try:
                    while True:
                        stream.write(block)
                except OSError as error:
                    if error.errno != 28:  # ENOSPC is what it is about
                        raise

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)


def probe_words(server: Server) -> list[str]:
    """The product's watch over a server's store; its end is its restart, as under systemd."""
    stop = f"/bin/kill -KILL $(cat {server.pid_file})"
    return [
        sys.executable, "-m", "organism.cli.bus", "watch", "--store", str(server.disk.place / "store"), "--health",
        f"http://127.0.0.1:{server.settings.http_port}/healthz", "--every", "0.5", "--restart", "sh", "-c", stop,
    ]  # fmt: skip
