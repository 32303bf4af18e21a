# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conductor's lease in a time of the test's own: it lapses, comes back when nobody took it, and is never two's."""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from organism.bus import lease as module
from organism.bus.errors import BusError, Refused, Unavailable, WrongLastSequence
from organism.bus.keyvalue import Entry
from organism.bus.lease import Lease

TTL, RENEW, MARGIN = 6.0, 2.0, 0.5


class Loop(asyncio.SelectorEventLoop):
    """Time passes only when everybody waits, and then at once."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 1000.0
        self.looks: list[Callable[[], None]] = []
        """Called whenever time is about to pass."""
        whole = self._selector.select  # type: ignore[attr-defined]  # asyncio's own

        def select(timeout: float | None) -> Any:
            for look in self.looks:
                look()
            if timeout is None:
                raise AssertionError("nobody would ever wake")
            self.now += timeout + (1e-9 if timeout else 0.0)
            return whole(0)

        self._selector.select = select  # type: ignore[attr-defined]  # see above

    def time(self) -> float:
        return self.now


def played(monkeypatch: pytest.MonkeyPatch, play: Callable[[Loop], Coroutine[Any, Any, None]]) -> None:
    loop = Loop()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    try:
        loop.run_until_complete(play(loop))
    finally:
        loop.close()


class Bucket:
    """One key with compare-and-set. Each holder reaches it by a :class:`Way` of its own."""

    def __init__(self) -> None:
        self.revision = 0
        self.value = b""
        self.writers: list[str] = []

    def write(self, value: bytes, revision: int) -> int:
        if revision != self.revision:
            raise WrongLastSequence(400, 10071, f"wrong last sequence: {self.revision}")
        self.revision, self.value = self.revision + 1, value
        self.writers.append(json.loads(value)["owner"])
        return self.revision


class Way:
    """``before`` and ``behind``: what happens to a question on its way, and to its answer."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.js = SimpleNamespace(nc=SimpleNamespace(is_closed=False), info=self._info)
        self.stream = "KV_x"
        self.before: Callable[[], Coroutine[Any, Any, None]] = self._at_once
        self.behind: Callable[[], Coroutine[Any, Any, None]] = self._at_once

    @staticmethod
    async def _at_once() -> None:
        return None

    async def _info(self, _stream: str) -> dict[str, Any]:
        return {"state": {"last_seq": self.bucket.revision}}

    async def get(self, key: str) -> Entry | None:
        await self.before()
        found = Entry(key, self.bucket.value, self.bucket.revision, 0.0) if self.bucket.revision else None
        await self.behind()
        return found

    async def create(self, key: str, value: bytes) -> int:
        return await self.update(key, value, 0)

    async def update(self, _key: str, value: bytes, revision: int) -> int:
        await self.before()
        problem: WrongLastSequence | None = None
        written = 0
        try:
            written = self.bucket.write(value, revision)
        except WrongLastSequence as wrong:
            problem = wrong
        await self.behind()
        if problem is not None:
            raise problem
        return written


def lease_of(way: Way, owner: str) -> Lease:
    kv: Any = way
    return Lease(kv, "shard.0", owner, ttl=TTL, renew=RENEW, margin=MARGIN)


def failing(problem: BusError) -> Callable[[], Coroutine[Any, Any, None]]:
    async def fails() -> None:
        raise problem

    return fails


def test_a_lapsed_lease_that_nobody_took_is_renewed_and_its_term_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(_loop: Loop) -> None:
        way = Way(Bucket())
        mine = lease_of(way, "a")
        told: list[bool] = []
        mine.on_renewed = lambda: told.append(mine.valid())
        assert await mine.acquire() == 1
        await asyncio.sleep(30)
        assert mine.valid() and not told, "in time, nobody is told of renewals"
        way.before = failing(Unavailable("no answer"))
        await asyncio.sleep(30)
        assert not mine.valid() and not mine.lost.is_set() and not told
        waiting = asyncio.create_task(mine.confirmed())
        way.before = Way._at_once
        assert await waiting
        assert mine.valid() and mine.epoch == 1 and not mine.lost.is_set()
        assert told == [False], "once, and before it is valid for anybody"
        await mine.release()
        assert json.loads(way.bucket.value) == {"owner": "", "epoch": 1}

    played(monkeypatch, play)


def test_a_lapsed_lease_that_another_took_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(_loop: Loop) -> None:
        bucket = Bucket()
        way = Way(bucket)
        mine, other = lease_of(way, "a"), lease_of(Way(bucket), "b")
        mine.on_renewed = pytest.fail
        assert await mine.acquire() == 1
        standby = asyncio.create_task(other.acquire())
        way.before = failing(Unavailable("no answer"))
        assert await standby == 2
        assert not mine.valid() and not mine.lost.is_set(), "it cannot know yet"
        way.before = Way._at_once
        assert not await mine.confirmed()
        assert mine.lost.is_set() and other.valid()
        await other.release()

    played(monkeypatch, play)


def test_who_waits_for_a_lapsed_lease_waits_anew_when_it_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(_loop: Loop) -> None:
        bucket = Bucket()
        way = Way(bucket)
        mine = lease_of(way, "a")
        assert await mine.acquire() == 1
        way.before = failing(Unavailable("no answer"))
        await asyncio.sleep(TTL)
        assert not mine.valid()
        standby = asyncio.create_task(lease_of(Way(bucket), "b").acquire())
        await asyncio.sleep(TTL / 2)
        way.before = Way._at_once
        await asyncio.sleep(10 * TTL)
        assert mine.valid() and not standby.done()
        standby.cancel()
        await mine.release()

    played(monkeypatch, play)


def test_an_answer_that_comes_after_the_leases_end_is_known_for_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(_loop: Loop) -> None:
        way = Way(Bucket())
        mine = lease_of(way, "a")
        told: list[bool] = []
        mine.on_renewed = lambda: told.append(mine.valid())
        await mine.acquire()

        async def slow() -> None:
            await asyncio.sleep(TTL - MARGIN - RENEW)  # as long as what is left when a renewal is due

        way.behind = slow
        await asyncio.sleep(60)
        assert not mine.lost.is_set() and told and not any(told)
        way.behind = Way._at_once
        assert await mine.confirmed()
        await mine.release()

    played(monkeypatch, play)


@pytest.mark.parametrize(("problem", "lost"), [(Refused("not permitted"), True), (Unavailable("no answer"), False)])
def test_what_cannot_be_renewed_at_all_is_lost_when_it_has_lapsed(
    monkeypatch: pytest.MonkeyPatch, problem: BusError, lost: bool
) -> None:
    async def play(_loop: Loop) -> None:
        way = Way(Bucket())
        mine = lease_of(way, "a")
        await mine.acquire()
        way.before = failing(problem)
        await asyncio.sleep(RENEW + MARGIN)
        assert mine.valid() and not mine.lost.is_set()
        await asyncio.sleep(2 * TTL)
        assert mine.lost.is_set() is lost
        await mine.release()

    played(monkeypatch, play)


def test_who_can_renew_no_more_because_of_a_mistake_does_not_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(_loop: Loop) -> None:
        way = Way(Bucket())
        mine = lease_of(way, "a")
        await mine.acquire()

        async def mistake() -> None:
            raise ZeroDivisionError

        way.before = mistake
        await mine.lost.wait()
        assert not mine.valid()
        await mine.release()

    played(monkeypatch, play)


@pytest.mark.parametrize("seed", range(12))
def test_never_two_at_the_same_time_whatever_is_slow_or_lost(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Three conductors, each starved now and then; questions and answers are late or get lost."""
    chance = random.Random(seed)

    async def play(loop: Loop) -> None:
        bucket = Bucket()
        leases: list[Lease] = []
        taken = 0

        def at_most_one() -> None:
            assert sum(1 for one in leases if one.valid()) <= 1

        loop.looks.append(at_most_one)

        async def trouble() -> None:
            await asyncio.sleep(chance.choice([0.0, 0.01, 0.3, 3.0, 9.0]) * chance.random())
            if chance.random() < 0.1:
                raise Unavailable("no answer")

        async def conductor(name: str) -> None:
            nonlocal taken
            while True:
                way = Way(bucket)
                way.before = way.behind = trouble
                mine = lease_of(way, name)
                leases.append(mine)
                await mine.acquire()
                taken += 1
                ended = asyncio.create_task(mine.lost.wait())
                await asyncio.wait({ended}, timeout=chance.uniform(0, 120))
                ended.cancel()
                await mine.release()
                leases.remove(mine)

        tasks = [asyncio.create_task(conductor(name)) for name in "abc"]
        await asyncio.wait(tasks, timeout=3600.0, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task.exception() for task in tasks if task.done()]
        assert not failed, failed
        assert taken > 10
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for one in leases:
            await one.release()

    played(monkeypatch, play)
