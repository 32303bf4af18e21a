# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers for Prometheus: the format, conductor and worker, and that alerts ask for what is there."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism import exposition
from organism.bus.messages import Device, Heartbeat, JobSpec, Metrics, Report, TaskRef
from organism.core._root import Root
from organism.exposition import Counter as Counting
from organism.exposition import Histogram, Sample, gauge
from organism.maestro import exporter
from organism.maestro.archive import Archive
from organism.maestro.dependencies import Dependencies
from organism.maestro.ledger import Ledger, RunRecord
from organism.maestro.scheduler import Scheduler
from organism.maestro.tally import Tally
from organism.maestro.workers import Fleet
from organism.worker.exporter import Exporter
from organism.worker.state import WorkerState

ALERTS = Path(__file__).resolve().parents[3] / "docs/alerts/maestro.rules.yml"


class Stage:
    """As much of a leading conductor as its metrics look at."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.clock: Any = SimpleNamespace(now=lambda: self.time)
        self.ended = asyncio.Event()
        self.ledger = Ledger()
        self.fleet = Fleet()
        self.scheduler = Scheduler(self.fleet)
        self.dependencies = Dependencies()
        self.archive = Archive()
        self.tally = Tally()
        settings = SimpleNamespace(integer=lambda name: {"MAX_QUEUE": 10000}[name])
        self.site: Any = SimpleNamespace(shard="0", name="a", version="1", settings=settings)

    def job(self, seq: int, **spec: Any) -> Any:
        return self.ledger.submitted(seq, "alice", JobSpec(**{"cmd": ["true"], **spec}), b"{}", 900.0 + seq)

    def text(self) -> str:
        conductor: Any = self
        return exposition.render(asyncio.run(exporter.families(conductor, self.site)))

    def values(self) -> dict[str, float]:
        lines = [line for line in self.text().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def gpu(stage: Stage, name: str = "gpu0") -> None:
    device = Device(backend="simulated", address="sim:0", vram_mb=8192)
    beat = Heartbeat(ts="", gpu_id=name, incarnation="i", host="h", pid=1, version="0", device=device, types=["cmd"])
    stage.fleet.heartbeat(beat, stage.time)


def test_queue_and_gpus_are_told() -> None:
    stage = Stage()
    for seq in range(1, 4):
        stage.job(seq, queue="night" if seq == 3 else "default")
    gpu(stage)
    stage.fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="simulated", gpu_busy_percent=50, temp_c=61), 1000.0)
    stage.scheduler.paused.add("night")
    stage.time = 1004.0
    values = stage.values()
    assert values['organism_maestro_jobs{shard="0",state="enqueued"}'] == 3
    assert values['organism_maestro_queue_depth{shard="0",queue="default",type="cmd"}'] == 2
    assert values['organism_maestro_queue_depth{shard="0",queue="night",type="cmd"}'] == 1
    assert values['organism_maestro_oldest_waiting_seconds{shard="0"}'] == 1004 - 901
    assert values['organism_maestro_gpu_heartbeat_age_seconds{shard="0",gpu="gpu0"}'] == 4
    assert values['organism_maestro_gpu_utilisation_ratio{shard="0",gpu="gpu0"}'] == 0.5
    assert values['organism_maestro_gpu_memory_bytes{shard="0",gpu="gpu0"}'] == 8 * 1024**3
    assert 'organism_maestro_gpu_power_watts{shard="0",gpu="gpu0"}' not in values  # not told, so not zero
    stage.time = 1100.0
    assert 'organism_maestro_gpu_utilisation_ratio{shard="0",gpu="gpu0"}' not in stage.values()  # too old to be true


def test_users_cannot_make_endless_series() -> None:
    stage = Stage()
    for seq in range(1, 201):
        stage.job(seq, queue=f"q{seq}")
    depths = [value for name, value in stage.values().items() if name.startswith("organism_maestro_queue_depth")]
    assert len(depths) == exporter.CLASSES + 1
    assert sum(depths) == 200


def test_a_standby_says_only_that_it_is_one() -> None:
    stage = Stage()
    stage.ended.set()
    assert list(stage.values().values()) == [0.0]


def test_waits_runs_and_retries_are_counted() -> None:
    stage = Stage()
    job = stage.job(1)
    record = RunRecord(ts="", task_id=job.task_id, attempt=1, gpu="gpu0", incarnation="i", enq_seq=1)
    stage.ledger.dispatched(record, 7, 910.0)
    stage.tally.dispatched(job, job.submitted, 908.0, 908.003)
    stage.tally.held(job, None)
    stage.tally.held(job, 42.0)
    stage.tally.retries.counts["exit"] += 1
    values = stage.values()
    assert values['organism_maestro_wait_seconds_sum{shard="0",type="cmd"}'] == 7
    assert values['organism_maestro_dispatch_seconds_bucket{shard="0",type="cmd",le="0.002"}'] == 0
    assert values['organism_maestro_dispatch_seconds_bucket{shard="0",type="cmd",le="0.004"}'] == 1
    assert values['organism_maestro_run_seconds_bucket{shard="0",type="cmd",le="60"}'] == 1
    assert values['organism_maestro_run_seconds_count{shard="0",type="cmd"}'] == 1
    assert values['organism_maestro_retries_total{shard="0",error="exit"}'] == 1


def worker_text(folder: Path) -> tuple[Exporter, str]:
    device = Device(backend="simulated", address="sim:0", model='a "fine" GPU', vram_mb=8192)
    state = WorkerState("gpu0", "h", device, "", "", ["cmd"])
    made = Exporter(Root(), str(folder), state)
    report = Report(ts="", task_id="t", attempt=1, gpu_id="gpu0", incarnation="i", type="cmd", error="timeout")
    made.ended(report, 3.0)
    state.unreported.add(TaskRef("t", 1))
    metrics = Metrics(ts="", gpu_id="gpu0", backend="simulated", temp_c=55.5)
    assert made.write(metrics, 1234.5)
    return made, Path(made.path).read_text(encoding="utf-8")


def test_a_worker_leaves_its_file_and_takes_it_away(tmp_path: Path) -> None:
    made, text = worker_text(tmp_path)
    assert 'organism_gpu_worker_jobs_total{gpu="gpu0",outcome="timeout"} 1.0' in text
    assert 'organism_gpu_worker_last_heartbeat_timestamp_seconds{gpu="gpu0"} 1234.5' in text
    assert 'model="a \\"fine\\" GPU"' in text
    assert "organism_gpu_worker_gpu_power_watts" not in text
    made.withdraw()
    assert list(tmp_path.iterdir()) == []
    made._folder = str(tmp_path / "nobody-collects")
    assert not made.write(None, None)


def test_a_folder_that_takes_nothing_costs_only_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = worker_text(tmp_path)
    Path(made.path).unlink()
    Path(made.path).mkdir()  # the file cannot be put over a directory
    assert not made.write(None, None)
    assert "the metrics cannot be written" in caplog.text


def test_alerts_are_about_metrics_that_exist(tmp_path: Path) -> None:
    stage = Stage()
    gpu(stage)
    stage.fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="s", gpu_busy_percent=1, temp_c=1), stage.time)
    job = stage.job(1)
    stage.tally.dispatched(job, 0.0, 1.0, 1.0)
    job.attempt = 1
    stage.tally.dispatched(job, 0.0, 1.0, 1.0)
    stage.tally.held(job, 1.0)
    stage.tally.retries.counts["exit"] += 1
    stage.tally.complaints.counts["queue_full"] += 1
    known = set(re.findall(r"^(\w+)\{", stage.text() + worker_text(tmp_path)[1], re.MULTILINE))
    asked = set(re.findall(r"organism_(?:maestro|gpu_worker)_\w+", ALERTS.read_text(encoding="utf-8")))
    assert asked - known == set()


def test_prometheus_reads_it(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    stage = Stage()
    gpu(stage)
    job = stage.job(1)
    stage.tally.held(job, 1.0)
    for text in (stage.text(), worker_text(tmp_path)[1]):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_buckets_are_cumulative_and_complete(seconds: list[float]) -> None:
    histogram = Histogram("x_seconds", "x", "type", exposition.SECONDS)
    for value in seconds:
        histogram.observe("cmd", value)
    samples = histogram.family({}).samples
    buckets = [sample.value for sample in samples if sample.suffix == "_bucket"]
    assert buckets == sorted(buckets)
    for sample in samples:
        if sample.suffix == "_bucket" and sample.labels["le"] != "+Inf":
            assert sample.value == sum(1 for value in seconds if value <= float(sample.labels["le"]))
    counts = Counter({sample.suffix: sample.value for sample in samples})
    assert counts["_count"] == len(seconds)


@given(st.text())
def test_a_label_can_hold_any_text(text: str) -> None:
    rendered = exposition.render([gauge("x", "x", [Sample({"a": text}, 1)]), Counting("y", "y", "b").family({})])
    assert rendered.endswith("} 1.0\n")
    assert "y" not in rendered.splitlines()[0]
    inner = rendered.split('{a="', 1)[1].rsplit('"} ', 1)[0]
    assert re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], inner, flags=re.DOTALL) == text
