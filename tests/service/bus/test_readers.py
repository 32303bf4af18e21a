# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tails, buckets and leases: what they promise while the server is killed under them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from organism.bus.errors import StreamReset, WrongLastSequence
from organism.bus.jetstream import JetStream, Outgoing
from organism.bus.keyvalue import KeyValue
from organism.bus.lease import Lease
from organism.bus.tail import StreamTail
from organism.core import _bus
from service.support import HANG, BusServer


async def _fill(js: JetStream, count: int, start: int = 0) -> None:
    for first in range(start, start + count, 500):
        numbers = range(first, min(first + 500, start + count))
        await js.publish_batch([Outgoing(_bus.run_subject("gpu0"), b"%d" % n) for n in numbers])


async def _read_until(tail: StreamTail, seq: int, into: list[int]) -> None:
    async with asyncio.timeout(HANG):
        while not into or into[-1] < seq:
            into += [stored.seq for stored in await tail.__anext__()]


def test_tail_replays_says_when_it_has_caught_up_and_follows(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        empty = StreamTail(js, _bus.STREAM_WQ)
        assert await empty.__anext__() == []
        assert empty.caught_up
        await _fill(js, 2300)
        tail = StreamTail(js, _bus.STREAM_WQ, start_seq=11)
        seen: list[int] = []
        async with asyncio.timeout(HANG):
            async for batch in tail:
                seen += [stored.seq for stored in batch]
                if tail.caught_up:
                    break
        assert seen == list(range(11, 2301))
        await js.publish(_bus.run_subject("gpu1"), b"late")
        batch = await tail.__anext__()
        assert [(stored.seq, stored.subject, stored.data) for stored in batch] == [
            (2301, _bus.run_subject("gpu1"), b"late")
        ]
        await tail.close()
        await empty.close()
        await nc.close()

    asyncio.run(main())


def test_tail_filters_and_is_caught_up_although_the_last_message_is_not_for_it(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        for n in range(6):
            await js.publish(_bus.run_subject(f"gpu{n % 3}"), b"")
        tail = StreamTail(js, _bus.STREAM_WQ, filter_subjects=[_bus.run_subject("gpu0"), _bus.run_subject("gpu1")])
        seen: list[int] = []
        async with asyncio.timeout(HANG):
            while not tail.caught_up:
                seen += [stored.seq for stored in await tail.__anext__()]
        assert seen == [1, 2, 4, 5]
        await nc.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["kill9", "stop"])
def test_tail_has_no_gap_and_no_repetition_across_a_restart_of_the_server(bus: BusServer, how: str) -> None:
    async def main() -> None:
        writer = JetStream(await bus.connected("conductor", "b"))
        reader = await bus.connected("conductor", "a")
        tail = StreamTail(JetStream(reader), _bus.STREAM_WQ)
        seen: list[int] = []
        await _fill(writer, 700)
        await _read_until(tail, 700, seen)
        for round_ in range(2):
            getattr(bus, how)()
            reading = asyncio.create_task(_read_until(tail, 700 + 300 * (round_ + 1), seen))
            await asyncio.sleep(0.2)
            bus.start()
            await writer.nc.wait_connected(HANG)
            await _fill(writer, 300)
            await reading
        assert seen == list(range(1, 1301))
        await reader.close()
        await writer.nc.close()

    asyncio.run(main())


def test_tail_refuses_a_stream_that_ends_before_what_was_read(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        with pytest.raises(StreamReset, match="ends at 0"):
            await StreamTail(JetStream(nc), _bus.STREAM_WQ, start_seq=5).__anext__()
        await nc.close()

    asyncio.run(main())


def test_bucket_compares_and_sets(bus: BusServer) -> None:
    async def main() -> None:
        kv = KeyValue(JetStream(await bus.connected("conductor", "a")), _bus.BUCKET_CONTROL)
        assert await kv.get("gpu.gpu0") is None
        revision = await kv.create("gpu.gpu0", b"drained")
        with pytest.raises(WrongLastSequence):
            await kv.create("gpu.gpu0", b"other")
        with pytest.raises(WrongLastSequence):
            await kv.update("gpu.gpu0", b"other", revision + 7)
        revision = await kv.update("gpu.gpu0", b"open", revision)
        entry = await kv.get("gpu.gpu0")
        assert entry is not None
        assert (entry.value, entry.revision) == (b"open", revision)
        await kv.delete("gpu.gpu0", revision=revision)
        assert await kv.get("gpu.gpu0") is None
        await kv.create("gpu.gpu0", b"again")
        await kv.js.nc.close()

    asyncio.run(main())


def test_lease_passes_to_a_standby_when_the_holder_falls_silent_and_never_has_two(bus: BusServer) -> None:
    async def main() -> None:
        first_nc, second_nc = await bus.connected("conductor", "a"), await bus.connected("conductor", "b")
        first = Lease(KeyValue(JetStream(first_nc), _bus.BUCKET_CONTROL), "shard.0", "a", ttl=2, renew=0.4)
        second = Lease(KeyValue(JetStream(second_nc), _bus.BUCKET_CONTROL), "shard.0", "b", ttl=2, renew=0.4)
        assert await first.acquire() == 1
        standby = asyncio.create_task(second.acquire())
        await asyncio.sleep(3)  # longer than the ttl: renewals keep the standby out
        assert first.valid()
        assert not standby.done()
        await first_nc.close()  # silent, but alive: it must know by itself
        async with asyncio.timeout(HANG):
            assert await standby == 2
        assert not first.valid()
        assert second.valid()
        async with asyncio.timeout(HANG):
            await first.lost.wait()
        await second.release()
        assert not second.valid()
        third = Lease(KeyValue(JetStream(second_nc), _bus.BUCKET_CONTROL), "shard.0", "c", ttl=600, renew=100)
        async with asyncio.timeout(HANG):
            assert await third.acquire() == 3, "a released lease is taken at once, not after its ttl"
        await third.release()
        await second_nc.close()

    asyncio.run(main())


def test_lease_survives_a_short_restart_of_the_server(bus_servers: Callable[..., BusServer]) -> None:
    bus = bus_servers().ready()

    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        lease = Lease(KeyValue(JetStream(nc), _bus.BUCKET_CONTROL), "shard.0", "a", ttl=30, renew=0.2)
        await lease.acquire()
        bus.kill9()
        bus.start()
        before = lease._revision
        async with asyncio.timeout(HANG):
            while lease._revision <= before + 1:
                assert lease.valid()
                await asyncio.sleep(0.1)
        await lease.release()
        await nc.close()

    asyncio.run(main())
