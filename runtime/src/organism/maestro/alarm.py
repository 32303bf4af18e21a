# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A timer that is set to the earliest of the times it was asked for: the conductor has deadlines and no tick."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from organism.maestro.clock import Clock


class Alarm:
    """Calls ``ring`` at the earliest time asked for; what ``ring`` returns is the next one (None: none)."""

    def __init__(self, clock: Clock, ring: Callable[[], float | None]) -> None:
        self._clock = clock
        self._ring = ring
        self._when: float | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._stopped = False

    def at(self, when: float | None) -> None:
        """Ring at ``when`` (seconds of the conductor's clock) or earlier if that was asked for before."""
        if when is None or self._stopped or (self._when is not None and self._when <= when):
            return
        if self._handle is not None:
            self._handle.cancel()
        self._when = when
        self._handle = asyncio.get_running_loop().call_later(max(0.0, when - self._clock.now()), self._fire)

    def _fire(self) -> None:
        self._when = self._handle = None
        self.at(self._ring())

    def stop(self) -> None:
        self._stopped = True
        if self._handle is not None:
            self._handle.cancel()
