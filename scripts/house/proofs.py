# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verbs chaos and bench: which program stands behind each suite, and how its words are given to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .places import Places

# A suite is a module below tests/ with a __main__ that takes options; add one here and it is a word of ./run.
CHAOS: Mapping[str, str] = {"jobs": "chaos.jobs", "guard": "chaos.guard", "ram": "chaos.ram"}
BENCH: Mapping[str, str] = {"ram": "bench.ram", "site": "bench.site", "jobs": "bench.jobs"}


class BadWords(Exception):
    """The words after the verb name no suite, or are no KEY=value."""


@dataclass(frozen=True)
class Program:
    """What to run: Python's words, and what is importable beside the environment's own."""

    words: tuple[str, ...]
    path: str


def chaos(places: Places, words: list[str]) -> Program:
    """``SUITE=jobs SEED=1 MINUTES=5``: every KEY=value but SUITE becomes ``--key value``. Raises BadWords."""
    pairs = [word.partition("=") for word in words]
    if any(not (key.isalpha() and equals and value) for key, equals, value in pairs):
        raise BadWords("chaos takes words like SUITE=jobs SEED=1 MINUTES=5")
    given = {key.lower(): value for key, _equals, value in pairs}
    suite = given.pop("suite", "")
    if suite not in CHAOS:
        raise BadWords(f"chaos wants SUITE= with one of: {', '.join(CHAOS)}")
    return _program(places, CHAOS[suite], [word for key, value in given.items() for word in (f"--{key}", value)])


def bench(places: Places, words: list[str]) -> Program:
    """``ram [its options]``; without a word, ram. Raises BadWords."""
    suite, *rest = words if words and not words[0].startswith("-") else ["ram", *words]
    if suite not in BENCH:
        raise BadWords(f"bench wants one of: {', '.join(BENCH)}")
    return _program(places, BENCH[suite], rest)


def _program(places: Places, module: str, options: list[str]) -> Program:
    return Program(("-m", module, *options), str(places.repo / "tests"))
