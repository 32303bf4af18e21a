# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a GPU's cache has, so that the conductor can send jobs where their inputs are.

Told are the entries at its top and one level below (that is where data sets and models stand), and those inputs of
earlier jobs that lie deeper, as long as they are there.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

MOST = 256
"""Paths that are told: they travel with each reading of the sensors."""
REMEMBERED = 256
"""Inputs of earlier jobs that are looked for."""
OWN = frozenset({"tasks", "jobs", "lost+found"})
"""Entries of a cache that are nobody's inputs."""


class Warm:
    """The paths of one cache; ``look`` reads directories and may be called from a thread."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._inputs: OrderedDict[str, None] = OrderedDict()

    def wanted(self, inputs: Iterable[str]) -> None:
        """A job that reads these runs here."""
        for path in inputs:
            self._inputs[path.strip("/")] = None
            self._inputs.move_to_end(path.strip("/"))
        while len(self._inputs) > REMEMBERED:
            self._inputs.popitem(last=False)

    def look(self) -> list[str]:
        """What is there now: asked-for inputs first, then by name."""
        found = [path for path in reversed(list(self._inputs)) if (self._cache / path).exists()]
        for top in _names(self._cache):
            if top in OWN or top.startswith("."):
                continue
            found.append(top)
            if len(found) >= MOST:
                break
            if (self._cache / top).is_dir():
                found += [f"{top}/{name}" for name in _names(self._cache / top)[: MOST - len(found)]]
        return list(dict.fromkeys(found))[:MOST]


def _names(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries)
    except OSError:
        return []  # not there, or a job has closed it: then nothing in it is to be had
