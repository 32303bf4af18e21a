# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A history on disk: one JSON object a line, flushed at once, so that a killed writer leaves whole lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Notebook:
    """Append-only. ``at`` is the machine's monotonic clock, the same for all processes of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def note(self, what: str, **fields: Any) -> None:
        line = json.dumps({"what": what, "at": round(time.monotonic(), 3), **fields}, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")  # one write: lines of two processes never mix

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines in order; a last line that was cut off is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
