# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Submissions on a real server: stored once, refused clearly, confirmed or said not to be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from organism.bus import keys, messages
from organism.bus.jetstream import JetStream
from organism.client import (
    AccessDeniedError,
    AsyncMaestro,
    BusUnreachableError,
    InvalidJobError,
    Maestro,
    MaestroError,
    PayloadTooLargeError,
    QueueFullError,
)
from organism.core import _bus
from service.client.conftest import SettingsOf, settings_for
from service.support import SMALL, BusServer


async def stored(bus: BusServer) -> list[messages.JobSpec]:
    """All submissions in ORG_WQ, in order."""
    nc = await bus.connected("admin", "setup")
    try:
        js = JetStream(nc)
        state = (await js.info(_bus.STREAM_WQ))["state"]
        found = [await js.get(_bus.STREAM_WQ, seq) for seq in range(max(1, state["first_seq"]), state["last_seq"] + 1)]
        return [messages.decode(message.data, messages.JobSpec) for message in found if message is not None]
    finally:
        await nc.close()


def run(bus: BusServer, settings_of: SettingsOf, action: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncMaestro(settings_of(**options)) as maestro:
            return await action(maestro)

    return asyncio.run(main())


def test_a_submission_is_on_disk_when_the_call_returns(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> str:
        handle = await maestro.submit(["echo", "ä b"], gpu="gpu0", timeout=5, env={"A": "1"}, labels={"k": "v"})
        assert handle.seq == 1
        assert not handle.duplicate
        return handle.task_id

    task_id = run(bus, settings_of, action)
    bus.kill9()
    bus.start()
    [spec] = asyncio.run(stored(bus))
    assert spec.task_id == task_id
    assert (spec.cmd, spec.gpu, spec.timeout, spec.env) == (["echo", "ä b"], "gpu0", 5, {"A": "1"})


def test_the_same_id_is_stored_once_and_said_so(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> tuple[bool, bool]:
        first = await maestro.submit(["true"], task_id="mine")
        second = await maestro.submit(["true"], task_id="mine")
        return first.duplicate, second.duplicate

    assert run(bus, settings_of, action) == (False, True)
    assert len(asyncio.run(stored(bus))) == 1


def test_two_users_may_use_the_same_id_word(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> bool:
        return (await maestro.submit(["true"], task_id="same")).duplicate

    assert run(bus, settings_of, action) is False
    assert run(bus, settings_of, action, user="bob") is False


def test_many_are_stored_in_order_and_whole_batches(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> list[Any]:
        return await maestro.submit_many({"type": "noop", "labels": {"n": str(n)}} for n in range(2100))

    handles = run(bus, settings_of, action)
    assert [handle.seq for handle in handles] == list(range(1, 2101))
    found = asyncio.run(stored(bus))
    assert [spec.labels["n"] for spec in found] == [str(n) for n in range(2100)]
    assert [spec.task_id for spec in found] == [handle.task_id for handle in handles]


def test_a_batch_that_was_partly_stored_before_ends_up_whole_and_once(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> list[bool]:
        await maestro.submit(["true"], task_id="b")
        handles = await maestro.submit_many([{"cmd": ["true"], "task_id": name} for name in "abc"])
        return [handle.duplicate for handle in handles]

    assert run(bus, settings_of, action) == [False, True, False]
    assert sorted(str(spec.task_id) for spec in asyncio.run(stored(bus))) == ["a", "b", "c"]


def test_what_was_missing_of_a_batch_is_stored_in_its_order(bus: BusServer, settings_of: SettingsOf) -> None:
    names = [f"j{number}" for number in range(40)]
    known = ["j0", "j1", "j7", "j8", "j30"]

    async def action(maestro: AsyncMaestro) -> list[bool]:
        for name in known:
            await maestro.submit(["true"], task_id=name)
        handles = await maestro.submit_many({"cmd": ["true"], "task_id": name} for name in names)
        specs = await stored(bus)
        assert [specs[handle.seq - 1].task_id for handle in handles] == names
        return [handle.duplicate for handle in handles]

    assert run(bus, settings_of, action) == [name in known for name in names]
    found = [str(spec.task_id) for spec in asyncio.run(stored(bus))]
    assert found == known + [name for name in names if name not in known]


def test_nobody_is_stored_without_the_job_that_they_run_after(bus_servers: Callable[..., BusServer]) -> None:
    """The queue has no room for that one, and would have for them."""
    bus = bus_servers()
    bus.start()
    asyncio.run(bus.apply_topology(limits=replace(SMALL, queue_bytes=1_000_000)))
    jobs: list[dict[str, Any]] = [
        {"cmd": ["true"], "task_id": "known"},
        {"cmd": ["echo", "x" * 1_100_000], "task_id": "large"},
        {"cmd": ["true"], "task_id": "next", "after": ["large"]},
    ]

    async def main() -> None:
        async with AsyncMaestro(settings_for(bus)) as maestro:
            await maestro.submit(**jobs[0])
            await maestro.submit_many(jobs)

    with pytest.raises(QueueFullError, match="was not accepted"):
        asyncio.run(main())
    assert [spec.task_id for spec in asyncio.run(stored(bus))] == ["known"]


def test_one_bad_job_stops_the_batch_before_anything_is_sent(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> None:
        await maestro.submit_many([{"cmd": ["true"]}, {"cmd": ["true"], "timout": 3}])

    with pytest.raises(InvalidJobError, match=r"job 2: .*timout.*nothing was sent"):
        run(bus, settings_of, action)
    assert asyncio.run(stored(bus)) == []


def test_nine_megabytes_are_refused_before_they_are_sent(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> None:
        await maestro.submit(["echo", "x" * 9_000_000])

    with pytest.raises(PayloadTooLargeError, match=r"9\.0 MB.*8\.\d MB.*file"):
        run(bus, settings_of, action)
    assert asyncio.run(stored(bus)) == []


def test_the_largest_job_that_is_let_through_is_accepted(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> int | None:
        room = maestro._link.nc.max_payload - 1024 - 200
        return (await maestro.submit(["echo", "x" * room])).seq

    assert run(bus, settings_of, action) == 1


def test_a_full_queue_is_told_as_such_and_what_was_accepted_stays(bus_servers: Callable[..., BusServer]) -> None:
    bus = bus_servers()
    bus.start()
    asyncio.run(bus.apply_topology(limits=replace(SMALL, queue_bytes=1_000_000)))

    accepted = 0

    async def main() -> None:
        nonlocal accepted
        async with AsyncMaestro(settings_for(bus)) as maestro:
            for _ in range(20):
                await maestro.submit(["echo", "x" * 200_000])
                accepted += 1

    with pytest.raises(QueueFullError, match="was not accepted"):
        asyncio.run(main())
    assert accepted > 0
    assert len(asyncio.run(stored(bus))) == accepted


def test_another_users_name_is_refused_at_once(bus: BusServer, settings_of: SettingsOf) -> None:
    async def action(maestro: AsyncMaestro) -> None:
        await maestro.submit(["true"])

    key = str(bus.credentials("submitter", "bob"))
    with pytest.raises(AccessDeniedError, match="may not act as user 'alice'"):
        run(bus, settings_of, action, user="alice", nkey_file=key)
    assert asyncio.run(stored(bus)) == []


def test_an_unknown_key_is_refused_at_once(bus: BusServer, settings_of: SettingsOf, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.nk"
    keys.create(stranger)
    with pytest.raises(AccessDeniedError, match="refused the key"):
        Maestro(settings_of(nkey_file=str(stranger)))


def test_no_key_at_all_is_refused(bus: BusServer, settings_of: SettingsOf) -> None:
    with pytest.raises(AccessDeniedError):
        Maestro(settings_of(nkey_file=None))


def test_no_bus_is_said_within_the_patience(bus: BusServer, settings_of: SettingsOf) -> None:
    bus.stop()
    with pytest.raises(BusUnreachableError, match="no bus server answered within 1 s"):
        Maestro(settings_of(), patience=1)


def test_a_bus_without_streams_is_told_as_not_confirmed(bus_servers: Callable[..., BusServer]) -> None:
    bus = bus_servers()
    bus.start()
    with Maestro(settings_for(bus)) as maestro, pytest.raises(MaestroError, match="did not confirm job-") as caught:
        maestro.submit(["true"], confirm=0.5)
    assert caught.value.code == "unconfirmed"


def test_a_kill_of_the_bus_under_submissions_loses_and_doubles_none(bus: BusServer, settings_of: SettingsOf) -> None:
    accepted: list[str] = []
    enough = threading.Event()

    def submit() -> None:
        with Maestro(settings_of()) as maestro:
            for _ in range(300):
                accepted.append(maestro.submit(type="noop").task_id)
                if len(accepted) == 100:
                    enough.set()

    thread = threading.Thread(target=submit)
    thread.start()
    assert enough.wait(60)
    bus.kill9()
    bus.start()
    thread.join(60)
    assert len(accepted) == 300
    assert [spec.task_id for spec in asyncio.run(stored(bus))] == accepted
