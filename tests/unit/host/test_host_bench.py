# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cyclictest and fio write is read as they mean it, and only real regressions are called so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _host_bench as bench


def cyclictest(**threads: dict[str, object]) -> str:
    return json.dumps({"file_version": 1, "thread": threads})


def thread(histogram: dict[int, int], cycles: int, worst: int) -> dict[str, object]:
    return {"histogram": {str(k): v for k, v in histogram.items()}, "cycles": cycles, "max": worst, "min": 1, "cpu": 0}


def test_the_tail_above_the_histogram_is_never_lost() -> None:
    found = bench.parse_cyclictest(cyclictest(a=thread({5: 90}, 100, 4000)))
    assert found == {"p50": 5, "p99": 4000, "max": 4000}


def test_threads_of_a_zone_are_judged_together() -> None:
    found = bench.parse_cyclictest(cyclictest(a=thread({2: 100}, 100, 2), b=thread({50: 100}, 100, 60)))
    assert found == {"p50": 2, "p99": 50, "max": 60}


@pytest.mark.parametrize("text", ["", "{}", '{"thread": {}}', '{"thread": {"0": {}}}', cyclictest(a=thread({}, 0, 0))])
def test_no_figures_is_an_error_never_a_zero(text: str) -> None:
    with pytest.raises(bench.BenchError):
        bench.parse_cyclictest(text)


@given(st.dictionaries(st.integers(0, 500), st.integers(1, 50), min_size=1), st.floats(0.01, 1))
def test_percentile_is_the_smallest_that_covers_its_share(histogram: dict[int, int], share: float) -> None:
    total = sum(histogram.values())
    found = bench.percentile(histogram, share)
    assert sum(count for value, count in histogram.items() if value <= found) >= share * total
    assert sum(count for value, count in histogram.items() if value < found) < share * total


def fio(error: int = 0, reads: int = 10) -> str:
    latency = {"percentile": {"50.000000": 1000, "99.000000": 90000}, "max": 200000}
    side = {"iops": 5000.5, "total_ios": reads, "clat_ns": latency}
    none = {"iops": 0, "total_ios": 0, "clat_ns": latency}
    job = {"jobname": "b", "error": error, "read": side, "write": none}
    return "fio: a note before the JSON\n" + json.dumps({"jobs": [job]})


def test_fio_is_read_in_microseconds() -> None:
    assert bench.parse_fio(fio()) == {"read": {"iops": 5000.5, "p50": 1.0, "p99": 90.0, "max": 200.0}}


@pytest.mark.parametrize("text", ["", "{}", fio(error=28), fio(reads=0)])
def test_a_failed_fio_is_an_error(text: str) -> None:
    with pytest.raises(bench.BenchError):
        bench.parse_fio(text)


def test_only_what_is_worse_by_more_than_allowed_is_a_regression() -> None:
    before = {
        "jitter.io.p99": bench.metric([10, 10, 10], "us"),
        "jitter.host.p99": bench.metric([1000], "us"),
        "disk.randread.iops": bench.metric([1000], "iops"),
        "disk.randread.max": bench.metric([1], "us"),
    }
    after = {
        "jitter.io.p99": bench.metric([29, 30, 31], "us"),  # three times as much, but by 20 us only
        "jitter.host.p99": bench.metric([1251], "us"),
        "disk.randread.iops": bench.metric([749], "iops"),
        "disk.randread.max": bench.metric([10**6], "us"),
    }
    names = [one.name for one in bench.regressions(after, before, 25, 20)]
    assert names == ["disk.randread.iops", "jitter.host.p99"]
    assert bench.regressions(before, before, 0, 0) == []


def test_a_stored_result_comes_back_as_it_was() -> None:
    metrics = {"jitter.io.p99": bench.metric([3, 1, 2], "us")}
    text = bench.render(metrics, taken="2026-11-22T00:00:00Z", kernel="6.12", conditions={"loops": 5})
    assert bench.parse(text) == (metrics, {"loops": 5})
    assert metrics["jitter.io.p99"].value == 2


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "metrics": {"a": 1}, "conditions": {}}'])
def test_a_file_that_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(bench.BenchError):
        bench.parse(text)


def test_cyclictest_stays_on_the_cpus_of_its_zone() -> None:
    command = bench.cyclictest_command((1, 7), interval_us=200, loops=10, output="/x")
    assert "--affinity=1,7" in command
    assert "--threads=2" in command
    assert "--smp" not in command
