# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The suite under its own faults: what a server without a disk says ends no run, and what ends one says why."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chaos.jobs import recorder
from chaos.jobs.faults import LATER, Faults
from chaos.jobs.notebook import Notebook, read
from chaos.jobs.plan import Fault
from chaos.jobs.recorder import AGAIN, Recorder
from chaos.jobs.trouble import Stuck

from organism.bus.errors import StreamReset, Unavailable
from organism.bus.jetstream import Stored
from organism.core import _bus

STORM = Fault(0, 0.0, "redelivery storm", "worker.gpu1")
PART: Any = SimpleNamespace(name="worker.gpu1")


class Line:
    """A connection that is cut after so many messages."""

    def __init__(self, most: int = 100) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.most = most

    async def wait_connected(self, _timeout: float) -> None:
        return None

    async def say(self, subject: str, data: bytes) -> None:
        if len(self.said) == self.most:
            raise Unavailable("the connection is lost")
        self.said.append((subject, json.loads(data)))


def made(line: Any, tmp_path: Path, *planned: Fault) -> Faults:
    async def connected(_kind: str, _name: str) -> Any:
        return line

    pool: Any = SimpleNamespace(parts={PART.name: PART}, plan=SimpleNamespace(faults=planned), connected=connected)
    return Faults(pool, Notebook(tmp_path / "book"), Recorder(line, Notebook(tmp_path / "book")))


def test_a_storm_brings_every_order_of_the_gpu_again_and_ends_no_run(tmp_path: Path) -> None:
    line = Line()
    suite = made(line, tmp_path)
    first, second = ({"task_id": "j", "gpu": "gpu1", "attempt": attempt} for attempt in (1, 3))
    suite.recorder.orders = {"j": [first, {**first, "gpu": "gpu0", "attempt": 2}, second]}
    asyncio.run(suite._storm(PART, STORM))
    assert line.said == [(_bus.order_subject("gpu1", LATER), one) for one in (first, second)]
    line.most = 3
    asyncio.run(suite._storm(PART, STORM))
    told = [line for line in read(tmp_path / "book") if line["what"] == "storm"]
    assert [(one["orders"], one["problem"]) for one in told] == [(2, ""), (2, "the connection is lost")]


def test_a_fault_that_cannot_be_healed_ends_the_run_by_its_own_name(tmp_path: Path) -> None:
    suite = made(None, tmp_path, STORM)

    async def stuck(*_given: Any) -> None:
        raise Stuck("server.0 after a full disk: not within 60 s")

    suite._how["redelivery storm"] = stuck
    with pytest.raises(Stuck, match="after a full disk"):
        asyncio.run(suite.run(time.monotonic()))


@pytest.mark.parametrize("kind", ["freeze", "cut"])
def test_what_is_frozen_or_cut_is_not_left_so_by_a_run_that_ends(kind: Any, tmp_path: Path) -> None:
    async def main() -> bool:
        begun, over = asyncio.Event(), asyncio.Event()
        part: Any = SimpleNamespace(name="worker.gpu1", freeze=begun.set, thaw=over.set)
        suite = made(None, tmp_path)
        network: Any = SimpleNamespace(cut=lambda _name: begun.set(), heal=lambda _name: over.set())
        suite.pool.network = network
        task: asyncio.Task[None] = asyncio.create_task(suite._how[kind](part, Fault(0, 0.0, kind, part.name, 3600.0)))  # type: ignore[arg-type]  # a coroutine
        await begun.wait()
        task.cancel()
        await asyncio.wait([task])
        return over.is_set()

    assert asyncio.run(asyncio.wait_for(main(), 60))


def test_the_recording_goes_on_where_a_stream_has_lost_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    class Tail:
        """Read up to 702; then it ends at 699, and what is stored next stands where something else had stood."""

        def __init__(self, _js: Any, _stream: str, *, start_seq: int) -> None:
            starts.append(start_seq)
            self.next_seq = 703

        async def __aiter__(self) -> AsyncIterator[list[Stored]]:
            if len(starts) == 1:
                raise StreamReset("stream ORG_WQ ends at 699, but was read up to 702 before")
            body = json.dumps({"epoch": 7}).encode()
            yield [Stored(700, _bus.epoch_subject("0"), body, {}, 0.0)]

            raise asyncio.CancelledError

        async def close(self) -> None:
            return None

    monkeypatch.setattr(recorder, "StreamTail", Tail)
    book = Notebook(tmp_path / "book")
    js: Any = None
    made_ = Recorder(js, book)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(made_._follow(_bus.STREAM_WQ, made_._queue))
    assert starts == [1, 703 - AGAIN]
    assert [line["what"] for line in read(tmp_path / "book")] == ["reset", "epoch"]
