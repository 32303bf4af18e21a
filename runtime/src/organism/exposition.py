# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers for Prometheus: counters, histograms, and the text exposition format (version 0.0.4).

https://prometheus.io/docs/instrumenting/exposition_formats/ and, for names and units, /docs/practices/naming/.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
"""Bounds for what jobs do: from a no-op to a day."""
MILLISECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds in seconds for what the bus does."""


class Sample(NamedTuple):
    """One line; ``suffix`` is appended to the family's name (``_bucket``, ``_sum``, ``_count``)."""

    labels: Mapping[str, str]
    value: float
    suffix: str = ""


@dataclass(frozen=True)
class Family:
    """A metric with its help and its samples; ``kind`` is gauge, counter or histogram."""

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...] = ()


def gauge(name: str, about: str, samples: Iterable[Sample]) -> Family:
    return Family(name, "gauge", about, tuple(samples))


def single(name: str, about: str, value: float | None, labels: Mapping[str, str]) -> Family:
    """A gauge with one sample, or with none when the value is not known: absent, never zero."""
    return Family(name, "gauge", about, () if value is None else (Sample(labels, value),))


@dataclass
class Counter:
    """Counts by the value of one label."""

    name: str
    about: str
    label: str
    counts: Tally[str] = field(default_factory=Tally)

    def family(self, common: Mapping[str, str]) -> Family:
        samples = (Sample({**common, self.label: key}, count) for key, count in sorted(self.counts.items()))
        return Family(self.name, "counter", self.about, tuple(samples))


@dataclass
class _Series:
    counts: list[int]
    total: float = 0.0


@dataclass
class Histogram:
    """Observations by the value of one label, counted in buckets."""

    name: str
    about: str
    label: str
    bounds: tuple[float, ...]
    _series: dict[str, _Series] = field(default_factory=dict)

    def observe(self, key: str, value: float) -> None:
        """``value`` in the unit of the bounds; a negative one (a clock that was set) counts as zero."""
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series([0] * (len(self.bounds) + 1))
        value = max(0.0, value)
        series.counts[bisect_left(self.bounds, value)] += 1
        series.total += value

    def family(self, common: Mapping[str, str]) -> Family:
        return Family(self.name, "histogram", self.about, tuple(self._samples(common)))

    def _samples(self, common: Mapping[str, str]) -> Iterator[Sample]:
        for key, series in sorted(self._series.items()):
            labels = {**common, self.label: key}
            running = 0
            for bound, count in zip((*self.bounds, float("inf")), series.counts, strict=True):
                running += count
                yield Sample({**labels, "le": "+Inf" if bound == float("inf") else f"{bound:g}"}, running, "_bucket")
            yield Sample(labels, series.total, "_sum")
            yield Sample(labels, running, "_count")


def render(families: Iterable[Family]) -> str:
    """The text of a scrape; a family without samples is left out."""
    lines: list[str] = []
    for family in families:
        if family.samples:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
            lines += [
                f"{family.name}{sample.suffix}{_labels(sample.labels)} {float(sample.value)!r}"
                for sample in family.samples
            ]
    return "\n".join(lines) + "\n" if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
