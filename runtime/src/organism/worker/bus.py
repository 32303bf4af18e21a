# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the worker's parts want of the bus, and a way to complain about it without flooding the journal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

COMPLAIN_EVERY = 30.0
"""Seconds between two lines about the same trouble."""


class Answer(Protocol):
    @property
    def data(self) -> bytes: ...


class Bus(Protocol):
    """The part of :class:`organism.bus.connection.BusClient` that is used."""

    async def ask(self, subject: str, payload: bytes = b"", *, timeout: float) -> Answer: ...

    async def say(self, subject: str, payload: bytes) -> None: ...


class Complaint:
    """One line when a trouble begins, one each 30 s while it lasts, and one when it is over."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._since: float | None = None
        self._said = 0.0

    def note(self, why: object) -> None:
        now = self._clock()
        if self._since is None:
            self._since = now
        elif now - self._said < COMPLAIN_EVERY:
            return
        self._said = now
        log.warning("%s for %.0f s: %s; trying again", self._what, now - self._since, why)

    def over(self) -> None:
        if self._since is not None:
            log.info("%s: over after %.0f s", self._what, self._clock() - self._since)
            self._since = None
