# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ends a term, and what ends the daemon with it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from organism.bus.errors import ApiError, BusError, StreamReset, TooOld, Unavailable
from organism.maestro import daemon
from organism.maestro.commit import Fenced


def terms(monkeypatch: pytest.MonkeyPatch, problem: Exception, *, closed: bool = False) -> tuple[int, int]:
    """(exit code, terms that there were) of a daemon whose first term raises; the second one is told to stop."""
    begun = 0

    class Term:
        def __init__(self, *_given: Any, **_more: Any) -> None:
            nonlocal begun
            begun += 1

        async def run(self, stop: asyncio.Event) -> str:
            if begun == 1:
                raise problem
            stop.set()
            return "stopped"

    async def at_once(_seconds: float) -> None:
        return None

    async def main() -> int:
        monkeypatch.setattr(daemon, "Term", Term)
        monkeypatch.setattr(daemon.asyncio, "sleep", at_once)
        nc: Any = SimpleNamespace(is_closed=closed)
        site: Any = SimpleNamespace(name="a", shard="0")
        status: Any = SimpleNamespace(conductors={}, leads=None)
        return await daemon._terms(nc, site, asyncio.Event(), status)

    return asyncio.run(asyncio.wait_for(main(), 60)), begun


@pytest.mark.parametrize(
    "problem",
    [
        Unavailable("no answer"),
        Fenced("another one leads"),
        ApiError(500, 10077, "write ORG_WQ/msgs/1.blk: no space left on device"),
        ApiError(503, 10023, "insufficient resources"),
        StreamReset("it ends at 3, but was read up to 5"),
    ],
)
def test_what_passes_ends_a_term_and_not_the_daemon(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    assert terms(monkeypatch, problem) == (0, 2)


@pytest.mark.parametrize("problem", [TooOld("the server is 2.10"), ApiError(400, 10025, "bad request")])
def test_what_another_term_would_meet_again_ends_the_daemon(monkeypatch: pytest.MonkeyPatch, problem: BusError) -> None:
    with pytest.raises(type(problem)):
        terms(monkeypatch, problem)


def test_a_connection_that_has_ended_for_good_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terms(monkeypatch, Unavailable("closed"), closed=True) == (1, 1)
