# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What has to be done to get from the streams that exist to those that are declared. Pure.

PRIVATE to the organism.proxmox collection.

Only declared keys are compared: the server adds many of its own, which differ by version. What the server cannot
change in place is refused with the reason, never deleted and made anew: that would destroy jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._bus import Topology
from ._difference import ABSENT, Difference

IMMUTABLE_STREAM = frozenset({"name", "storage", "retention", "persist_mode", "deny_delete", "deny_purge"})
"""nats-server refuses to change these (stream.go, ``configUpdateCheck``); ``deny_*`` can be set but not unset."""

# what the server means when it leaves a key out
_DEFAULTS: Mapping[str, Any] = {"persist_mode": "default"}


@dataclass(frozen=True)
class Step:
    """One request: ``verb`` is create, update or delete."""

    verb: str
    stream: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The request's name below ``$JS.API.``."""
        return f"STREAM.{self.verb.upper()}.{self.stream}"

    @property
    def body(self) -> dict[str, Any]:
        return {} if self.verb == "delete" else dict(self.config)


@dataclass
class Plan:
    """``steps`` in the order in which they work; nothing may be done while ``refusals`` is not empty."""

    difference: Difference = field(default_factory=Difference)
    steps: list[Step] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def plan(current: Topology, wanted: Topology) -> Plan:
    """From ``current`` (whole configurations as the server tells them) to ``wanted``."""
    result = Plan()
    for name, config in wanted.streams.items():
        _stream(result, name, current.streams.get(name), config)
    return result


def plan_absent(current: Topology, wanted: Topology) -> Plan:
    """Remove the declared streams, with all jobs, results and consumers in them; foreign streams stay."""
    result = Plan()
    for name in reversed(wanted.streams):
        if name in current.streams:
            result.steps.append(Step("delete", name))
            result.difference.add(f"stream {name}", declared(current.streams[name], wanted.streams[name]), ABSENT)
    return result


def declared(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The present values of the keys that are declared."""
    return {key: _value(present, key) for key in wanted}


def _value(present: Mapping[str, Any], key: str) -> Any:
    return present.get(key, _DEFAULTS.get(key))


def _same(present: Any, wanted: Any) -> bool:
    # the server leaves out what is false, zero or empty
    if not present and not wanted:
        return True
    if isinstance(present, list) and isinstance(wanted, list):
        return sorted(present) == sorted(wanted)
    return bool(present == wanted)


def _stream(result: Plan, name: str, present: Mapping[str, Any] | None, wanted: dict[str, Any]) -> None:
    if present is None:
        result.steps.append(Step("create", name, wanted))
        result.difference.add(f"stream {name}", ABSENT, wanted)
        return
    differing = _compare(result, f"stream {name}", present, wanted)
    if differing:
        # the request replaces the whole configuration: keys that are not ours keep their values
        result.steps.append(Step("update", name, {**present, **wanted}))


def _compare(result: Plan, label: str, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    differing = [key for key in wanted if not _same(_value(present, key), wanted[key])]
    for key in differing:
        before, after = _value(present, key), wanted[key]
        if key in IMMUTABLE_STREAM:
            result.refusals.append(
                f"{label}: {key} is {before!r} and cannot become {after!r} in place. Let the queue run empty, stop "
                f"the conductor and the workers, remove the bus (state absent with purge) and apply it again"
            )
        result.difference.add(f"{label}: {key}", before, after)
    return bool(differing)
