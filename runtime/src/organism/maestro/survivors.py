# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the streams that are written asynchronously may have lost at a power cut: all after the last that is there.

Events and states are not synced one by one (decision: they can be made anew from the results). A power cut takes the
newest of them, minutes' worth, whoever wrote them and however many conductors have led since. What is left ends at some
event; the results from about that event's time on have to be looked at, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.bus.messages import BadMessage, Result, StateEvent
from organism.bus.tail import StreamTail
from organism.core import _bus

SLACK = 30.0
"""Seconds that an event's own time may lie before that of events stored earlier: a decision waits for its commit."""


UNSYNCED = 600.0
"""Seconds after which even what nobody syncs is on disk (nats-server: 120, the kernel: 30): older events that are not
there were removed."""


async def lost_since(js: JetStream) -> float:
    """From when on (seconds since 1970) events or states may be missing; 0: nothing is there. Raises Unavailable."""
    return max(0.0, min([await _last(js, _bus.STREAM_EVENTS), await _last(js, f"KV_{_bus.BUCKET_JOBS}")]) - SLACK)


async def _last(js: JetStream, stream: str) -> float:
    """The own time of a stream's last event; what is written again after a loss is written in the order of these."""
    state = (await js.info(stream))["state"]
    stored = await js.get(stream, int(state["last_seq"])) if state["messages"] else None
    if stored is None:
        return 0.0
    try:
        return messages.seconds_since_epoch(messages.decode(stored.data, StateEvent).ts)
    except (BadMessage, ValueError):
        return stored.time


async def histories_since(js: JetStream, when: float, shard: str) -> list[Sequence[StateEvent]]:
    """The histories of the shard's results stored since ``when``. Raises Unavailable."""
    state = (await js.info(_bus.STREAM_RESULTS))["state"]
    first, last = int(state["first_seq"]), int(state["last_seq"])
    if not state["messages"]:
        return []
    newest = await js.get(_bus.STREAM_RESULTS, last)
    if newest is not None:
        when = max(when, newest.time - UNSYNCED)
    start = await _first_since(js, when, first, last)
    if start > last:
        return []
    found: list[Sequence[StateEvent]] = []
    tail = StreamTail(js, _bus.STREAM_RESULTS, start_seq=start)
    try:
        async for batch in tail:
            for message in batch:
                if message.subject.startswith("gpu.task.result."):
                    found += _history(message.data, shard)
            if tail.caught_up or tail.next_seq > last:
                break
    finally:
        await tail.close()
    return found


def _history(data: bytes, shard: str) -> list[Sequence[StateEvent]]:
    try:
        result = messages.decode(data, Result)
    except BadMessage:
        return []  # said by whoever reads results for their own sake
    return [result.history] if result.history and result.shard == shard else []


async def _first_since(js: JetStream, when: float, low: int, high: int) -> int:
    """The first sequence that was stored at ``when`` or later, by halving; ``high + 1`` when there is none."""
    high += 1
    while low < high:
        middle = (low + high) // 2
        at = middle
        stored = None
        while stored is None and at < high:  # some were removed: the next one tells as well
            stored = await js.get(_bus.STREAM_RESULTS, at)
            at += 1
        if stored is not None and stored.time < when:
            low = at
        else:
            high = middle
    return low
