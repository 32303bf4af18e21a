# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A question whose asker is gone must not hurt whoever settles it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from organism.bus.rpc_types import TaskRequest
from organism.maestro.rpc import Rpc


def test_a_cancellation_is_settled_after_its_question_was_given_up() -> None:
    async def main() -> None:
        settled: list[Callable[[str], None]] = []
        rpc: Any = Rpc.__new__(Rpc)
        rpc.conductor = SimpleNamespace(cancel=lambda _job, _why, then: settled.append(then))
        rpc._live = lambda _user, _task_id: SimpleNamespace(task_id="t")
        asking = asyncio.create_task(rpc.cancel("alice", TaskRequest(task_id="t")))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        settled[0]("stored")  # by the writer, in the middle of telling others

    asyncio.run(main())
