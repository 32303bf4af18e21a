# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The site's policy: which types of job may run, and who may see and steer everyone's jobs.

Read by the conductor (which refuses at submission) and by each worker (which refuses again before it starts anything,
since a bus message must never become a shell on its own word).

    [jobs]
    types = ["cmd", "noop", "python"]        # "shell" only where the site wants it
    [users]
    operators = ["admin"]

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _bus

if TYPE_CHECKING:
    from ._root import Root

DEFAULT_PATH = "/etc/organism/policy.toml"
SAFE_TYPES = ("cmd", "noop", "python")
"""``python`` may do what ``cmd`` may (which can start an interpreter, too), in the same containment. A site that names
its types gets those alone."""
DEFAULT_OPERATORS = ("admin",)
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,31}")

# section -> key -> pattern of an item; every value is a list of texts
_SECTIONS: dict[str, dict[str, re.Pattern[str]]] = {
    "jobs": {"types": _TYPE},
    "users": {"operators": _bus.IDENTIFIER},
}


class PolicyError(ValueError):
    """A policy that must not be used; ``problems`` has a line each, fit to be printed as it is."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Policy:
    """What a site allows. The default is what holds where no file says more."""

    types: frozenset[str] = field(default=frozenset(SAFE_TYPES))
    operators: frozenset[str] = field(default=frozenset(DEFAULT_OPERATORS))

    def allows(self, job_type: str) -> bool:
        """Whether jobs of this type may run here."""
        return job_type in self.types

    def refusal(self, job_type: str) -> str:
        """Why a type may not run, and what to do about it."""
        allowed = ", ".join(sorted(self.types)) or "none"
        return f"type {job_type} is not allowed by this site's policy (allowed: {allowed}; set in {DEFAULT_PATH})"

    def is_operator(self, user: str) -> bool:
        """Whether a user may see and steer the jobs of everyone, drain GPUs and replay dead letters."""
        return user in self.operators


def parse(text: str, where: str = DEFAULT_PATH) -> Policy:
    """The policy in a TOML text. Raises PolicyError that names every unknown or unfit entry."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError([f"{where}: not TOML: {error}"]) from error
    problems: list[str] = []
    found: dict[str, frozenset[str]] = {}
    for section, content in tree.items():
        known = _SECTIONS.get(section)
        if known is None:
            problems.append(f"{where}: unknown section [{section}]; known are {', '.join(sorted(_SECTIONS))}")
        elif not isinstance(content, dict):
            problems.append(f"{where}: {section} must be a section [{section}], not a value")
        else:
            for key, value in content.items():
                try:
                    found[f"{section}.{key}"] = _items(section, key, value)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
    if problems:
        raise PolicyError(problems)
    default = Policy()
    return Policy(
        types=found.get("jobs.types", default.types), operators=found.get("users.operators", default.operators)
    )


def _items(section: str, key: str, value: Any) -> frozenset[str]:
    pattern = _SECTIONS[section].get(key)
    if pattern is None:
        raise ValueError(f"[{section}] has no key {key}; known are {', '.join(sorted(_SECTIONS[section]))}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"[{section}] {key} must be a list of texts, not {value!r}")
    for item in value:
        if not pattern.fullmatch(item):
            raise ValueError(f"[{section}] {key}: {item!r} does not match {pattern.pattern}")
    return frozenset(value)


def load(root: Root, path: str = DEFAULT_PATH) -> Policy:
    """The policy of a file, or the safe defaults where there is none. Raises PolicyError or OSError."""
    if not root.exists(path):
        return Policy()
    return parse(root.read(path), path)
