# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One time for all decisions: it starts at the server's clock and then runs by the monotonic one.

Delays and retries are written in this time, so that a conductor on a machine with a wrong clock, or one whose clock is
set while it runs, starts nothing early and nothing late.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from functools import lru_cache


def stamp(seconds: float) -> str:
    """Seconds since 1970 as the bus writes times."""
    part, whole = math.modf(seconds)
    micros = round(part * 1e6)
    return f"{_second(int(whole) + micros // 1_000_000)}.{micros % 1_000_000 // 1000:03d}Z"


@lru_cache(maxsize=16)
def _second(whole: int) -> str:
    """Most stamps of a busy conductor are of the same second as the one before."""
    return datetime.fromtimestamp(whole, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


class Clock:
    """Seconds since 1970; never runs backwards between two calls of :meth:`set`."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def set(self, server_time: float) -> None:
        """The server says that it is ``server_time`` now."""
        self._offset = server_time - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._offset

    def stamp(self) -> str:
        return stamp(self.now())
