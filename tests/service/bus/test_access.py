# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who gets in, who may say what, and what the refusals say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.msg import Msg

from organism.bus import connection, keys
from organism.bus.connection import connect
from organism.bus.errors import Refused, TooOld, Unavailable, Unreachable, Untrusted
from organism.bus.jetstream import JetStream
from organism.core import _bus
from service.support import BusServer, Certificates, free_port


def test_each_key_speaks_for_itself_alone(bus: BusServer) -> None:
    allowed = {
        ("worker", "gpu0"): [
            _bus.up_subject("gpu0"),
            _bus.metrics_subject("gpu0"),
            _bus.log_subject("gpu0"),
            _bus.output_subject("gpu0", "j", 1, "stdout", 0),
            _bus.output_record_subject("gpu0", "j", 1, "stdout"),
        ],
        ("submitter", "alice"): [_bus.enqueue_subject("alice")],
        ("operator", "olga"): [_bus.enqueue_subject("olga")],
        ("conductor", "a"): [_bus.run_subject("gpu0"), _bus.result_subject("j"), _bus.state_subject("j")],
    }
    refused = {
        ("worker", "gpu0"): [
            _bus.up_subject("gpu1"),
            _bus.done_subject("gpu1"),
            _bus.run_subject("gpu0"),
            _bus.result_subject("j"),
            _bus.enqueue_subject("alice"),
            _bus.order_subject("gpu0", 1),
            f"$JS.API.CONSUMER.MSG.NEXT.{_bus.STREAM_WQ}.{_bus.earlier_consumer('gpu1')}",
            # nats-server does not ask whether whoever makes a consumer may speak where it delivers
            f"$JS.API.CONSUMER.CREATE.{_bus.STREAM_WQ}.{_bus.earlier_consumer('gpu0')}.{_bus.run_subject('gpu0')}",
            f"$JS.API.CONSUMER.CREATE.{_bus.STREAM_WQ}.x",
            f"$JS.API.STREAM.DELETE.{_bus.STREAM_WQ}",
            f"$KV.{_bus.BUCKET_CONTROL}.shard.0",
            _bus.output_subject("gpu1", "j", 1, "stdout", 0),
            _bus.output_record_subject("gpu1", "j", 1, "stdout"),
            f"$JS.API.STREAM.MSG.GET.{_bus.STREAM_LOGS}",
        ],
        ("submitter", "alice"): [
            _bus.enqueue_subject("bob"),
            _bus.rpc_subject("bob", "cancel"),
            _bus.run_subject("gpu0"),
            _bus.order_subject("gpu0", 1),
            f"$JS.API.STREAM.INFO.{_bus.STREAM_WQ}",
            "_INBOX.submitter.bob.x",
            # everybody's outputs: the conductor, which knows whose job it is, reads them for users
            f"$JS.API.STREAM.MSG.GET.{_bus.STREAM_LOGS}",
            f"$JS.API.DIRECT.GET.{_bus.STREAM_LOGS}",
            f"$JS.API.CONSUMER.CREATE.{_bus.STREAM_LOGS}.x",
            _bus.output_subject("gpu0", "j", 1, "stdout", 0),
        ],
        ("operator", "olga"): [
            _bus.enqueue_subject("alice"),
            _bus.control_subject("gpu0"),
            _bus.order_subject("gpu0", 1),
        ],
        ("observer", "console"): [_bus.enqueue_subject("console"), "maestro.heartbeat"],
        ("cache", "host0"): [_bus.up_subject("gpu0"), _bus.enqueue_subject("host0")],
        ("conductor", "a"): [
            f"$JS.API.STREAM.DELETE.{_bus.STREAM_WQ}",
            f"$JS.API.STREAM.PURGE.{_bus.STREAM_DLQ}",
            _bus.output_subject("gpu0", "j", 1, "stdout", 0),
        ],
    }

    async def main() -> None:
        for (kind, name), subjects in allowed.items():
            nc = await bus.connected(kind, name)
            for subject in subjects:
                assert (await JetStream(nc).publish(subject, b"{}")).seq > 0
            await nc.close()
        for (kind, name), subjects in refused.items():
            nc = await bus.connected(kind, name)
            for subject in subjects:
                with pytest.raises(Refused, match="may not publish"):
                    await nc.ask(subject, b"{}", timeout=30)
            await nc.close()

    asyncio.run(main())


def test_orders_are_heard_by_their_gpu_alone(bus: BusServer) -> None:
    """They hold whole jobs, of all users."""
    heard: list[bytes] = []

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    async def main() -> None:
        for kind, name in (
            ("worker", "gpu1"),
            ("operator", "olga"),
            ("observer", "console"),
            ("submitter", "alice"),
            ("conductor", "a"),
        ):
            nc = await bus.connected(kind, name)
            with pytest.raises(Refused, match="may not listen"):
                await nc.hear(_bus.order_subject("gpu0"), hear)
            await nc.close()
        worker, conductor = await bus.connected("worker", "gpu0"), await bus.connected("conductor", "a")
        await worker.hear(_bus.order_subject("gpu0"), hear)
        await conductor.say(_bus.order_subject("gpu0", 1), b"run")
        async with asyncio.timeout(30):
            while not heard:
                await worker.flush()
        assert heard == [b"run"]
        await worker.close()
        await conductor.close()

    asyncio.run(main())


def test_nobody_listens_to_the_answers_of_another(bus: BusServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        nc = await bus.connected("submitter", "alice")
        for subject in (
            "_INBOX.>",
            "_INBOX.submitter.bob.>",
            _bus.notify_subject("bob", "*"),
            "gpu.task.>",
            "$O.>",
            ">",
        ):
            caplog.clear()
            await nc.subscribe(subject)
            # the refusal may come after the answer to a flush: another flush is another round trip
            async with asyncio.timeout(30):
                while "permissions violation for subscription" not in caplog.text:
                    await nc.flush()
        await nc.close()

    caplog.set_level(logging.ERROR)
    asyncio.run(main())


def test_a_worker_answers_the_conductor_and_the_conductor_a_worker(bus: BusServer) -> None:
    async def main() -> None:
        conductor = await bus.connected("conductor", "a")
        worker = await bus.connected("worker", "gpu0")

        async def control(message: Msg) -> None:
            await message.respond(b"pong")

        async def heartbeat(message: Msg) -> None:
            await message.respond(b"lease")

        await worker.subscribe(_bus.control_subject("gpu0"), cb=control)
        await conductor.subscribe(_bus.heartbeat_subject("*"), cb=heartbeat)
        await worker.flush()
        await conductor.flush()
        assert (await conductor.ask(_bus.control_subject("gpu0"), b"ping", timeout=30)).data == b"pong"
        assert (await worker.ask(_bus.heartbeat_subject("gpu0"), b"alive", timeout=30)).data == b"lease"
        with pytest.raises(Unavailable, match="nobody listens"):
            await conductor.ask(_bus.control_subject("gpu1"), b"ping", timeout=30)
        await conductor.close()
        await worker.close()

    asyncio.run(main())


def test_nobody_is_let_in_without_a_key_or_with_a_strange_one(bus: BusServer, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.nk"
    keys.create(stranger)

    async def main() -> None:
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            await nats.connect(bus.url, allow_reconnect=False)
        with pytest.raises(Refused, match=r"refused the key of worker\.gpu0"):
            await connect(servers=[bus.url], label="worker.gpu0", nkey_file=str(stranger))
        with pytest.raises(Refused, match="is missing"):
            await connect(servers=[bus.url], label="worker.gpu0", nkey_file=str(tmp_path / "none.nk"))
        (tmp_path / "broken.nk").write_text("hello\n")
        with pytest.raises(Refused, match="no nkey seed"):
            await connect(servers=[bus.url], label="worker.gpu0", nkey_file=str(tmp_path / "broken.nk"))

    asyncio.run(main())


def test_a_silent_address_is_named_and_given_up_when_told_to(bus: BusServer, caplog: pytest.LogCaptureFixture) -> None:
    dead = f"nats://127.0.0.1:{free_port()}"

    async def main() -> None:
        with pytest.raises(Unreachable, match=dead):
            await connect(servers=[dead], label="worker.gpu0", give_up_after=0.3)
        key = str(bus.credentials("worker", "gpu0"))
        nc = await connect(servers=[dead, bus.url], label="worker.gpu0", nkey_file=key, give_up_after=30)
        assert nc.is_connected
        await nc.close()

    asyncio.run(main())
    assert f"no connection to {dead}" in caplog.text


def test_a_revoked_key_ends_the_connection_and_says_so(bus: BusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REFUSED_FOR", 1.0)

    async def main() -> None:
        ended = asyncio.Event()
        nc = await bus.connected("submitter", "bob", on_closed=ended.set)
        other = await bus.connected("submitter", "alice")
        del bus.members["submitter", "bob"]
        await asyncio.to_thread(bus.reload)
        async with asyncio.timeout(30):
            await ended.wait()
        assert nc.is_closed
        with pytest.raises(Unavailable):
            await nc.ask(_bus.enqueue_subject("bob"), b"", timeout=1)
        assert (await JetStream(other).publish(_bus.enqueue_subject("alice"), b"")).seq == 1, "others stay connected"
        await other.close()

    asyncio.run(main())


def test_closing_is_no_accident(bus: BusServer) -> None:
    async def main() -> None:
        told: list[str] = []
        nc = await bus.connected("submitter", "alice", on_closed=lambda: told.append("closed"))
        await nc.close()
        assert not told

    asyncio.run(main())


def test_an_old_server_is_refused(bus: BusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bus, "MIN_SERVER", (99, 0, 0))

    async def main() -> None:
        with pytest.raises(TooOld, match=r"99\.0\.0 or later"):
            await bus.connected("submitter", "alice")

    asyncio.run(main())


def test_tls_is_used_and_demanded(bus_servers: Callable[..., BusServer], tmp_path: Path) -> None:
    ours, foreign = Certificates.make(tmp_path / "tls"), Certificates.make(tmp_path / "foreign")
    secure = bus_servers(certificates=ours).ready()
    plain = bus_servers().ready()

    async def main() -> None:
        nc = await secure.connected("submitter", "alice")
        assert (await JetStream(nc).publish(_bus.enqueue_subject("alice"), b"")).seq == 1
        secure.kill9()
        secure.start()
        assert (await JetStream(nc).publish(_bus.enqueue_subject("alice"), b"", msg_id="again", timeout=30)).seq == 2
        await nc.close()
        key = str(secure.credentials("submitter", "alice"))
        with pytest.raises(Untrusted, match="not to be trusted"):
            await connect(servers=[secure.url], label="submitter.alice", nkey_file=key, ca_file=str(foreign.ca))
        with pytest.raises(Untrusted, match="offers no TLS"):
            await connect(servers=[plain.url], label="submitter.alice", nkey_file=key, ca_file=str(ours.ca))
        with pytest.raises(Untrusted, match="cannot be used"):
            await connect(servers=[secure.url], label="submitter.alice", nkey_file=key, ca_file=str(tmp_path / "no"))

    asyncio.run(main())
