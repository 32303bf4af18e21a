# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One pass of the keeper: read the settings anew, set what differs, and tell what was found.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _irq_apply, _nic_apply, _steer_config
from ._atomic import write_atomic
from ._earlier import EarlierStateError
from ._irq_plan import IrqWish
from ._nic import NicError, Nics
from ._nic_plan import NicWish
from ._root import Root
from ._systemd import CommandError

STATE = "/run/organism/steer.json"
COLLECTOR = "/var/lib/prometheus/node-exporter"
METRICS = f"{COLLECTOR}/organism_steer.prom"
FORMAT = 1
CAUSES = ("start", "event", "drift", "once")


@dataclass
class Found:
    """``changes``: what this pass set, one line each. ``problems``: what keeps it from being right."""

    changes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    interrupts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    unsupported: list[dict[str, str]] = field(default_factory=list)
    drift_check: int = _steer_config.DRIFT_CHECK


@dataclass
class Tally:
    """What adds up over a keeper's life."""

    passes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    changes: int = 0
    drifts: int = 0
    """Changes that no event had announced."""
    last_change: float = 0

    def add(self, cause: str, found: Found, now: float) -> None:
        self.passes[cause] += 1
        self.changes += len(found.changes)
        if found.changes:
            self.last_change = now
            if cause == "drift":
                self.drifts += len(found.changes)


def nic_wishes(section: Mapping[str, Any]) -> dict[str, NicWish]:
    """The wishes of the section ``nic``, by name. Raises SteerConfigError."""
    try:
        return {str(name): NicWish.from_dict(raw) for name, raw in section.get("wishes", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _steer_config.SteerConfigError(
            f"{_steer_config.PATH}: section nic: {error!r}; run level 3 again"
        ) from error


def irq_wish(section: Mapping[str, Any]) -> IrqWish:
    """The wish of the section ``irq``. Raises SteerConfigError."""
    try:
        return IrqWish.from_dict(section["wish"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _steer_config.SteerConfigError(
            f"{_steer_config.PATH}: section irq: {error!r}; run level 3 again"
        ) from error


_Part = Callable[[Root, Nics, Mapping[str, Any], Found], None]


def run(root: Root, nics: Nics) -> Found:
    """Hold what the settings say. What goes wrong is a problem in the result, so that the rest is held all the same."""
    found = Found()
    try:
        with _steer_config.locked(root):
            sections = _steer_config.load(root)
            found.drift_check = _steer_config.seconds_of(sections)
            # channels bring interrupts, so ports come first
            for name, part in (("nic", _nics), ("irq", _interrupts)):
                if name in sections:
                    _guarded(part, root, nics, sections[name], found)
    except (_steer_config.SteerConfigError, OSError) as error:
        found.problems.append(str(error))
    return found


def _guarded(part: _Part, root: Root, nics: Nics, section: Mapping[str, Any], found: Found) -> None:
    try:
        part(root, nics, section, found)
    except (ValueError, NicError, CommandError, EarlierStateError, _irq_apply.SteeringError, OSError) as error:
        found.problems.append(str(error))


def _nics(_root: Root, nics: Nics, section: Mapping[str, Any], found: Found) -> None:
    wishes = nic_wishes(section)
    outcome = _nic_apply.steer(nics, wishes, lenient=wishes)
    found.changes += [str(change) for change in outcome.difference.changes]
    found.settings = outcome.settings
    found.unsupported = [entry.as_dict() for entry in outcome.unsupported]
    found.problems += [entry.reason for entry in outcome.unsupported if entry.what == "interface"]


def _interrupts(root: Root, _nics: Nics, section: Mapping[str, Any], found: Found) -> None:
    outcome = _irq_apply.steer(root, irq_wish(section), strict=False)
    found.changes += [str(change) for change in outcome.difference.changes]
    found.interrupts, found.rows = outcome.summary, outcome.rows


def state_text(found: Found, tally: Tally, cause: str, events: list[str], now: float) -> str:
    """The keeper's state as JSON; times are seconds since the epoch."""
    return (
        json.dumps(
            {
                "format": FORMAT,
                "checked": round(now, 3),
                "cause": cause,
                "events": events,
                "changes": found.changes,
                "problems": found.problems,
                "interrupts": found.interrupts,
                "irqs": found.rows,
                "settings": found.settings,
                "unsupported": found.unsupported,
                "passes": tally.passes,
                "changes_total": tally.changes,
                "drifts_total": tally.drifts,
                "last_change": round(tally.last_change, 3) or None,
            },
            indent=1,
        )
        + "\n"
    )


def metrics_text(found: Found, tally: Tally, now: float) -> str:
    """Prometheus' text format, for node_exporter's textfile collector."""
    lines = [
        "# HELP organism_steer_interrupts Interrupt vectors by state (managed and fixed ones are the kernel's own).",
        "# TYPE organism_steer_interrupts gauge",
        *(f'organism_steer_interrupts{{state="{state}"}} {count}' for state, count in sorted(found.interrupts.items())),
        "# HELP organism_steer_passes_total Looks at the host, by what caused them.",
        "# TYPE organism_steer_passes_total counter",
        *(f'organism_steer_passes_total{{cause="{cause}"}} {count}' for cause, count in sorted(tally.passes.items())),
        "# HELP organism_steer_changes_total Values that had to be set again.",
        "# TYPE organism_steer_changes_total counter",
        f"organism_steer_changes_total {tally.changes}",
        "# HELP organism_steer_drifts_total Values that had changed without an event.",
        "# TYPE organism_steer_drifts_total counter",
        f"organism_steer_drifts_total {tally.drifts}",
        "# HELP organism_steer_problems What keeps the host from being steered as wished.",
        "# TYPE organism_steer_problems gauge",
        f"organism_steer_problems {len(found.problems)}",
        "# HELP organism_steer_checked_timestamp_seconds When the host was looked at last.",
        "# TYPE organism_steer_checked_timestamp_seconds gauge",
        f"organism_steer_checked_timestamp_seconds {now:.3f}",
    ]
    return "\n".join(lines) + "\n"


def write_state(root: Root, text: str) -> None:
    """Replace the state; it does not need to survive a power cut. Raises OSError."""
    path = root.path(STATE)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    write_atomic(path, text, durable=False)


def write_metrics(root: Root, text: str) -> None:
    """Replace the metrics, where a collector reads them. Raises OSError."""
    if root.exists(COLLECTOR):
        write_atomic(root.path(METRICS), text, durable=False)


def remove_reports(root: Root) -> None:
    """A keeper that has ended knows nothing of now. Raises OSError."""
    for report in (STATE, METRICS):
        root.path(report).unlink(missing_ok=True)
