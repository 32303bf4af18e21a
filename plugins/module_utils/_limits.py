# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each user may have of the pool: the limits file, TOML, with defaults, groups and users.

    [defaults]
    max_queued = 1000            # unfinished jobs
    max_running = 4              # jobs that run at the same time
    max_gpu_seconds = 86400      # sum of the time limits of a user's running jobs
    min_priority = -100
    max_priority = 10
    types = ["cmd", "noop"]      # within what the site's policy allows
    [groups.research]
    users = ["alice", "bob"]
    max_running = 8
    [users.alice]
    max_running = "unlimited"

A key of the user counts before that of the group, and this before the default; what none of them names is unlimited.
The file is read when the conductor starts; no file means no limits. A user is the name that the bus ties to a key.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _bus

if TYPE_CHECKING:
    from ._root import Root

DEFAULT_PATH = "/etc/organism/limits.toml"
UNLIMITED = "unlimited"
COUNTS = ("max_queued", "max_running", "max_gpu_seconds")
PRIORITIES = ("min_priority", "max_priority")
KEYS = (*COUNTS, *PRIORITIES, "types")
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,31}")


class LimitsError(ValueError):
    """A limits file that must not be used; ``problems`` has a line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Limit:
    """What one user may have; None is unlimited. ``rules``: key to the place in the file that set it."""

    max_queued: float | None = None
    max_running: float | None = None
    max_gpu_seconds: float | None = None
    min_priority: int | None = None
    max_priority: int | None = None
    types: frozenset[str] | None = None
    rules: Mapping[str, str] = field(default_factory=dict)

    def rule(self, key: str) -> str:
        """The rule as a refusal names it."""
        value = getattr(self, key)
        shown = ", ".join(sorted(value)) if isinstance(value, frozenset) else f"{value:g}"
        return f"{self.rules.get(key, key)} is {shown}"

    def refusal(self, job_type: str, priority: int, queued: int, timeout: float) -> str:
        """Why a job of this user is not taken, given how many unfinished ones there are; empty when it is."""
        if self.types is not None and job_type not in self.types:
            return f"type {job_type} is not among this user's types ({self.rule('types')})"
        if self.min_priority is not None and priority < self.min_priority:
            return f"priority {priority} is below this user's range ({self.rule('min_priority')})"
        if self.max_priority is not None and priority > self.max_priority:
            return f"priority {priority} is above this user's range ({self.rule('max_priority')})"
        if self.max_queued is not None and queued >= self.max_queued:
            return f"this user has {queued} unfinished jobs ({self.rule('max_queued')}); submit again later"
        if self.max_gpu_seconds is not None and timeout > self.max_gpu_seconds:
            return f"its time limit of {timeout:g} s could never be granted ({self.rule('max_gpu_seconds')})"
        return ""

    def hindrance(self, running: int, seconds: float) -> str:
        """Why none of this user's jobs may start now; ``seconds``: sum of the time limits of the running ones."""
        if self.max_running is not None and running >= self.max_running:
            return f"the user has {running} running jobs ({self.rule('max_running')})"
        if self.max_gpu_seconds is not None and seconds >= self.max_gpu_seconds:
            return f"the user's running jobs may take {seconds:g} GPU seconds ({self.rule('max_gpu_seconds')})"
        return ""


@dataclass(frozen=True)
class Limits:
    """A whole file."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    members: Mapping[str, str] = field(default_factory=dict)
    """User to group."""
    users: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, user: str) -> Limit:
        """What a user may have."""
        values: dict[str, Any] = {}
        rules: dict[str, str] = {}
        group = self.members.get(user)
        layers: list[tuple[str, Mapping[str, Any]]] = [("defaults", self.defaults)]
        if group is not None:
            layers.append((f"groups.{group}", self.groups[group]))
        layers.append((f"users.{user}", self.users.get(user, {})))
        for place, layer in layers:
            for key, value in layer.items():
                values[key] = None if value == UNLIMITED else value
                rules[key] = f"{place}.{key}"
        return Limit(**values, rules=rules)


def parse(text: str, where: str = DEFAULT_PATH) -> Limits:
    """The limits in a TOML text. Raises LimitsError that names every unknown or unfit entry."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LimitsError([f"{where}: not TOML: {error}"]) from error
    problems = [
        f"{where}: unknown section [{name}]; known are defaults, groups, users"
        for name in tree
        if name not in ("defaults", "groups", "users")
    ]
    defaults = _layer(tree.get("defaults", {}), "defaults", problems)
    groups: dict[str, Mapping[str, Any]] = {}
    members: dict[str, str] = {}
    for name, content in _tables(tree, "groups", problems):
        listed = content.pop("users", None) if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(_bus.is_identifier(one) for one in listed if isinstance(one, str)):
            problems.append(f"groups.{name} needs users, a list of names")
            listed = []
        for user in listed:
            if user in members:
                problems.append(f"groups.{name}: {user} is in group {members[user]} already")
            members[user] = name
        groups[name] = _layer(content, f"groups.{name}", problems)
    users = {name: _layer(content, f"users.{name}", problems) for name, content in _tables(tree, "users", problems)}
    found = Limits(defaults, groups, members, users)
    if not problems:
        for user in {*users, *members}:
            limit = found.of(user)
            low, high = limit.min_priority, limit.max_priority
            if low is not None and high is not None and low > high:
                problems.append(f"{user}: {limit.rule('min_priority')}, above {limit.rule('max_priority')}")
    if problems:
        raise LimitsError([one if one.startswith(where) else f"{where}: {one}" for one in problems])
    return found


def _tables(tree: dict[str, Any], section: str, problems: list[str]) -> list[tuple[str, Any]]:
    content = tree.get(section, {})
    if not isinstance(content, dict):
        problems.append(f"[{section}] must hold tables, as in [{section}.NAME]")
        return []
    unfit = [name for name in content if not _bus.is_identifier(name)]
    problems.extend(f"{section}.{name}: a name matches {_bus.IDENTIFIER.pattern}" for name in unfit)
    return list(content.items())


def _layer(content: Any, place: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        problems.append(f"[{place}] must be a table")
        return {}
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in KEYS:
            problems.append(f"{place} has no key {key}; known are {', '.join(KEYS)}")
        elif value == UNLIMITED:
            found[key] = value
        elif key == "types":
            if isinstance(value, list) and all(isinstance(one, str) and _TYPE.fullmatch(one) for one in value):
                found[key] = frozenset(value)
            else:
                problems.append(f"{place}.types must be a list of job types, not {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float if key == "max_gpu_seconds" else int):
            problems.append(f'{place}.{key} must be a number or "{UNLIMITED}", not {value!r}')
        elif (key in COUNTS and value < 0) or (key in PRIORITIES and not -100 <= value <= 100):
            problems.append(
                f"{place}.{key}: {value} is out of range ({'0 and up' if key in COUNTS else '-100 to 100'})"
            )
        else:
            found[key] = value
    return found


def load(root: Root, path: str = DEFAULT_PATH) -> Limits:
    """The limits of a file, or none where there is no file. Raises LimitsError or OSError."""
    if not root.exists(path):
        return Limits()
    return parse(root.read(path), path)
