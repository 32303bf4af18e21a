# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wrapper's publish, batch, fence and error behaviour against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from organism.bus import jetstream
from organism.bus.errors import DuplicateInBatch, NotFound, Refused, SubjectFull, Unavailable, WrongLastSequence
from organism.bus.jetstream import JetStream, Outgoing
from organism.core import _bus
from service.support import HANG, BusServer


def test_publish_returns_the_sequence_and_tells_a_duplicate(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        first = await js.publish(_bus.run_subject("gpu0"), b"one", msg_id="m1")
        again = await js.publish(_bus.run_subject("gpu0"), b"one", msg_id="m1")
        assert (first.stream, first.seq, first.duplicate) == (_bus.STREAM_WQ, 1, False)
        assert (again.seq, again.duplicate) == (1, True)
        stored = await js.get(_bus.STREAM_WQ, 1)
        assert stored is not None
        assert (stored.subject, stored.data, stored.headers["Nats-Msg-Id"]) == (_bus.run_subject("gpu0"), b"one", "m1")
        last = await js.last(_bus.STREAM_WQ, "gpu.task.run.*")
        assert last == stored
        assert await js.get(_bus.STREAM_WQ, 2) is None
        assert await js.last(_bus.STREAM_WQ, _bus.run_subject("gpu1")) is None
        await nc.close()

    asyncio.run(main())


def test_a_message_that_got_lost_with_its_leader_is_sent_again(bus: BusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        say, lost = nc.say, list[str]()

        async def losing(subject: str, payload: bytes, **more: Any) -> None:
            if lost:
                await say(subject, payload, **more)
            lost.append(subject)

        monkeypatch.setattr(nc, "say", losing)
        monkeypatch.setattr(jetstream, "RESEND", 0.1)
        ack = await JetStream(nc).publish(_bus.run_subject("gpu0"), b"one", msg_id="m1", timeout=HANG)
        assert (ack.seq, ack.duplicate) == (1, False)
        assert len(lost) >= 2
        lost.clear()
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):  # twice might be stored twice
            await JetStream(nc).publish(_bus.run_subject("gpu0"), b"two", timeout=0.3)
        assert len(lost) == 1
        await nc.close()

    asyncio.run(main())


def test_a_fence_with_a_wildcard_refuses_the_older_epoch(bus: BusServer) -> None:
    fences = _bus.result_epoch_subject("*")

    def fenced(seq: int) -> list[Outgoing]:
        return [
            Outgoing(_bus.result_subject(f"k{n}"), b"{}", expect=(seq, fences) if n == 0 else None) for n in range(3)
        ]

    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        old = (await js.publish(_bus.result_epoch_subject(1), b"a")).seq
        await js.publish(_bus.result_subject("j1"), b"{}", expect=(old, fences))
        new = (await js.publish(_bus.result_epoch_subject(2), b"b", expect=(old, fences))).seq
        with pytest.raises(WrongLastSequence):
            await js.publish(_bus.result_subject("j2"), b"{}", expect=(old, fences))
        with pytest.raises(WrongLastSequence):
            await js.publish_batch(fenced(old))
        assert await js.last(_bus.STREAM_RESULTS, _bus.result_subject("k2")) is None
        ack = await js.publish_batch(fenced(new))
        stored = await js.last(_bus.STREAM_RESULTS, _bus.result_subject("k2"))
        assert stored is not None
        assert stored.seq == ack.seq
        await nc.close()

    asyncio.run(main())


def test_a_second_result_is_refused_by_the_server_alone_and_in_a_batch(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        await js.publish(_bus.result_subject("j1"), b"first")
        with pytest.raises(SubjectFull):
            await js.publish(_bus.result_subject("j1"), b"second")
        with pytest.raises(SubjectFull):
            await js.publish_batch([Outgoing(_bus.result_subject(f"j{n}"), b"x") for n in range(3)])
        assert await js.last(_bus.STREAM_RESULTS, _bus.result_subject("j2")) is None
        stored = await js.last(_bus.STREAM_RESULTS, _bus.result_subject("j1"))
        assert stored is not None
        assert stored.data == b"first"
        await nc.close()

    asyncio.run(main())


def test_a_batch_is_stored_whole_in_order_or_not_at_all(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        batch = [Outgoing(_bus.run_subject("gpu0"), b"%d" % n, f"id{n}") for n in range(1000)]
        ack = await js.publish_batch(batch)
        assert ack.seq == 1000
        for seq in (1, 500, 1000):
            stored = await js.get(_bus.STREAM_WQ, seq)
            assert stored is not None
            assert stored.data == b"%d" % (seq - 1)
        with pytest.raises(DuplicateInBatch):
            await js.publish_batch([Outgoing(_bus.run_subject("gpu0"), b"new", "new"), batch[7], batch[8]])
        assert (await js.info(_bus.STREAM_WQ))["state"]["last_seq"] == 1000
        with pytest.raises(ValueError, match="at most 1000"):
            await js.publish_batch([*batch, batch[0]])
        await nc.close()

    asyncio.run(main())


def test_purge_and_delete(bus: BusServer) -> None:
    async def main() -> None:
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        for n in range(10):
            await js.publish(_bus.run_subject(f"gpu{n % 2}"), b"%d" % n)
        assert await js.purge(_bus.STREAM_WQ, seq=4) == 3
        assert await js.purge(_bus.STREAM_WQ, seq=7, subject=_bus.run_subject("gpu1")) == 2
        assert await js.delete(_bus.STREAM_WQ, 8)
        assert not await js.delete(_bus.STREAM_WQ, 8)
        left = [seq for seq in range(1, 11) if await js.get(_bus.STREAM_WQ, seq)]
        assert left == [5, 7, 9, 10]
        await nc.close()

    asyncio.run(main())


def test_errors_have_names(bus: BusServer) -> None:
    async def main() -> None:
        admin = JetStream(await bus.connected("admin", "setup"))
        with pytest.raises(NotFound):
            await admin.info("NO_SUCH")
        nc = await bus.connected("conductor", "a")
        js = JetStream(nc)
        with pytest.raises(Refused, match="may not publish"):
            await js.publish("nobody.listens.here", b"")
        with pytest.raises(Unavailable, match="nobody listens"):
            await js.publish("gpu.task.unknown.x", b"")
        with pytest.raises(Refused, match="max_payload"):
            await js.publish(_bus.run_subject("gpu0"), b"x" * (9 * 1024 * 1024))
        assert (await js.publish(_bus.run_subject("gpu0"), b"x" * (8 * 1024 * 1024 - 512))).seq == 1
        await nc.close()
        await admin.nc.close()

    asyncio.run(main())
