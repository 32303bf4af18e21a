# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""State events around a power cut of the server: whenever the writer dies, no job has an event without those before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from organism.bus.errors import Unavailable
from organism.bus.jetstream import Outgoing, PubAck, Stored
from organism.bus.messages import Result, State, StateEvent, decode, encode
from organism.core import _bus
from organism.maestro import projections
from organism.maestro.projections import LATE, Projections

EVENTS, STATES, RESULTS = _bus.STREAM_EVENTS, f"KV_{_bus.BUCKET_JOBS}", _bus.STREAM_RESULTS


class Server:
    """A stream each for events and states; without a connection the client keeps what is said, as nats-py does."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Stored]] = {EVENTS: [], STATES: [], RESULTS: []}
        self.queued = ["gpu.task.epoch.0", "gpu.task.enqueue.alice.0", "gpu.task.run.gpu1"]
        """Subjects that ORG_WQ holds."""
        self.pending: list[Outgoing] = []
        self.up = asyncio.Event()
        self.up.set()
        self.is_closed = False
        self.replicas = 1
        self.dies_with: list[str] = []
        """Message ids that a leader takes with it; each once."""
        self.tried = asyncio.Event()
        """Something was to be written while there was no connection."""

    @property
    def nc(self) -> Server:
        return self

    async def wait_connected(self, timeout: float) -> None:
        if not self.up.is_set():
            self.tried.set()
        await self.up.wait()

    async def say(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        message = Outgoing(subject, data, (headers or {}).get("Nats-Msg-Id"))
        if message.msg_id in self.dies_with:
            self.dies_with.remove(message.msg_id)
        elif self.up.is_set():
            self._store(message)
        else:
            self.pending.append(message)

    async def publish(
        self, subject: str, data: bytes, *, msg_id: str | None = None, headers: dict[str, str] | None = None
    ) -> PubAck:
        msg_id = msg_id or (headers or {}).get("Nats-Msg-Id")
        if not self.up.is_set():
            self.tried.set()
            await self.up.wait()
            raise Unavailable("the connection was lost")
        if msg_id in self.dies_with:
            self.dies_with.remove(msg_id)
            raise Unavailable("no answer within 5 s")
        return PubAck("", self._store(Outgoing(subject, data, msg_id)), duplicate=False)

    def _store(self, message: Outgoing) -> int:
        stream = self.streams[STATES if message.subject.startswith("$KV") else EVENTS]
        headers = {"id": message.msg_id or ""}
        if not message.msg_id or all(kept.headers != headers for kept in stream):
            stream.append(Stored(len(stream) + 1, message.subject, message.data, headers, 0.0))
        return len(stream)

    def cut_power(self) -> None:
        self.up.clear()
        for stream in self.streams.values():
            stream.clear()

    def back(self, *listeners: Callable[[], None]) -> None:
        for message in self.pending:
            self._store(message)
        self.pending.clear()
        self.up.set()
        for listener in listeners:
            listener()

    async def info(self, stream: str) -> dict[str, Any]:
        kept = self.streams[stream]
        state = {"messages": len(kept), "first_seq": 1, "last_seq": len(kept)}
        return {"state": state, "config": {"num_replicas": self.replicas}}

    async def api(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"state": {"subjects": dict.fromkeys(self.queued, 1)}}

    async def get(self, stream: str, seq: int) -> Stored | None:
        return self.streams[stream][seq - 1]

    def events(self, task_id: str) -> list[int]:
        found = [decode(kept.data, StateEvent) for kept in self.streams[EVENTS]]
        return [event.n for event in found if event.task_id == task_id]


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def last_many(server: Server, stream: str, subjects: dict[str, str]) -> dict[str, Stored]:
        return {kept.subject: kept for kept in server.streams[stream] if kept.subject in subjects}

    monkeypatch.setattr(projections, "last_many", last_many)


def event(n: int, state: State) -> StateEvent:
    stamp = datetime.fromtimestamp(1_700_000_000 + n, UTC).isoformat(timespec="milliseconds")
    return StateEvent(ts=stamp, task_id="j", n=n, state=state, user="alice")


@pytest.mark.usefixtures("looked_up")
def test_what_happened_while_the_server_was_away_is_written_after_what_it_lost() -> None:
    async def main() -> list[int]:
        server = Server()
        enqueued, waits = event(0, "enqueued"), event(3, "waiting_gpu")
        feed = Projections(server, pytest.fail, lambda: [[enqueued]])  # type: ignore[arg-type]  # stand-ins
        feed.start()
        feed.event(enqueued)
        await feed.drain()
        server.cut_power()
        feed.event(waits)
        await server.tried.wait()
        server.back(feed.again)
        await feed.drain()
        await feed.stop()
        return server.events("j")

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [0, 3]


@pytest.mark.usefixtures("looked_up")
def test_a_leader_that_takes_the_beginning_of_a_group_with_it_leaves_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is to another server and stays; the next leader stores and answers the rest of the group."""
    monkeypatch.setattr(projections, "RETRY", 0.0)

    async def main() -> tuple[list[int], int]:
        server = Server()
        server.replicas, server.dies_with = 3, ["j:0"]
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        feed.start()
        await feed.drain()
        for one in (event(0, "enqueued"), event(8, "scheduled"), event(12, "done")):
            feed.event(one)
        await feed.drain()
        await feed.stop()
        return server.events("j"), decode(server.streams[STATES][-1].data, StateEvent).n

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ([8, 12, 0, 12], 12)


@pytest.mark.usefixtures("looked_up")
def test_a_state_that_could_not_be_written_is_written_later() -> None:
    async def main() -> list[str]:
        server = Server()
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        feed.start()
        await feed.drain()
        whole = server.publish

        async def refuse_states(subject: str, data: bytes, *, msg_id: str | None = None) -> PubAck:
            if subject.startswith("$KV"):
                server.publish = whole  # type: ignore[method-assign]  # once
                raise Unavailable("no answer")
            return await whole(subject, data, msg_id=msg_id)

        server.publish = refuse_states  # type: ignore[method-assign]  # see above
        feed.event(event(0, "enqueued"))
        await feed.drain()
        await feed.stop()
        return [decode(kept.data, StateEvent).state for kept in server.streams[STATES]]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ["enqueued"]


@pytest.mark.usefixtures("looked_up")
def test_what_a_predecessor_still_had_on_its_way_is_found_later() -> None:
    """A state is overwritten by an older one, and an older event comes behind the last."""

    async def main() -> tuple[list[int], int]:
        server = Server()
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        feed.start()
        assert feed._later is not None
        assert feed._later.when() <= asyncio.get_running_loop().time() + LATE
        for one in (event(0, "enqueued"), event(8, "scheduled"), event(12, "done")):
            feed.event(one)
        await feed.drain()
        zombies = event(11, "waiting_gpu")
        await server.say(_bus.state_subject("j"), encode(zombies), headers={"Nats-Msg-Id": "j:11"})
        await server.say(f"$KV.{_bus.BUCKET_JOBS}.j", encode(zombies))
        feed._look_later()  # the time has come
        await feed.drain()
        await feed.stop()
        return server.events("j"), decode(server.streams[STATES][-1].data, StateEvent).n

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ([0, 8, 12, 11, 12], 12)


@pytest.mark.usefixtures("looked_up")
def test_an_inherited_job_that_ended_long_before_the_later_look_is_looked_at() -> None:
    """Its events are not among those that are remembered any more."""

    async def main() -> list[State]:
        server = Server()
        enqueued, done = event(0, "enqueued"), event(12, "done")
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        feed.start([[enqueued]])
        feed.event(done)
        await feed.drain()
        feed._sent.clear()
        result = Result(
            ts=done.ts,
            task_id="j",
            ok=True,
            state="done",
            user="alice",
            data={},
            enq_seq=1,
            attempts=1,
            history=[enqueued, done],
        )
        server.streams[RESULTS].append(Stored(1, _bus.result_subject("j"), encode(result), {}, 0.0))
        await server.say(f"$KV.{_bus.BUCKET_JOBS}.j", encode(event(8, "scheduled")))
        feed._look_later()
        await feed.drain()
        await feed.stop()
        return [decode(kept.data, StateEvent).state for kept in server.streams[STATES]]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ["done", "scheduled", "done"]


@pytest.mark.usefixtures("looked_up")
def test_nothing_is_written_while_another_one_may_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "RETRY", 0.0)

    async def main() -> tuple[list[int], list[int]]:
        server = Server()
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        asked, leads = asyncio.Event(), False

        def may_write() -> bool:
            asked.set()
            return leads

        feed.may_write = may_write
        feed.start()
        feed.event(event(0, "enqueued"))
        await asked.wait()
        before = server.events("j")
        leads = True
        await feed.drain()
        await feed.stop()
        return before, server.events("j")

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ([], [0])


@pytest.mark.usefixtures("looked_up")
def test_what_is_sent_twice_does_not_make_an_older_event_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job ends while nothing can be written: its events wait in the queue and are found to be missing, too."""
    monkeypatch.setattr(projections, "GROUP", 2)

    async def main() -> list[int]:
        server = Server()
        history = [event(0, "enqueued"), event(8, "scheduled"), event(12, "done")]
        feed = Projections(server, pytest.fail, lambda: [history])  # type: ignore[arg-type]  # stand-ins
        feed.start()
        await feed.drain()
        server.cut_power()
        for one in history:
            feed.event(one)
        await server.tried.wait()
        server.back(feed.again)
        await feed.drain()
        await feed.stop()
        return server.events("j")

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [0, 8, 12]


@pytest.mark.usefixtures("looked_up")
def test_a_submission_that_seems_later_than_the_jobs_end_is_still_its_first_event() -> None:
    """It has the server's time, and the conductor's clock was behind it by more than the job took."""

    async def main() -> tuple[list[int], int]:
        server = Server()
        enqueued = StateEvent(ts=event(20, "done").ts, task_id="j", n=0, state="enqueued", user="alice")
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # stand-ins
        feed.start([[enqueued, event(8, "scheduled"), event(12, "done")]])
        await feed.drain()
        await feed.stop()
        return server.events("j"), decode(server.streams[STATES][-1].data, StateEvent).n

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ([0, 8, 12], 12)
