# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For the job itself: say how far it is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def progress(fraction: float | None = None, text: str = "") -> bool:
    """Tell whoever looks at this job how far it is: ``fraction`` from 0 to 1, and a few words (the first 200 characters
    are kept). Only the last call counts, and a call a second is heard at most.

    False outside a job, or when the job's directory takes no more: a job must not fail for that.
    Raises ValueError for a fraction that is none.
    """
    if fraction is not None and not (math.isfinite(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"fraction must be from 0 to 1, not {fraction!r}")
    place = os.environ.get("ORGANISM_PROGRESS")
    if not place:
        return False
    fresh = Path(f"{place}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"fraction": fraction, "text": text[:200]}), encoding="utf-8")
        fresh.replace(place)  # in one step: the worker may read at any moment
    except OSError:
        return False
    return True
