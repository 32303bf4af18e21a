# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Group commit against a stream that answers late, twice, not at all, or no."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from organism.bus.errors import (
    ApiError,
    DuplicateInBatch,
    FenceBusy,
    StreamFull,
    SubjectFull,
    Unavailable,
    WrongLastSequence,
)
from organism.bus.jetstream import Outgoing, PubAck
from organism.maestro import commit
from organism.maestro.commit import Fenced, Outcome, Writer

FENCE = "fence"


class Stream:
    """What the server does with a stream that keeps one message a subject; ``trouble`` is asked before each answer."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.ids: dict[str, int] = {}
        self.fence = 1
        self.full_at = 10**9
        self.batches: list[int] = []
        self.lose_answer: list[bool] = []
        self.lose_request: list[bool] = []
        self.nc = SimpleNamespace(is_closed=False)
        self.replicated = False
        self.under_way = 0

    def _lost(self, plan: list[bool]) -> bool:
        return bool(plan) and plan.pop(0)

    async def _alone(self) -> None:
        """A replicated stream takes one fenced write at a time."""
        if self.replicated and self.under_way:
            raise FenceBusy("another write under the same fence is on its way")
        self.under_way += 1
        await asyncio.sleep(0)
        self.under_way -= 1

    def _check(self, message: Outgoing) -> None:
        if message.expect is not None and message.expect[0] != self.fence:
            raise WrongLastSequence(400, 10071, "wrong last sequence")
        if message.subject in self.messages:
            raise SubjectFull(503, 10077, "maximum messages per subject exceeded")
        if len(self.messages) >= self.full_at:
            raise StreamFull(503, 10077, "maximum messages exceeded")

    async def publish(self, subject: str, data: bytes, *, msg_id: str | None = None, expect: Any = None) -> PubAck:
        if self._lost(self.lose_request):
            raise Unavailable("lost on its way")
        await self._alone()
        if msg_id in self.ids:
            ack = PubAck("S", self.ids[msg_id], duplicate=True)
        else:
            self._check(Outgoing(subject, data, msg_id, expect))
            self.messages.append(subject)
            ack = PubAck("S", len(self.messages))
            if msg_id:
                self.ids[msg_id] = ack.seq
        if self._lost(self.lose_answer):
            raise Unavailable("the answer got lost")
        return ack

    async def publish_batch(self, messages: Sequence[Outgoing]) -> PubAck:
        self.batches.append(len(messages))
        if self._lost(self.lose_request):
            raise Unavailable("lost on its way")
        await self._alone()
        if any(message.msg_id in self.ids for message in messages):
            raise DuplicateInBatch(400, 10201, "duplicate")
        for message in messages:
            self._check(message)
        if len(self.messages) + len(messages) > self.full_at:
            raise StreamFull(503, 10077, "maximum messages exceeded")
        for message in messages:
            self.messages.append(message.subject)
            if message.msg_id:
                self.ids[message.msg_id] = len(self.messages)
        if self._lost(self.lose_answer):
            raise Unavailable("the answer got lost")
        return PubAck("S", len(self.messages))


class Desk:
    """A writer to such a stream, and what became of each write."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.fenced: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self.writer = Writer(stream, "S", fence=(1, FENCE), on_fenced=self.fenced.append)  # type: ignore[arg-type]  # a stand-in

    def put(self, *names: str) -> None:
        for name in names:
            self.writer.put(name, b"{}", f"id-{name}", lambda outcome, name=name: self._done(name, outcome))

    def _done(self, name: str, outcome: Outcome) -> None:
        assert name not in self.outcomes, "told twice"
        self.outcomes[name] = outcome

    async def settle(self) -> dict[str, Outcome]:
        async with asyncio.timeout(30):
            await self.writer.drain()
        return self.outcomes


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "RETRY", 0.0)
    monkeypatch.setattr(commit, "BUSY", 0.0)


def names(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]


def run(stream: Stream, *groups: list[str]) -> Desk:
    async def main() -> Desk:
        desk = Desk(stream)
        desk.writer.start()
        for group in groups:
            desk.put(*group)
            await desk.settle()
        await desk.writer.close()
        return desk

    return asyncio.run(main())


def test_small_groups_are_singles_and_large_ones_batches_with_the_right_sequences() -> None:
    desk = run(Stream(), names(4), ["x", "y"], [f"b{n}" for n in range(5)])
    assert desk.stream.batches == [5]
    for name, outcome in desk.outcomes.items():
        assert isinstance(outcome, int)
        assert desk.stream.messages[outcome - 1] == name
    assert desk.writer.settled == 11


def test_what_is_a_large_group_is_measured() -> None:
    fast_disk, slow_disk = commit.Pace(), commit.Pace()
    assert fast_disk.batched(5)  # nothing is known: find out
    for pace, single in ((fast_disk, 0.0001), (slow_disk, 0.001)):
        pace.took(5, 0.0045, batched=True)
        assert not pace.batched(5)  # the other one is not known yet
        pace.took(3, 3 * single, batched=False)
        assert not pace.batched(4)
        assert pace.batched(64)
    assert not fast_disk.batched(40)
    assert slow_disk.batched(5)
    for _ in range(100):
        slow_disk.took(10, 0.0001 * 10, batched=False)  # it got faster
    assert not slow_disk.batched(20)


def test_what_comes_while_a_group_is_on_its_way_goes_together() -> None:
    async def main() -> None:
        stream = Stream()
        desk = Desk(stream)
        desk.writer.start()
        desk.put("first")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        desk.put(*names(50))
        await desk.settle()
        assert stream.batches == [50]
        await desk.writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 4, 5, 40])
@pytest.mark.parametrize("where", ["lose_answer", "lose_request"])
def test_a_lost_answer_is_found_out_and_nothing_is_stored_twice(count: int, where: str) -> None:
    stream = Stream()
    setattr(stream, where, [True, True])
    desk = run(stream, names(count))
    assert sorted(stream.messages) == sorted(names(count))
    for name, outcome in desk.outcomes.items():
        assert isinstance(outcome, int)
        assert stream.messages[outcome - 1] == name


def test_one_full_subject_does_not_stop_the_others_of_its_batch() -> None:
    stream = Stream()
    stream.messages.append("m3")
    desk = run(stream, names(10))
    assert isinstance(desk.outcomes.pop("m3"), SubjectFull)
    assert all(isinstance(outcome, int) for outcome in desk.outcomes.values())
    assert sorted(stream.messages) == sorted(names(10))


@pytest.mark.parametrize("count", [2, 20])
def test_a_full_stream_is_told_to_each(count: int) -> None:
    stream = Stream()
    stream.full_at = 0
    desk = run(stream, names(count))
    assert {type(outcome) for outcome in desk.outcomes.values()} == {StreamFull}
    assert not desk.fenced


@pytest.mark.parametrize("count", [1, 20])
def test_the_fence_ends_everything_at_once(count: int) -> None:
    stream = Stream()
    stream.fence = 2
    desk = run(stream, names(count), ["after"])
    assert {type(outcome) for outcome in desk.outcomes.values()} == {Fenced}
    assert len(desk.fenced) == 1
    assert stream.messages == []


def test_other_refusals_are_told_by_name() -> None:
    class Picky(Stream):
        async def publish(self, subject: str, data: bytes, **more: Any) -> PubAck:
            if subject == "m1":
                raise ApiError(400, 10054, "too large")
            return await super().publish(subject, data, **more)

        async def publish_batch(self, messages: Sequence[Outgoing]) -> PubAck:
            raise ApiError(400, 10054, "too large")

    for count in (3, 8):
        desk = run(Picky(), names(count))
        assert isinstance(desk.outcomes.pop("m1"), ApiError)
        assert all(isinstance(outcome, int) for outcome in desk.outcomes.values())


def test_closing_tells_what_was_not_sent() -> None:
    async def main() -> None:
        desk = Desk(Stream())
        desk.put("a", "b")
        await desk.writer.close()
        desk.put("c")
        assert {type(outcome) for outcome in desk.outcomes.values()} == {Fenced}
        assert len(desk.outcomes) == 3

    asyncio.run(main())


def test_a_replicated_stream_gets_one_fenced_write_at_a_time_and_nobody_is_thought_fenced_off() -> None:
    stream = Stream()
    stream.replicated = True
    desk = run(stream, names(3), ["n1", "n2"], ["o1", "o2", "o3"])
    assert desk.fenced == []
    assert sorted(stream.messages) == sorted([*names(3), "n1", "n2", "o1", "o2", "o3"])
    assert {stream.messages[seq - 1] for seq in desk.outcomes.values() if isinstance(seq, int)} == set(stream.messages)
    assert stream.batches == [2, 3], "once it has said so, each group is fenced as a whole"


def test_the_fence_moves_between_two_groups_also_when_the_answer_is_lost() -> None:
    async def main() -> None:
        stream = Stream()

        async def publish(subject: str, data: bytes, *, expect: Any = None, **_: Any) -> PubAck:
            if expect[0] != stream.fence:
                raise WrongLastSequence(400, 10071, "wrong last sequence")
            stream.fence = 9
            raise Unavailable("the answer got lost")

        async def last(_stream: str, _subject: str) -> Any:
            return SimpleNamespace(seq=9, data=b"epoch")

        desk = Desk(stream)
        stand_in: Any = SimpleNamespace(publish=publish, last=last, nc=stream.nc)
        desk.writer.js = stand_in
        assert await desk.writer.move_fence(FENCE, b"epoch") == 9
        assert desk.writer.fence == (9, FENCE)

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_under_random_trouble_each_write_is_stored_once_and_told_once(seed: int) -> None:
    chance = random.Random(seed)
    stream = Stream()
    stream.lose_answer = [chance.random() < 0.3 for _ in range(60)]
    stream.lose_request = [chance.random() < 0.3 for _ in range(60)]
    groups = [[f"{number}-{name}" for name in names(chance.randint(1, 30))] for number in range(8)]
    desk = run(stream, *groups)
    wanted = [name for group in groups for name in group]
    assert sorted(stream.messages) == sorted(wanted)
    assert {
        name: stream.messages[outcome - 1] for name, outcome in desk.outcomes.items() if isinstance(outcome, int)
    } == {name: name for name in wanted}
