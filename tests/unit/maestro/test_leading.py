# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A part that fails ends the term: half a conductor must not keep the lease."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from organism.maestro.commit import Fenced
from organism.maestro.conductor import Conductor
from organism.maestro.workers import Fleet, Limits


def bare() -> Conductor:
    conductor = Conductor.__new__(Conductor)
    site: Any = SimpleNamespace(shard="0")
    conductor.site, conductor.ended, conductor.why_ended, conductor._tasks = site, asyncio.Event(), "", set()
    return conductor


@pytest.mark.parametrize(("error", "logged"), [(ValueError("a mistake"), True), (Fenced("another leads"), False)])
def test_a_failed_task_ends_the_term(error: Exception, logged: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise error

    async def main() -> None:
        conductor = bare()
        conductor.spawn(fails(), "a part")
        async with asyncio.timeout(30):
            await conductor.ended.wait()
        assert conductor.why_ended == f"a part: {error}"
        assert not conductor._tasks

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert any("a part failed" in record.message for record in caplog.records) is logged


def test_a_cancelled_task_ends_nothing() -> None:
    async def main() -> None:
        conductor = bare()
        conductor.spawn(asyncio.Event().wait(), "a part")  # type: ignore[arg-type]  # it never returns
        [task] = conductor._tasks
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert not conductor.ended.is_set()

    asyncio.run(main())


def test_while_the_lease_has_lapsed_nobody_is_given_up_and_then_every_silence_begins_anew() -> None:
    """It was the conductor that did not listen."""
    now, leads, pumped = 1000.0, False, []
    rung: dict[str, list[float | None]] = {}
    conductor: Any = Conductor.__new__(Conductor)
    conductor.clock = SimpleNamespace(now=lambda: now)
    conductor.fleet = Fleet(Limits(heartbeat_ttl=15.0))
    conductor.scheduler = SimpleNamespace(next_timer=lambda: None)
    conductor.leads = lambda: leads
    conductor.pump = lambda: pumped.append(now)
    conductor._overruns, conductor._deadlines = [(900.0, 1, 1), (1010.0, 2, 1), (5000.0, 3, 1)], [(950.0, 1)]
    for name in ("_timer", "_expiry", "_overrun", "_deadline"):
        rung[name] = []
        setattr(conductor, name, SimpleNamespace(at=rung[name].append))
    gpu = conductor.fleet.gpu("gpu0")
    gpu.alive, gpu.expected_since = True, 900.0

    for ring in (conductor._on_timer, conductor._on_expiry, conductor._on_overrun, conductor._on_deadline):
        assert ring() is None
    assert gpu.alive and len(conductor._overruns) == 3 and len(conductor._deadlines) == 1

    conductor.resume()
    leads = True
    assert conductor._on_expiry() == 1015.0 and gpu.alive
    assert sorted(conductor._overruns) == [(1015.0, 1, 1), (1015.0, 2, 1), (5000.0, 3, 1)]
    assert rung == {"_timer": [None], "_expiry": [1015.0], "_overrun": [1015.0], "_deadline": [950.0]}
    assert pumped == [1000.0]
