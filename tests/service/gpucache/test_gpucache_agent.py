# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent as a process, with its own key on a real server, on real mounts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from organism.bus.connection import BusClient
from organism.core import _gpucache as gpucache
from organism.core import _ramlayer as ramlayer
from organism.core._keyvalue import Settings
from organism.core._root import Root
from service.support import HANG, BusServer

ROOT = Root()


@pytest.fixture
def settings(bus: BusServer, tmp_path: Path) -> Settings:
    made = gpucache.SCHEMA.coerce(
        {
            "GPU_IDS": ["gpu0", "gpu1"],
            "CACHE_MB": 32,
            "BASE_ROOT": f"{tmp_path}/data",
            "PERSIST_ROOT": f"{tmp_path}/data",
            "RAM_ROOT": f"{tmp_path}/run",
            "MERGE_ROOT": f"{tmp_path}/srv",
            "NATS_URL": [bus.url],
            "NATS_NAME": "host0",
            "NATS_NKEY_FILE": str(bus.credentials("cache", "host0")),
            "NATS_CA_FILE": "",
        }
    )
    (tmp_path / "gpucache.conf").write_text(gpucache.SCHEMA.render(made), encoding="utf-8")
    return made


@pytest.fixture
def agent(settings: Settings, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    ramlayer.mount(gpucache.layer(settings, "gpu0"), ROOT)
    with (tmp_path / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "organism.gpucache.agent", "--config", str(tmp_path / "gpucache.conf")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    yield process
    process.terminate()
    assert process.wait(HANG) == 0, (tmp_path / "agent.log").read_text(encoding="utf-8")


class Ear:
    """Everything said about caches, as it comes."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

    async def hear(self, message: Any) -> None:
        await self.heard.put((message.subject, json.loads(message.data)))

    async def next(self, subject: str) -> dict[str, Any]:
        """The next message on a subject; others are passed over."""
        async with asyncio.timeout(HANG):
            while True:
                heard, payload = await self.heard.get()
                if heard == subject:
                    return payload


def with_operator(bus: BusServer, test: Callable[[BusClient, Ear], Awaitable[None]]) -> None:
    """Run a test as an operator who hears the caches, once the agent is there."""

    async def run() -> None:
        client = await bus.connected("operator", "olga")
        ear = Ear()
        try:
            for subject in (
                "gpu.cache.agent.up",
                "gpu.cache.heartbeat",
                "gpu.cache.event",
                "gpu.cache.*.done",
                "gpu.cache.*.err",
            ):
                await client.listen(subject, ear.hear)
            await ear.next("gpu.cache.heartbeat")
            await test(client, ear)
        finally:
            await client.close()

    asyncio.run(run())


async def ask(client: BusClient, work: str, payload: object) -> dict[str, Any]:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    answer: dict[str, Any] = json.loads((await client.ask(f"gpu.cache.{work}", data, timeout=HANG)).data)
    return answer


def test_a_request_is_done_answered_and_told(
    bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async def test(client: BusClient, ear: Ear) -> None:
        (tmp_path / "srv/gpu0/out/result").write_text("42", encoding="utf-8")
        answer = await ask(client, "sync", {"gpu": "gpu0"})
        assert answer["ok"], answer
        assert (answer["gpu"], answer["host"], answer["detail"]["number"]) == ("gpu0", "host0", 1)
        told = await ear.next("gpu.cache.sync.done")
        assert told == answer
        assert (tmp_path / "data/gpu0/persist/current/upper/out/result").read_text(encoding="utf-8") == "42"
        (tmp_path / "srv/gpu0/out/result").write_text("43", encoding="utf-8")
        assert (await ask(client, "sync", {"gpu": 0}))["detail"]["number"] == 2

    with_operator(bus, test)


def test_what_fails_is_answered_and_told_as_an_error(
    bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes]
) -> None:
    async def test(client: BusClient, ear: Ear) -> None:
        answer = await ask(client, "prewarm", {"gpu": "gpu1"})
        assert not answer["ok"]
        assert "gpu1 is not mounted" in answer["error"]
        assert await ear.next("gpu.cache.prewarm.err") == answer
        for bad in (b"{", b'{"gpu": "../x"}', b"[]", b'{"gpu": null}', b"\xff\xfe"):
            refused = await ask(client, "sync", bad)
            assert not refused["ok"]
            assert refused["error"]
        assert (await ask(client, "sync", {"gpu": "gpu0"}))["ok"]  # it is still there

    with_operator(bus, test)


def test_all_gpus_are_asked_at_once_and_each_is_told_of(
    bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes]
) -> None:
    async def test(client: BusClient, ear: Ear) -> None:
        answer = await ask(client, "sync", {"gpu": "*"})
        assert (answer["ok"], answer["gpu"], answer["error"]) == (False, "*", "sync failed for gpu1")
        assert {each["gpu"]: each["ok"] for each in answer["detail"]["gpus"]} == {"gpu0": True, "gpu1": False}
        told = [await ear.heard.get() for _ in range(ear.heard.qsize())]
        assert {payload["gpu"] for subject, payload in told if subject.startswith("gpu.cache.sync.")} == {
            "gpu0",
            "gpu1",
        }

    with_operator(bus, test)


def test_a_cache_that_fills_up_and_a_disk_that_is_full_are_events(
    bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async def event(ear: Ear, gpu: str) -> tuple[str, str]:
        while (told := await ear.next("gpu.cache.event"))["gpu"] != gpu:
            continue
        return told["kind"], told["text"]

    persist = tmp_path / "data/gpu0/persist"
    persist.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(persist)], check=True)

    async def test(client: BusClient, ear: Ear) -> None:
        big = tmp_path / "srv/gpu0/big"
        big.write_bytes(os.urandom(31 * 1024 * 1024))
        assert await event(ear, "gpu0") == ("full", "gpu0 is 96.9 % full")
        assert not (await ask(client, "sync", {"gpu": "gpu0"}))["ok"]
        assert (await event(ear, "gpu0"))[0] == "no_space"
        big.unlink()
        assert (await ask(client, "sync", {"gpu": "gpu0"}))["ok"]
        assert await event(ear, "gpu0") == ("ok", "gpu0 is well")

    with_operator(bus, test)


def test_gpus_of_other_hosts_are_left_alone(bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes]) -> None:
    async def test(client: BusClient, ear: Ear) -> None:
        await client.say("gpu.cache.sync", b'{"gpu": "gpu7"}')
        await ask(client, "sync", {"gpu": "gpu0"})
        # requests are heard in order, so an answer for gpu7 would have come before this one
        assert (await ear.next("gpu.cache.sync.done"))["gpu"] == "gpu0"
        assert "gpu.cache.sync.err" not in [subject for subject, _ in ear.heard._queue]  # type: ignore[attr-defined]  # deque of asyncio.Queue

    with_operator(bus, test)


def test_heartbeats_go_on_while_a_sync_waits(
    bus: BusServer, settings: Settings, agent: subprocess.Popen[bytes]
) -> None:
    async def test(client: BusClient, ear: Ear) -> None:
        with ramlayer.locked(gpucache.layer(settings, "gpu0")):
            await client.say("gpu.cache.sync", b'{"gpu": "gpu0"}')
            beats = [await ear.next("gpu.cache.heartbeat") for _ in range(2)]
            assert beats[-1]["running"] == ["sync gpu0"]
            assert beats[-1]["gpus"] == ["gpu0", "gpu1"]
            assert {gpu["gpu"]: gpu["level"] for gpu in beats[-1]["status"]} == {"gpu0": "ok", "gpu1": "off"}
        assert (await ear.next("gpu.cache.sync.done"))["gpu"] == "gpu0"

    with_operator(bus, test)


def test_a_wrong_key_ends_the_agent_with_the_reason(bus: BusServer, settings: Settings, tmp_path: Path) -> None:
    text = (tmp_path / "gpucache.conf").read_text(encoding="utf-8")
    key = str(bus.credentials("cache", "host0"))
    (tmp_path / "wrong.conf").write_text(text.replace(key, f"{tmp_path}/none.nk"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "organism.gpucache.agent", "--config", str(tmp_path / "wrong.conf")],
        capture_output=True, text=True, check=False, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{tmp_path}/none.nk" in done.stderr
