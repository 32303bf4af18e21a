# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One object that feeds ``changed``, ``--diff`` and the message of a module or a command.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

ABSENT = None


@dataclass(frozen=True)
class Change:
    """One named thing that differs: ``before`` or ``after`` is None where it does not exist."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.before is ABSENT:
            return f"create {self.name}"
        if self.after is ABSENT:
            return f"remove {self.name}"
        return f"change {self.name}: {_short(self.before)} -> {_short(self.after)}"


@dataclass
class Difference:
    """What has to change to get from the present to the wanted state."""

    changes: list[Change] = field(default_factory=list)

    def add(self, name: str, before: Any, after: Any) -> None:
        """Record a difference; equal values are none."""
        if before != after:
            self.changes.append(Change(name, before, after))

    def merge(self, other: Difference) -> None:
        self.changes.extend(other.changes)

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def changed(self) -> bool:
        return bool(self.changes)

    @property
    def message(self) -> str:
        """One line for people."""
        return "; ".join(str(change) for change in self.changes) if self.changes else "nothing to change"

    def as_diff(self, header: str = "") -> dict[str, str]:
        """Ansible's ``diff`` return value."""
        return {
            "before_header": header,
            "after_header": header,
            "before": _render({c.name: c.before for c in self.changes if c.before is not ABSENT}),
            "after": _render({c.name: c.after for c in self.changes if c.after is not ABSENT}),
        }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _render(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n" if values else ""
