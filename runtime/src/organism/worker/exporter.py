# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker's numbers for Prometheus: a file for node_exporter's textfile collector, as the GPU's cache leaves one.

A file and no port, because a host has a worker a GPU, and one collector that reads them all. It carries its own time:
the file of a worker that is gone stays, and what it says is then as old as ``last_heartbeat_timestamp_seconds``.
"""

from __future__ import annotations

import time

from organism import exposition
from organism.bus.messages import Metrics, Report
from organism.core._atomic import write_atomic
from organism.core._root import Root
from organism.exposition import SECONDS, Counter, Family, Histogram, Sample
from organism.worker.bus import Complaint
from organism.worker.state import WorkerState

PREFIX = "organism_gpu_worker"
MIB = 1024.0**2


class Exporter:
    """``folder`` is where node_exporter looks; nothing is written where it does not exist, or when it is empty."""

    def __init__(self, root: Root, folder: str, state: WorkerState) -> None:
        self._root = root
        self._folder = folder
        self._state = state
        self._trouble = Complaint(f"the metrics cannot be written to {self.path}")
        self._jobs = Counter(f"{PREFIX}_jobs_total", "Attempts that ended here, by outcome.", "outcome")
        self._seconds = Histogram(f"{PREFIX}_job_seconds", "How long attempts ran.", "outcome", SECONDS)

    @property
    def path(self) -> str:
        return f"{self._folder}/organism-gpu-worker-{self._state.gpu}.prom"

    def ended(self, report: Report | None, seconds: float) -> None:
        """An attempt is over; None: it was discarded."""
        outcome = "discarded" if report is None else report.error or "done"
        self._jobs.counts[outcome] += 1
        self._seconds.observe(outcome, seconds)

    def text(self, metrics: Metrics | None, heard: float | None) -> str:
        """``metrics``: the sensors' last readings, or None when they cannot be read; ``heard``: Unix time of the
        conductor's last answer to a heartbeat."""
        state = self._state
        common = {"gpu": state.gpu}

        def one(name: str, about: str, value: float | None) -> Family:
            return exposition.single(f"{PREFIX}_{name}", about, value, common)

        def sensor(name: str, scale: float = 1.0) -> float | None:
            value = None if metrics is None else getattr(metrics, name)
            return None if value is None else float(value) * scale

        about = {**common, "backend": state.device.backend, "address": state.device.address}
        families = [
            exposition.gauge(
                f"{PREFIX}_info", "What the worker serves.", [Sample({**about, "model": state.device.model}, 1)]
            ),
            one("running", "1 while a job runs.", int(bool(state.running))),
            one("unreported", "Outcomes that the conductor has not acknowledged yet.", len(state.unreported)),
            one("draining", "1 when it is to take no new job.", int(state.draining or state.stopping)),
            one("stuck", "1 when a process that cannot be killed holds the GPU.", int(bool(state.stuck))),
            one("written_timestamp_seconds", "When this file was written.", time.time()),
            one("last_heartbeat_timestamp_seconds", "When the conductor last answered.", heard),
            one("gpu_utilisation_ratio", "The GPU's load, 0 to 1.", sensor("gpu_busy_percent", 0.01)),
            one("gpu_temperature_celsius", "The GPU's temperature.", sensor("temp_c")),
            one("gpu_power_watts", "The GPU's power.", sensor("power_w")),
            one("gpu_fan_rpm", "The GPU's fan.", sensor("fan_rpm")),
            one("gpu_memory_used_bytes", "The GPU's memory in use.", sensor("vram_used_mb", MIB)),
            one("gpu_memory_bytes", "The GPU's memory.", sensor("vram_total_mb", MIB)),
            self._jobs.family(common),
            self._seconds.family(common),
        ]
        return exposition.render(families)

    def write(self, metrics: Metrics | None, heard: float | None) -> bool:
        """Leave the file. False when nobody collects, or when it cannot be written: a full disk must not cost the pool
        the readings themselves."""
        if not self._folder or not self._root.path(self._folder).is_dir():
            return False
        try:
            write_atomic(self._root.path(self.path), self.text(metrics, heard), durable=False)
        except OSError as error:
            self._trouble.note(error)
            return False
        self._trouble.over()
        return True

    def withdraw(self) -> None:
        """A worker that was told to stop leaves no alert behind. Raises OSError."""
        if self._folder:
            self._root.path(self.path).unlink(missing_ok=True)
