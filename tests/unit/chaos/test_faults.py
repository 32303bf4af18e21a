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
from chaos.jobs import faults, recorder
from chaos.jobs.faults import Faults
from chaos.jobs.notebook import Notebook, read
from chaos.jobs.plan import Fault
from chaos.jobs.recorder import AGAIN, Recorder
from chaos.jobs.trouble import Stuck

from organism.bus.errors import ApiError, StreamReset, Unavailable
from organism.bus.jetstream import Stored
from organism.core import _bus

STORM = Fault(0, 0.0, "redelivery storm", "worker.gpu1")
PART: Any = SimpleNamespace(name="worker.gpu1")


class Api:
    """Answers in turn."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def api(self, call: str, _payload: Any) -> None:
        self.asked.append(call.split(".")[1])
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer


def made(js: Any, tmp_path: Path, *planned: Fault) -> Faults:
    pool: Any = SimpleNamespace(parts={PART.name: PART}, plan=SimpleNamespace(faults=planned))
    return Faults(pool, js, Notebook(tmp_path / "book"), Recorder(js, Notebook(tmp_path / "book")))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_seconds: float) -> None:
        return None

    monkeypatch.setattr(faults.asyncio, "sleep", sleep)


@pytest.mark.usefixtures("at_once")
def test_a_storm_waits_for_a_server_without_room_and_takes_no_other_refusal(tmp_path: Path) -> None:
    full = ApiError(500, 10012, "no space left on device")
    api = Api(Unavailable("away"), full, ApiError(404, 10014, "consumer not found"), full, None)
    asyncio.run(made(api, tmp_path)._storm(PART, STORM))
    assert api.asked == ["DELETE", "DELETE", "DELETE", "CREATE", "CREATE"]
    with pytest.raises(ApiError, match="bad"):
        asyncio.run(made(Api(ApiError(400, 10025, "bad")), tmp_path)._storm(PART, STORM))


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
