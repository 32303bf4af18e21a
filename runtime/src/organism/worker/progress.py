# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a running job says of its progress, in the file that ``ORGANISM_PROGRESS`` names.

Either a JSON object, ``{"fraction": 0.4, "text": "epoch 4 of 10"}`` (:func:`organism.client.progress` writes it), or
for shells a line such as ``40% epoch 4 of 10`` or ``0.4``. The file is the job's: nothing about it is trusted.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from organism.bus import messages
from organism.bus.messages import PROGRESS_TEXT, Progress, TaskRef

PROGRESS_FILE = "progress"
LIMIT = 4096
"""Bytes that are read."""

_LINE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<percent>%)?(\s+(?P<text>.*))?\Z", re.DOTALL)


def read_progress(path: Path, ref: TaskRef) -> Progress | None:
    """What the file says, or None when there is none or nothing readable in it."""
    try:
        # O_NONBLOCK: a fifo must not stop the worker
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = os.read(descriptor, LIMIT)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return parse(data.decode("utf-8", "replace"), ref)


def parse(text: str, ref: TaskRef) -> Progress | None:
    """None when it says nothing; a half-written JSON object says nothing yet."""
    if not text.strip():
        return None
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return _progress(found.get("fraction"), found.get("text"), ref)
    match = _LINE.match(text)
    if match is None:
        return _progress(None, text, ref)
    number = float(match["number"])
    return _progress(number / 100 if match["percent"] else number, match["text"], ref)


def _progress(fraction: Any, text: Any, ref: TaskRef) -> Progress | None:
    usable = isinstance(fraction, int | float) and not isinstance(fraction, bool) and math.isfinite(fraction)
    shown = " ".join(text.split())[:PROGRESS_TEXT] if isinstance(text, str) else ""
    if not usable and not shown:
        return None
    return Progress(
        task_id=ref.task_id,
        attempt=ref.attempt,
        fraction=min(1.0, max(0.0, float(fraction))) if usable else None,
        text=shown,
        ts=messages.now(),
    )
