# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure part of the jobs benchmark: percentiles, medians of rounds, goals, and the table that is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "maestro"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of all are not above (nearest rank). Raises ValueError."""
    if not values:
        raise ValueError("no value to take a percentile of")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the greatest, in milliseconds."""
    return {
        "p50": 1e3 * percentile(seconds, 0.5),
        "p99": 1e3 * percentile(seconds, 0.99),
        "max": 1e3 * max(seconds),
        "count": len(seconds),
    }


def middle(rounds: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Key by key the median of those rounds that have it."""
    found: dict[str, list[float]] = {}
    for one in rounds:
        for key, value in one.items():
            found.setdefault(key, [])
            if value is not None:
                found[key].append(value)
    return {key: statistics.median(values) if values else None for key, values in found.items()}


def text_of(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    digits: int = 1


def table(rows: Mapping[str, Mapping[str, float | None]], columns: Sequence[Column], first: str = "") -> str:
    """Rows by name, numbers right-aligned, ``-`` for what was not measured."""
    cells = [[name, *(text_of(row.get(column.key), column.digits) for column in columns)] for name, row in rows.items()]
    head = [first, *(column.title for column in columns)]
    widths = [max(len(line[place]) for line in [head, *cells]) for place in range(len(head))]
    told = (
        line[0].ljust(widths[0]) + "".join(f"  {text.rjust(widths[i])}" for i, text in enumerate(line) if i)
        for line in [head, *cells]
    )
    return "\n".join(text.rstrip() for text in told)


def ratios(rows: Mapping[str, Mapping[str, float | None]], key: str, to: str = OURS) -> dict[str, float]:
    """Ours divided by each other row's."""
    ours = rows.get(to, {}).get(key)
    if ours is None:
        return {}
    return {name: ours / value for name, row in rows.items() if name != to and (value := row.get(key))}


@dataclass(frozen=True)
class Goal:
    """``most``: the value is not to be above the mark; else not below."""

    name: str
    value: float | None
    mark: float
    most: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.mark if self.most else self.value >= self.mark

    def told(self) -> str:
        verdict = {None: "not measured", True: "met", False: "MISSED"}[self.met]
        return f"{self.name}: {text_of(self.value, 2)} (goal {'<=' if self.most else '>='} {self.mark:,g}): {verdict}"

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "mark": self.mark, "most": self.most, "met": self.met}
