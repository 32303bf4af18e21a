# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conductor's numbers for Prometheus, on a port of localhost (METRICS_PORT): queue, GPUs, times, retries.

A port and no file, because the conductor runs where it can write nowhere. What is asked for is made from memory at that
moment; a standby answers too, with ``organism_maestro_leading 0``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from organism import exposition
from organism.bus.messages import FINAL_STATES
from organism.exposition import Family, Sample, gauge
from organism.maestro.conductor import Conductor
from organism.maestro.site import Site
from organism.maestro.slices import still
from organism.maestro.tally import PREFIX
from organism.maestro.workers import Gpu

log = logging.getLogger(__name__)

CLASSES = 50
"""Classes of waiting jobs that get a line of their own, the largest; users choose the names of queues, and a series for
each of ten thousand would be Prometheus's end. The rest is counted under ``queue="other"``."""
STATES = ("enqueued", "waiting_gpu", "scheduled", "running", "retry")
REQUEST_LIMIT = 8192
"""Bytes of a request's head."""
PATIENCE = 5.0
"""Seconds that a scraper has to say what it wants, and as many to take the answer."""


def together(parts: Iterable[list[Family]]) -> list[Family]:
    """The metrics of several shards: each family once, with the samples of all."""
    found: dict[str, Family] = {}
    for family in (family for part in parts for family in part):
        before = found.get(family.name)
        found[family.name] = replace(family, samples=before.samples + family.samples) if before else family
    return list(found.values())


async def families(conductor: Conductor | None, site: Site) -> list[Family]:
    """All metrics of a shard at about this moment; of a standby only that it is one."""
    common = {"shard": site.shard}
    leads = conductor is not None and not conductor.ended.is_set()
    found = [
        gauge(
            f"{PREFIX}_leading",
            "1 on the conductor that leads the shard.",
            [Sample({**common, "conductor": site.name, "version": site.version}, int(leads))],
        )
    ]
    if conductor is None or not leads:
        return found
    return [*found, *await _queue(conductor, common), *_gpus(conductor, common), *conductor.tally.families(common)]


async def _queue(conductor: Conductor, common: dict[str, str]) -> list[Family]:
    now, paused = conductor.clock.now(), conductor.scheduler.paused
    states: Counter[str] = Counter()
    waiting: Counter[tuple[str, str]] = Counter()
    oldest: float | None = None
    async for job in still(conductor.ledger):
        states[job.state] += 1
        if job.phase == "waiting":
            waiting[job.queue, job.type] += 1
            if job not in conductor.dependencies and job.not_before <= now and job.queue not in paused:
                since = max(job.submitted, job.not_before)
                oldest = since if oldest is None else min(oldest, since)
    shown = dict(waiting.most_common(CLASSES))
    for (_, kind), count in waiting.most_common()[CLASSES:]:
        shown["other", kind] = shown.get(("other", kind), 0) + count
    finished = conductor.archive.counts
    return [
        gauge(
            f"{PREFIX}_jobs",
            "Unfinished jobs by state.",
            [Sample({**common, "state": state}, states[state]) for state in STATES],
        ),
        gauge(
            f"{PREFIX}_queue_depth",
            "Waiting jobs by queue and type; the 50 largest classes, the rest as queue other.",
            [Sample({**common, "queue": queue, "type": kind}, count) for (queue, kind), count in sorted(shown.items())],
        ),
        exposition.single(
            f"{PREFIX}_oldest_waiting_seconds",
            "How long the job that waits longest for a GPU has waited (not for others, not in a paused queue).",
            0.0 if oldest is None else now - oldest,
            common,
        ),
        exposition.single(
            f"{PREFIX}_queue_limit", "Unfinished jobs at most.", conductor.site.settings.integer("MAX_QUEUE"), common
        ),
        gauge(
            f"{PREFIX}_queue_paused",
            "1 for each queue that an operator has paused.",
            [Sample({**common, "queue": name}, 1) for name in sorted(paused)[:CLASSES]],
        ),
        Family(
            f"{PREFIX}_finished_total",
            "counter",
            "Jobs that reached their final state.",
            tuple(Sample({**common, "state": state}, finished[state]) for state in FINAL_STATES),
        ),
    ]


def _gpus(conductor: Conductor, common: dict[str, str]) -> list[Family]:
    now, fleet = conductor.clock.now(), conductor.fleet
    gpus = sorted(fleet.gpus.values(), key=lambda gpu: gpu.id)

    def each(name: str, about: str, value: Callable[[Gpu], float | None]) -> Family:
        values = ((gpu, value(gpu)) for gpu in gpus)
        return gauge(
            f"{PREFIX}_{name}",
            about,
            [Sample({**common, "gpu": gpu.id}, number) for gpu, number in values if number is not None],
        )

    def measured(gpu: Gpu, name: str, scale: float = 1.0) -> float | None:
        """Stale numbers are no numbers: the series ends, as it would with the exporter of a dead machine."""
        value = getattr(gpu.metrics, name) if fleet.fresh(gpu, now) else None
        return None if value is None else float(value) * scale

    return [
        each("gpu_up", "1 while the GPU's worker is heard.", lambda gpu: int(gpu.alive)),
        each(
            "gpu_heartbeat_age_seconds",
            "Time since the last heartbeat of the GPU's worker.",
            lambda gpu: None if gpu.heard is None else now - gpu.heard,
        ),
        each("gpu_busy", "1 while the GPU has a job of this conductor.", lambda gpu: int(gpu.busy)),
        each("gpu_drained", "1 when an operator wants no job there.", lambda gpu: int(gpu.drained)),
        each("gpu_utilisation_ratio", "The GPU's own load, 0 to 1.", lambda g: measured(g, "gpu_busy_percent", 0.01)),
        each("gpu_temperature_celsius", "The GPU's temperature.", lambda gpu: measured(gpu, "temp_c")),
        each("gpu_power_watts", "The GPU's power.", lambda gpu: measured(gpu, "power_w")),
        each("gpu_memory_used_bytes", "The GPU's memory in use.", lambda g: measured(g, "vram_used_mb", 1024.0**2)),
        each("gpu_memory_bytes", "The GPU's memory.", lambda gpu: gpu.vram_mb * 1024.0**2 if gpu.vram_mb else None),
    ]


class MetricsPort:
    """A server that knows one page, ``/metrics``, for HTTP/1.0 and 1.1; each connection is good for one request."""

    def __init__(self, port: int, text: Callable[[], Awaitable[str]]) -> None:
        self.port = port
        self._text = text
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """With port 0 nothing is opened. A port that is taken costs the metrics, not the conductor: the log tells."""
        if not self.port:
            return
        try:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=REQUEST_LIMIT)
        except OSError as problem:
            log.error("no metrics: port %d of 127.0.0.1 cannot be used: %s; set METRICS_PORT", self.port, problem)
            return
        log.info("metrics are on http://127.0.0.1:%d/metrics", self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(await self._answer(head.split(b"\r\n", 1)[0].split(b" ")))
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            log.debug("a question for metrics that was none")
        finally:
            writer.close()

    async def _answer(self, words: list[bytes]) -> bytes:
        method, path = words[0], words[1].split(b"?", 1)[0] if len(words) > 1 else b""
        if method not in (b"GET", b"HEAD"):
            return _page("405 Method Not Allowed", "only GET\n", method)
        if path != b"/metrics":
            return _page("404 Not Found", "metrics are at /metrics\n", method)
        return _page("200 OK", await self._text(), method)


def _page(status: str, text: str, method: bytes) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {exposition.CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == b"HEAD" else body)
