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
