# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The peers: built, started, driven and ended, each with a Redis of its own.

Each has a virtual environment of its own below the cache, with pinned versions, made the first time. Redis comes from
Debian (``apt-get install redis-server``). Durability: ``everysec`` is what people run (a power cut takes up to a second
of acknowledged jobs), ``always`` is the one to compare with ours. Twelve jobs at a time everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.jobs_pool import TICK, free_port
from bench.jobs_table import spread
from chaos.jobs.parts import Part, wait_for

HERE = Path(__file__).parent / "peers"
Sync = Literal["everysec", "always"]
SYNCS: tuple[Sync, ...] = ("everysec", "always")
DRIVE_WITHIN = 400.0


@dataclass(frozen=True)
class Peer:
    """``requirements`` are pip's; ``worker`` what starts twelve slots, from the environment's own programs."""

    name: str
    requirements: tuple[str, ...]
    worker: tuple[str, ...]

    @property
    def app(self) -> str:
        return f"{self.name}_app"


PEERS = (
    Peer("dramatiq", ("dramatiq==2.2.1", "redis==8.1.0"),
         ("dramatiq", "dramatiq_app", "--processes", "2", "--threads", "6")),
    Peer("taskiq", ("taskiq-redis==1.2.4", "taskiq==0.13.0", "redis==8.1.0"),
         ("taskiq", "worker", "taskiq_app:broker", "--workers", "1", "--max-async-tasks", "12")),
    Peer("arq", ("arq==0.28.0", "redis==5.3.1"), ("arq", "arq_app.WorkerSettings")),
    Peer("celery", ("celery==5.7.0", "redis==8.1.0", "packaging==26.3"),
         ("celery", "-A", "celery_app", "worker", "-P", "threads", "-c", "12", "--without-gossip", "--without-mingle",
          "--without-heartbeat", "-l", "WARNING")),
)  # fmt: skip


def missing() -> str:
    """Why no peer can run here; empty when they can."""
    if shutil.which("redis-server") is None:
        return "no redis-server: `apt-get install redis-server` (Debian's package; it need not run as a service)"
    return ""


def environment(cache: Path, peer: Peer) -> Path:
    """Its virtual environment, made if need be. Raises SystemExit with pip's last words."""
    place = cache / "bench" / "peers" / peer.name
    stamp = place / ".made"
    wanted = "\n".join(peer.requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return place
    print(f"  building {place} ({', '.join(peer.requirements)})", file=sys.stderr, flush=True)
    venv.create(place, with_pip=True, clear=True)
    done = subprocess.run(
        [place / "bin/pip", "install", "-q", "--disable-pip-version-check", *peer.requirements],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"bench: {peer.name} cannot be installed: {done.stderr.strip()[-400:]}")
    stamp.write_text(wanted)
    return place


def session(number: int) -> dict[int, float]:
    """The living processes of a session, and the seconds of processor time of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if number and int(fields[3]) == number:
            found[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / TICK
    return found


class Running:
    """A peer with its Redis and its workers up."""

    def __init__(self, peer: Peer, place: Path, folder: Path, sync: Sync) -> None:
        self.peer, self.place = peer, place
        folder.mkdir(parents=True)
        port = free_port()
        self.env = {"BENCH_REDIS": f"redis://127.0.0.1:{port}/0", "PYTHONPATH": str(HERE)}
        self.env["PYTHONDONTWRITEBYTECODE"] = "1"
        redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
                 "--appendonly", "yes", "--appendfsync", sync, "--save", ""]  # fmt: skip
        self.store = Part("redis", lambda: redis, folder / "redis.log", inside=[], env={})
        words = [str(place / "bin" / peer.worker[0]), *peer.worker[1:]]
        self.workers = Part(peer.name, lambda: words, folder / "worker.log", inside=[], env=self.env)

    def up(self) -> None:
        self.store.start()
        wait_for(lambda: "Ready to accept connections" in self.store.log.read_text(), "redis-server does not answer")
        self.workers.start()
        self.drive("idle", "5")  # its workers answer

    def down(self) -> None:
        """At once, its children too: there is nothing to be kept, and some take a minute over SIGTERM."""
        for pid in [*session(self.workers.pid), *session(self.store.pid)]:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        for part in (self.workers, self.store):
            part.reap()

    def drive(self, *words: str) -> dict[str, Any]:
        """Raises SystemExit with what it said."""
        done = subprocess.run(
            [self.place / "bin/python", HERE / "drive.py", self.peer.app, *words],
            env={**os.environ, **self.env}, capture_output=True, text=True, check=False, timeout=DRIVE_WITHIN,
        )  # fmt: skip
        if done.returncode != 0:
            log = self.workers.log.read_text()[-600:] if self.workers.log.exists() else ""
            raise SystemExit(f"bench: {self.peer.name} {' '.join(words)}: {done.stderr.strip()[-600:]}\n{log}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def cpu(self) -> float:
        return sum([*session(self.workers.pid).values(), *session(self.store.pid).values()])

    def measure(self, count: int, single: int, seconds: float) -> dict[str, float | None]:
        """One round: a bulk, single jobs, and a load of four fifths of the bulk's rate."""
        self.drive("bulk", str(max(50, count // 10)))
        before = self.cpu()
        bulk = self.drive("bulk", str(count))
        used = 1e6 * (self.cpu() - before) / count
        rate = count / bulk["seconds"]
        idle = self.drive("idle", str(single))
        load = self.drive("loaded", str(0.8 * rate), str(seconds))
        start, result = spread(idle["start"]), spread(idle["result"])
        start80 = spread(load["start"]) if load["start"] else {"p50": None, "p99": None}
        return {
            "rate": rate, "start_p50": start["p50"], "start_p99": start["p99"], "p50": result["p50"],
            "p99": result["p99"], "start80_p50": start80["p50"], "start80_p99": start80["p99"],
            "load": load["rate"], "cpu": used,
        }  # fmt: skip


@contextmanager
def running(peer: Peer, cache: Path, folder: Path, sync: Sync) -> Iterator[Running]:
    made = Running(peer, environment(cache, peer), folder, sync)
    try:
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(folder)
