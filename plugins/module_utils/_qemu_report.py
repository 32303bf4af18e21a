# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Telling of pinned VMs: a table for people, metrics for Prometheus, events for the bus.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ._atomic import write_atomic
from ._qemu_pin import Result
from ._root import Root

TEXTFILES = "/var/lib/prometheus/node-exporter"
METRICS = f"{TEXTFILES}/organism_pin.prom"
EVENTS = "/run/organism/events"


@dataclass
class Tally:
    """What a keeper has seen since it started. ``drifts``: corrected threads by VM; ``failures``: by VM."""

    drifts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def count(self, results: Iterable[Result], errors: Mapping[str, str]) -> None:
        for result in results:
            self.drifts.setdefault(result.name, 0)
            self.drifts[result.name] += len(drifted(result))
        for name in errors:
            self.failures[name] = self.failures.get(name, 0) + 1


def drifted(result: Result) -> list[str]:
    """Threads of a VM that had been pinned and were found elsewhere."""
    return [pin.thread.label for pin in result.pins if result.known and pin.before != pin.wanted]


def metrics(results: Sequence[Result], errors: Mapping[str, str], tally: Tally, now: float) -> str:
    """The text of a file for node_exporter's textfile collector. ``now``: Unix time of the check."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Mapping[str, float]) -> None:
        lines.append(f"# HELP {name} {text}")
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{label} {value:g}" for label, value in samples.items())

    running = [result for result in results if result.pid is not None]
    per_vm = {result.name: f'{{vm="{result.name}"}}' for result in results}
    family(
        "organism_pin_threads",
        "gauge",
        "Threads of a running VM that are where they shall be.",
        {per_vm[r.name]: sum(pin.now in (pin.wanted, None) for pin in r.pins) for r in running},
    )
    family(
        "organism_pin_vcpus",
        "gauge",
        "Pinned vCPUs of a running VM.",
        {per_vm[r.name]: len(r.vcpus) for r in running},
    )
    family(
        "organism_pin_drift_threads",
        "gauge",
        "Threads that the last check found elsewhere, and put back.",
        {per_vm[r.name]: len(drifted(r)) for r in running},
    )
    family(
        "organism_pin_drift_total",
        "counter",
        "Threads that were found elsewhere since the keeper started.",
        {f'{{vm="{name}"}}': value for name, value in sorted(tally.drifts.items())},
    )
    family(
        "organism_pin_failures_total",
        "counter",
        "Checks of a VM that failed since the keeper started.",
        {f'{{vm="{name}"}}': value for name, value in sorted(tally.failures.items())},
    )
    family("organism_pin_failing", "gauge", "VMs that the last check could not pin.", {"": len(errors)})
    family("organism_pin_last_check_timestamp_seconds", "gauge", "Unix time of the last check.", {"": int(now)})
    # %g would round a time to six digits
    lines[-1] = f"organism_pin_last_check_timestamp_seconds {int(now)}"
    return "\n".join(lines) + "\n"


def write_metrics(root: Root, text: str) -> bool:
    """Put the metrics where node_exporter looks, if it is there. Raises OSError."""
    if not root.exists(TEXTFILES):
        return False
    write_atomic(root.path(METRICS), text, durable=False)
    return True


def spool_event(root: Root, kind: str, vm: str, text: str, threads: Sequence[str] = ()) -> bool:
    """Leave an event where the bus's agent collects them, if there is such a place. Raises OSError."""
    folder = root.path(EVENTS)
    if not folder.is_dir():
        return False
    now = time.time_ns()
    event = {
        "format": 1,
        "time": now / 1e9,
        "source": "qemu_pin",
        "event": kind,
        "vm": vm,
        "text": text,
        "threads": list(threads),
    }
    write_atomic(folder / f"{now}-qemu_pin.json", json.dumps(event) + "\n", durable=False)
    return True


def table(results: Sequence[Result], errors: Mapping[str, str]) -> list[str]:
    """A line a VM, and one for each thread that is elsewhere."""
    if not results and not errors:
        return ["no VM is to be pinned"]
    lines = [f"{'VM':<12}{'PID':>8}  {'STATE':<10}vCPU:CPU"]
    for result in results:
        wrong = [pin for pin in result.pins if (pin.now or pin.before) != pin.wanted]
        state = "stopped" if result.pid is None else ("drifted" if result.known else "unpinned") if wrong else "pinned"
        pairs = " ".join(f"{index}:{cpu}" for index, cpu in result.vcpus.items())
        lines.append(f"{result.name:<12}{result.pid or '-':>8}  {state:<10}{pairs}")
        lines += [f"  {pin.thread.label}: on {pin.now or pin.before}, shall be on {pin.wanted}" for pin in wrong]
        lines += [f"  {note}" for note in result.notes]
    for name, error in sorted(errors.items()):
        lines.append(f"{name:<12}{'-':>8}  {'error':<10}{error}")
    return lines
