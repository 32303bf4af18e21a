# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From when on results are looked at after a power cut: by the own time of the last event that is left."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from organism.bus.jetstream import Stored
from organism.bus.messages import StateEvent, encode
from organism.core import _bus
from organism.maestro import survivors
from organism.maestro.survivors import SLACK

EVENTS, STATES = _bus.STREAM_EVENTS, f"KV_{_bus.BUCKET_JOBS}"


class Streams:
    """stream -> sequence -> message."""

    def __init__(self, **messages: dict[int, Stored]) -> None:
        self.messages = messages

    async def info(self, stream: str) -> dict[str, Any]:
        kept = self.messages[stream]
        return {"state": {"messages": len(kept), "first_seq": min(kept, default=0), "last_seq": max(kept, default=0)}}

    async def get(self, stream: str, seq: int) -> Stored | None:
        return self.messages[stream].get(seq)


def event(seq: int, when: float, stored: float) -> Stored:
    stamp = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
    return Stored(seq, "s", encode(StateEvent(ts=stamp, task_id="t", n=0, state="enqueued")), {}, stored)


def result(seq: int, stored: float) -> Stored:
    return Stored(seq, _bus.result_subject(f"t{seq}"), b"{}", {}, stored)


def since(streams: Streams) -> float:
    return asyncio.run(survivors.lost_since(streams))  # type: ignore[arg-type]  # a stand-in


def test_the_stream_that_lost_more_decides_and_its_event_s_own_time_counts() -> None:
    late = {1: event(1, 100.0, 100.0), 2: event(2, 900.0, 901.0)}
    sent_again = {1: event(1, 100.0, 100.0), 2: event(2, 500.0, 950.0)}
    assert since(Streams(**{EVENTS: late, STATES: late})) == 900.0 - SLACK
    assert since(Streams(**{EVENTS: late, STATES: sent_again})) == 500.0 - SLACK, "a mending that was cut short goes on"


def test_where_nothing_is_left_everything_may_be_missing() -> None:
    assert since(Streams(**{EVENTS: {}, STATES: {1: event(1, 900.0, 900.0)}})) == 0.0


@pytest.mark.parametrize(
    ("when", "first"), [(0.0, 3), (30.0, 3), (31.0, 4), (50.0, 5), (51.0, 8), (80.0, 8), (81.0, 9)]
)
def test_the_first_result_of_a_time_is_found_also_between_gaps(when: float, first: int) -> None:
    kept = {seq: result(seq, seq * 10.0) for seq in (3, 4, 5, 8)}
    streams: Any = Streams(**{_bus.STREAM_RESULTS: kept})
    found = asyncio.run(survivors._first_since(streams, when, 3, 8))
    assert {seq for seq in kept if seq >= found} == {seq for seq in kept if seq >= first}
