# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting never hangs on a final job, whatever was missed (S1k-D02), and survives that either side goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from organism.bus import rpc_types
from organism.client import (
    AccessDeniedError,
    AsyncMaestro,
    BusUnreachableError,
    ConductorUnreachableError,
    ConflictError,
    NotFoundError,
    RequestError,
    WaitTimeoutError,
    _waiting,
)
from service.client.conftest import SettingsOf
from service.client.fake import FakeConductor, until
from service.support import HANG, BusServer

Action = Callable[[AsyncMaestro, FakeConductor], Coroutine[Any, Any, Any]]


@pytest.fixture
def act(bus: BusServer, settings_of: SettingsOf) -> Callable[..., Any]:
    """Run a coroutine function with a client and a fake conductor, both connected."""

    def run(action: Action, **options: Any) -> Any:
        patience = options.pop("patience", 10.0)

        async def main() -> Any:
            async with (
                FakeConductor(bus) as conductor,
                AsyncMaestro(settings_of(**options), patience=patience) as maestro,
                asyncio.timeout(HANG),
            ):
                return await action(maestro, conductor)

        return asyncio.run(main())

    return run


def test_a_notice_ends_the_wait_without_any_question(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        handle = await maestro.submit(["true"])
        waiting = asyncio.create_task(handle.result())
        await asyncio.sleep(0)
        await conductor.finish(handle.task_id, stdout="hello")
        result = await waiting
        assert (result.ok, result.state, result.stdout, result.gpu) == (True, "done", "hello", "gpu0")
        assert conductor.asked["wait"] == 0

    act(action)


def test_a_result_that_comes_before_anybody_waits_is_kept(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        handle = await maestro.submit(["true"])
        other = await maestro.submit(["true"])
        await conductor.finish(handle.task_id, stdout="early")
        await conductor.finish(other.task_id)
        await other.result()  # notices come in order: the first one has been heard now
        assert (await handle.result()).stdout == "early"
        assert conductor.asked["wait"] == 0

    act(action)


def test_a_job_that_ended_long_ago_is_answered(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        await conductor.finish("old", notify=False, ok=False)
        result = (await maestro.wait(["old"], timeout=30))["old"]
        assert (result.ok, result.error, result.returncode) == (False, "exit", 3)

    act(action)


def test_a_lost_notice_is_made_up_for(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        handle = await maestro.submit(["true"])
        conductor.running(handle.task_id)
        waiting = asyncio.create_task(handle.result())
        await conductor.finish(handle.task_id, notify=False)
        assert (await waiting).ok

    act(action)


def test_somebody_elses_job_can_be_waited_for(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("theirs", user="bob")
        waiting = asyncio.create_task(maestro.wait(["theirs"]))
        await until(lambda: bool(conductor.asked["wait"]))
        await conductor.finish("theirs", user="bob")  # the notice goes to bob
        assert (await waiting)["theirs"].user == "bob"

    act(action, user="olga", kind="operator")


def test_an_unknown_job_ends_the_wait_with_its_name(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        with pytest.raises(NotFoundError, match="no job nonsense"):
            await maestro.wait(["nonsense"])

    act(action)


def test_a_fresh_job_unknown_to_the_conductor_is_not_given_up(
    act: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_waiting, "HEARD", 0.0)
    monkeypatch.setattr(_waiting, "GRACE", 0.0)

    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        handle = await maestro.submit(["true"])
        waiting = asyncio.create_task(handle.result())
        await until(lambda: conductor.asked["wait"] >= 2)  # it was told "unknown" and asked again
        await conductor.finish(handle.task_id, notify=False)
        assert (await waiting).ok

    act(action)


def test_the_time_out_names_who_is_left(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("slow")
        await conductor.finish("quick")
        with pytest.raises(WaitTimeoutError) as caught:
            await maestro.wait(["slow", "quick"], timeout=1)
        assert caught.value.pending == ["slow"]

    act(action)


def test_results_come_one_by_one(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("a")
        conductor.running("b")
        order = []
        await conductor.finish("b", notify=False)
        async for result in maestro.as_completed(["a", "b"]):
            order.append(result.task_id)
            if result.task_id == "b":
                await conductor.finish("a")
        assert order == ["b", "a"]

    act(action)


def test_many_jobs_cost_few_questions(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        names = [f"job{number}" for number in range(1500)]
        for name in names:
            conductor.running(name)
        waiting = asyncio.create_task(maestro.wait(names))
        await until(lambda: conductor.asked["wait"] >= 2)
        for name in names:
            await conductor.finish(name)
        assert len(await waiting) == 1500
        assert conductor.asked["wait"] < 10

    act(action)


def test_a_wait_survives_the_conductors_death(bus: BusServer, settings_of: SettingsOf) -> None:
    async def main() -> None:
        async with AsyncMaestro(settings_of()) as maestro, asyncio.timeout(HANG):
            async with FakeConductor(bus) as first:
                first.running("job")
                waiting = asyncio.create_task(maestro.wait(["job"]))
                await until(lambda: bool(first.asked["wait"]))
            await until(lambda: bool(maestro.trouble))
            assert "no conductor answers" in maestro.trouble
            async with FakeConductor(bus) as second:
                await second.finish("job", notify=False)
                assert (await waiting)["job"].ok
                assert maestro.trouble == ""

    asyncio.run(main())


def test_a_wait_survives_the_death_of_the_bus(bus: BusServer, settings_of: SettingsOf) -> None:
    async def main() -> None:
        async with AsyncMaestro(settings_of()) as maestro, FakeConductor(bus) as conductor, asyncio.timeout(HANG):
            conductor.running("job")
            waiting = asyncio.create_task(maestro.wait(["job"]))
            await until(lambda: bool(conductor.asked["wait"]))
            bus.kill9()
            await conductor.finish("job", notify=False)
            bus.start()
            assert (await waiting)["job"].ok

    asyncio.run(main())


def test_no_conductor_is_said_with_the_next_step(bus: BusServer, settings_of: SettingsOf) -> None:
    async def main() -> None:
        async with AsyncMaestro(settings_of(), patience=0.5) as maestro:
            with pytest.raises(ConductorUnreachableError, match=r"safe on the bus.*systemctl status"):
                await maestro.status("job")

    asyncio.run(main())


def test_a_bus_that_went_away_is_said(bus: BusServer, settings_of: SettingsOf) -> None:
    async def main() -> None:
        async with AsyncMaestro(settings_of(), patience=0.5) as maestro:
            await maestro._link.nc.flush()
            bus.stop()
            await until(lambda: not maestro._link.nc.is_connected)
            with pytest.raises(BusUnreachableError, match="no connection to the bus"):
                await maestro.status("job")

    asyncio.run(main())


def test_a_question_outlives_a_take_over(bus: BusServer, settings_of: SettingsOf) -> None:
    async def main() -> None:
        async with AsyncMaestro(settings_of(), patience=30) as maestro, asyncio.timeout(HANG):
            asking = asyncio.create_task(maestro.status("job"))
            await asyncio.sleep(0)
            async with FakeConductor(bus) as conductor:
                conductor.running("job")
                assert (await asking).state == "running"

    asyncio.run(main())


def test_errors_keep_their_kind(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("job")
        with pytest.raises(NotFoundError, match="no job other"):
            await maestro.status("other")
        with pytest.raises(ConflictError, match="running"):
            await maestro.result("job")
        with pytest.raises(RequestError, match=r"task_id='a\.b'"):
            await maestro.status("a.b")
        await conductor.finish("job")
        with pytest.raises(ConflictError, match="done already"):
            await maestro.cancel("job")

    act(action)


def test_a_repeated_cancel_whose_first_answer_was_lost_is_no_error(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("job")
        assert (await maestro.cancel("job")).state == "cancelled"
        assert (await maestro.cancel("job")).state == "cancelled"

    act(action)


def test_a_stranger_cannot_ask_in_anothers_name(act: Callable[..., Any], bus: BusServer) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        with pytest.raises(AccessDeniedError, match="may not act as user 'alice'"):
            await maestro.status("job")

    act(action, nkey_file=str(bus.credentials("submitter", "bob")))


def test_logs_are_followed_over_attempts_to_the_end(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.logs = [
            rpc_types.LogsReply(text="", state="enqueued"),
            rpc_types.LogsReply(text="one ", next_offset=4, state="running", attempt=1),
            rpc_types.LogsReply(text="", next_offset=4, eof=True, state="retry", attempt=1),
            rpc_types.LogsReply(text="two", next_offset=3, state="running", attempt=2),
            rpc_types.LogsReply(text="", next_offset=3, eof=True, state="done", attempt=2),
        ]
        pieces = [(chunk.attempt, chunk.text) async for chunk in maestro.logs("job", follow=True)]
        assert pieces == [(1, "one "), (2, "two")]

    act(action)


def test_states_are_told_once_each_until_the_final_one(act: Callable[..., Any]) -> None:
    async def action(maestro: AsyncMaestro, conductor: FakeConductor) -> None:
        conductor.running("job")
        states = []
        async for event in maestro.states("job"):
            states.append(event.state)
            if event.state == "running":
                await conductor.finish("job")
        assert states == ["running", "done"]

    act(action)
