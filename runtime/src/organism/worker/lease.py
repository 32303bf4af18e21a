# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker's permission to start orders, for a time, on its own monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class Lease:
    """Runs from the moment the heartbeat that it answers was *sent*: the conductor counts from a later one, so it can
    never think the lease over while the worker thinks it fresh. Clocks of two machines are never compared."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = float("-inf")

    def renew(self, sent: float, seconds: float) -> None:
        """``sent`` is the clock's value from before the heartbeat left; an older answer never shortens the lease."""
        self._until = max(self._until, sent + seconds)

    def void(self) -> None:
        self._until = float("-inf")

    @property
    def fresh(self) -> bool:
        return self._clock() < self._until

    @property
    def left(self) -> float:
        """Seconds that it still runs, 0 when it is over."""
        return max(0.0, self._until - self._clock())
