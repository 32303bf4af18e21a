# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Latency of a host's CPUs and disk: what cyclictest and fio say, made comparable with a stored baseline.

cyclictest (rt-tests) writes a histogram of wake-up latencies in microseconds with ``--json``; fio writes JSON with
completion latencies in nanoseconds. Of several rounds the median of each figure counts: one round on a busy machine
proves nothing.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
RESULTS = "/var/lib/organism/bench"
BASELINE = "baseline.json"
PATTERNS = ("randread", "randwrite")


class BenchError(Exception):
    """A tool's output could not be read, or a stored result is none."""


@dataclass(frozen=True)
class Metric:
    """One figure. ``unit``: us or iops; ``better``: lower or higher; ``samples``: one a round; ``value``: median."""

    value: float
    unit: str
    better: str
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Regression:
    name: str
    value: float
    baseline: float
    unit: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name} is {self.value:g} {self.unit}, the baseline {self.baseline:g}, allowed {self.limit:g}"


def percentile(histogram: Mapping[int, int], share: float) -> int:
    """The smallest latency that ``share`` (0 to 1) of the samples do not exceed. Raises BenchError without samples."""
    total = sum(histogram.values())
    if total == 0:
        raise BenchError("cyclictest measured no cycle")
    seen = 0
    for latency in sorted(histogram):
        seen += histogram[latency]
        if seen >= share * total:
            return latency
    return max(histogram)


def parse_cyclictest(text: str) -> dict[str, float]:
    """p50, p99 and max in microseconds over all threads of one run of ``cyclictest --json``. Raises BenchError.

    Cycles above the histogram's end count with the thread's own ``max``, so that the tail is never lost.
    """
    try:
        threads = list(json.loads(text)["thread"].values())
        merged: dict[int, int] = {}
        for thread in threads:
            histogram = {int(latency): int(count) for latency, count in thread["histogram"].items()}
            above = int(thread["cycles"]) - sum(histogram.values())
            if above > 0:
                histogram[int(thread["max"])] = histogram.get(int(thread["max"]), 0) + above
            for latency, count in histogram.items():
                merged[latency] = merged.get(latency, 0) + count
        worst = max(float(thread["max"]) for thread in threads)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"cannot read what cyclictest wrote: {error!r}") from error
    return {"p50": percentile(merged, 0.5), "p99": percentile(merged, 0.99), "max": worst}


def parse_fio(text: str) -> dict[str, dict[str, float]]:
    """By direction with I/O (read, write): iops, and p50, p99, max completion latency in microseconds."""
    start = text.find("{")  # fio may print notes before its JSON
    try:
        jobs = json.loads(text[start:])["jobs"]
        found: dict[str, dict[str, float]] = {}
        for job in jobs:
            if job["error"]:
                raise BenchError(f"fio job {job['jobname']} ended with error {job['error']}")
            for direction in ("read", "write"):
                part = job[direction]
                if not part["total_ios"]:
                    continue
                latency = part["clat_ns"]
                found[direction] = {
                    "iops": float(part["iops"]),
                    "p50": latency["percentile"]["50.000000"] / 1000,
                    "p99": latency["percentile"]["99.000000"] / 1000,
                    "max": latency["max"] / 1000,
                }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"cannot read what fio wrote: {error!r}") from error
    if not found:
        raise BenchError("fio did no I/O")
    return found


def metric(samples: Sequence[float], unit: str) -> Metric:
    better = "higher" if unit == "iops" else "lower"
    return Metric(round(statistics.median(samples), 3), unit, better, tuple(round(sample, 3) for sample in samples))


def jitter_metrics(zone: str, rounds: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    return {f"jitter.{zone}.{name}": metric([one[name] for one in rounds], "us") for name in ("p50", "p99", "max")}


def disk_metrics(pattern: str, rounds: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    units = {"iops": "iops", "p50": "us", "p99": "us", "max": "us"}
    return {f"disk.{pattern}.{name}": metric([one[name] for one in rounds], unit) for name, unit in units.items()}


def limit(baseline: Metric, tolerance_percent: float, floor_us: float) -> float:
    """The worst value that still counts as the baseline's: never closer to it than ``floor_us`` for latencies."""
    part = baseline.value * tolerance_percent / 100
    if baseline.better == "higher":
        return round(baseline.value - part, 3)
    return round(baseline.value + max(part, floor_us), 3)


def regressions(
    now: Mapping[str, Metric], baseline: Mapping[str, Metric], tolerance_percent: float, floor_us: float
) -> list[Regression]:
    """Figures that are worse than the baseline allows. Maxima are shown, not judged: a single outlier makes them."""
    found = []
    for name, before in sorted(baseline.items()):
        after = now.get(name)
        if after is None or (name.startswith("disk.") and name.endswith(".max")):
            continue
        worst = limit(before, tolerance_percent, floor_us)
        worse = after.value < worst if before.better == "higher" else after.value > worst
        if worse:
            found.append(Regression(name, after.value, before.value, before.unit, worst))
    return found


def render(metrics: Mapping[str, Metric], *, taken: str, kernel: str, conditions: Mapping[str, Any]) -> str:
    """A result file: figures, when (UTC, ISO 8601), on which kernel, and what they were measured with."""
    document = {
        "format": FORMAT,
        "taken": taken,
        "kernel": kernel,
        "conditions": dict(conditions),
        "metrics": {name: asdict(value) for name, value in sorted(metrics.items())},
    }
    return json.dumps(document, indent=1) + "\n"


def parse(text: str) -> tuple[dict[str, Metric], dict[str, Any]]:
    """(figures, conditions) of a result file. Raises BenchError."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise BenchError(f"format {raw['format']}, and this version reads {FORMAT}")
        metrics = {
            name: Metric(float(one["value"]), one["unit"], one["better"], tuple(one["samples"]))
            for name, one in raw["metrics"].items()
        }
        return metrics, dict(raw["conditions"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"not a result of a bench: {error!r}") from error


def cyclictest_command(cpus: Sequence[int], *, interval_us: int, loops: int, output: str) -> list[str]:
    """One thread a CPU of the zone, and only there: measuring on all CPUs would preempt running vCPUs (priority 90)."""
    cpu_list = ",".join(str(cpu) for cpu in cpus)
    return [
        *("cyclictest", "--mlockall", "--quiet", "--priority=90", f"--threads={len(cpus)}"),
        *(f"--affinity={cpu_list}", f"--interval={interval_us}", "--distance=0", f"--loops={loops}"),
        *("--histogram=400", f"--json={output}"),
    ]


def fio_command(pattern: str, directory: str, *, size: str, seconds: int, jobs: int, depth: int) -> list[str]:
    """Direct I/O through io_uring: with fio's default engine the depth would mean nothing."""
    return [
        *("fio", "--name=organism-bench", f"--directory={directory}", f"--rw={pattern}", "--bs=4k", f"--size={size}"),
        *(f"--iodepth={depth}", f"--numjobs={jobs}", f"--runtime={seconds}", "--time_based", "--direct=1"),
        *("--ioengine=io_uring", "--group_reporting", "--output-format=json", "--unlink=1"),
    ]


def summary(metrics: Mapping[str, Metric], baseline: Mapping[str, Metric]) -> Iterable[str]:
    """A line a figure: now, the baseline, and the change in percent."""
    width = max((len(name) for name in metrics), default=0)
    for name, now in sorted(metrics.items()):
        before = baseline.get(name)
        against = ""
        if before is not None and before.value:
            against = f"  baseline {before.value:g} ({(now.value - before.value) / before.value:+.0%})"
        yield f"{name:<{width}}  {now.value:g} {now.unit}{against}"
