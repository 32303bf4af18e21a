# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is one shard's, what is another's, and what a process does that conducts several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from organism import exposition
from organism.bus import messages
from organism.bus.errors import BusError, NotFound
from organism.bus.messages import Device, Heartbeat, StateEvent, TaskRef
from organism.core import _bus, _worker_settings
from organism.maestro import daemon, exporter, janitor, wishes
from organism.maestro.janitor import Janitor
from organism.maestro.ledger import Ledger
from organism.maestro.projections import Projections
from organism.maestro.workers import Fleet, Gang

JOB = TaskRef("job", 1)


def beat(incarnation: str = "one", gpu: str = "gpu0", host: str = "rig", **more: Any) -> Heartbeat:
    device = Device(backend="simulated", address="sim:0")
    return Heartbeat(
        ts="", gpu_id=gpu, incarnation=incarnation, host=host, pid=1, version="0", device=device, types=["cmd"], **more
    )


def fleet_with_order() -> Fleet:
    fleet = Fleet()
    fleet.heartbeat(beat(), 0.0)
    fleet.assign(fleet.gpus["gpu0"], JOB, 7, 0.0).committed = True
    return fleet


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def test_a_worker_of_the_default_shard_says_what_it_said_before_there_were_others() -> None:
    assert b"shard" not in messages.encode(beat())
    assert messages.decode(messages.encode(beat()), Heartbeat).shard == _bus.DEFAULT_SHARD
    assert messages.decode(messages.encode(beat(shard="b")), Heartbeat).shard == "b"
    assert _worker_settings.SCHEMA.defaults()["SHARD"] == _bus.DEFAULT_SHARD


def test_a_gpu_that_moves_away_loses_its_orders_and_is_ours_no_more() -> None:
    fleet = fleet_with_order()
    found = fleet.depart(beat("two", shard="1"), 5.0)
    assert found is not None
    gpu, lost = found
    assert (gpu.id, [order.ref for order in lost]) == ("gpu0", [JOB])
    assert not fleet.gpus and not fleet.idle
    assert fleet.next_expiry() is None
    # what it was told to run here must not start when it comes back as it was
    assert fleet.heartbeat(beat("one"), 6.0).reply.reset
    assert fleet.heartbeat(beat("three"), 7.0).reply.ok


def test_other_shards_gpus_are_none_of_ours() -> None:
    fleet = fleet_with_order()
    assert fleet.depart(beat("x", gpu="gpu9", shard="1"), 5.0) is None
    assert set(fleet.gpus) == {"gpu0"}
    assert fleet.absence("gpu9") == "it is of shard 1 (`maestroctl --shard 1`)"
    fleet.heartbeat(beat("y", gpu="gpu9"), 6.0)
    assert fleet.absence("gpu9") == fleet.absence("gpu10") == "it is unknown"


def test_another_device_of_the_same_id_takes_nothing_away() -> None:
    fleet = fleet_with_order()
    assert fleet.depart(beat("two", host="elsewhere", shard="1"), 5.0) is None
    assert list(fleet.gpus["gpu0"].orders) == [JOB]


def test_an_outcome_that_is_being_stored_is_waited_for() -> None:
    fleet = fleet_with_order()
    fleet.reported("gpu0", JOB, 1.0)
    assert fleet.depart(beat("two", shard="1"), 5.0) is None
    fleet.settled("gpu0", JOB, stored=True)
    assert fleet.depart(beat("two", shard="1"), 6.0) is not None


def test_the_others_of_a_gang_are_free_when_its_first_has_moved() -> None:
    fleet = fleet_with_order()
    fleet.heartbeat(beat(gpu="gpu1"), 0.0)
    fleet.hold(JOB, Gang("gpu0", "one", ("gpu1",), 1000.0))
    assert "gpu1" not in fleet.idle
    assert fleet.depart(beat("two", shard="1"), 5.0) is not None
    assert list(fleet.idle) == ["gpu1"]


def test_a_drained_gpu_is_drained_in_the_shard_that_it_comes_to() -> None:
    fleet, pumped = Fleet(), 0

    def pump() -> None:
        nonlocal pumped
        pumped += 1

    conductor: Any = SimpleNamespace(
        fleet=fleet, site=SimpleNamespace(shard="1"), pump=pump, scheduler=SimpleNamespace(paused=set())
    )
    asked = wishes.Wishes(conductor)
    asked.gpu("gpu0", b'{"drained": true}')  # in the default shard, before there were others
    assert not fleet.gpus
    fleet.heartbeat(beat(), 0.0)
    assert fleet.gpus["gpu0"].drained
    asked.gpu("gpu0", b'{"drained": false, "shard": "1"}')
    assert not fleet.gpus["gpu0"].drained and pumped == 1
    asked.gpu("gpu7", b'{"drained": true, "shard": "1"}')
    assert fleet.gpus["gpu7"].drained  # its worker is off: it is shown, and can be put back


def test_a_queue_is_paused_in_one_shard() -> None:
    assert wishes.subject("queue", "night") == "$KV.organism_ctl.queue.night"
    assert wishes.subject("queue", "night", "1") == "$KV.organism_ctl.queue.1.night"
    assert wishes.subject("gpu", "gpu0") == "$KV.organism_ctl.gpu.gpu0"


# ---- the stream ------------------------------------------------------------------------------------------------------


class Stream:
    """What a janitor asks ORG_WQ for."""

    def __init__(self, *subjects: str, first: int | None = None, last: int = 1000) -> None:
        self.subjects, self.first, self.last = subjects, first, last
        self.purged: list[tuple[str | None, int | None]] = []

    async def info(self, _stream: str) -> dict[str, Any]:
        return {"state": {"first_seq": 1, "last_seq": self.last}}

    async def api(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        if name.startswith("STREAM.INFO"):
            return {"state": {"subjects": dict.fromkeys(self.subjects, 1)}}
        if body["next_by_subj"] == "gpu.task.enqueue.>" and self.first is not None:
            return {"message": {"seq": self.first}}
        raise NotFound(404, 10037, "no message found", "")

    async def purge(self, _stream: str, *, seq: int | None = None, subject: str | None = None) -> int:
        self.purged.append((subject, seq))
        return 1


def tidied(stream: Stream, retired: int, *, recorded: int = 900, full: bool = False) -> Janitor:
    """A janitor of shard 1 after a purge; its fence has the sequence 10."""

    async def main() -> Janitor:
        made = Janitor(conductor)
        made._recorded, made._full, made.taken_in = recorded, full, 1000
        for seq in range(20, 20 + retired):
            made.retire(seq, seq + 600)
        await made._purge()
        return made

    conductor: Any = SimpleNamespace(
        ledger=Ledger(),
        js=stream,
        site=SimpleNamespace(shard="1", name="a"),
        queue=SimpleNamespace(fence=(10, "gpu.task.epoch.1")),
        clock=SimpleNamespace(now=lambda: 100.0),
        epoch=3,
    )
    return asyncio.run(main())


BOTH = ("gpu.task.epoch.0", "gpu.task.epoch.1", "gpu.task.run.gpu0")


def test_beside_another_shard_each_removes_its_own() -> None:
    stream = Stream(*BOTH, first=300)
    left = tidied(stream, 250)
    assert stream.purged == [
        ("gpu.task.enqueue.*.1", 900),
        ("gpu.task.journal.1", 900),
        ("gpu.task.epoch.1", 10),
        ("gpu.task.run.*", 300),  # shard 0 needs the orders of its jobs from there on
    ]
    assert [seq for seq, _ in left._removable] == list(range(620, 870))


def test_without_any_submission_no_order_is_needed() -> None:
    stream = Stream(*BOTH)
    left = tidied(stream, 250)
    assert stream.purged[-1] == ("gpu.task.run.*", 1001)
    assert not left._removable


def test_a_few_messages_wait_for_more_unless_the_stream_is_full() -> None:
    first, again, full = Stream(*BOTH), Stream(*BOTH), Stream(*BOTH)
    janitor_of_few = tidied(first, 3)
    assert first.purged  # the first time of a term: other shards may wait for it

    async def second() -> None:
        janitor_of_few.conductor.js = again  # type: ignore[assignment]  # a stand-in
        janitor_of_few.retire(950)
        await janitor_of_few._purge()

    asyncio.run(second())
    assert not again.purged
    tidied(full, 3, full=True)
    assert full.purged
    assert janitor.SHARED_EVERY > 0


def test_alone_the_whole_prefix_goes() -> None:
    stream = Stream("gpu.task.epoch.1", "gpu.task.enqueue.alice.1", "gpu.task.run.gpu0")
    moved: list[str] = []

    async def move_fence(subject: str, _data: bytes) -> None:
        moved.append(subject)

    made = tidied(stream, 0, recorded=50)
    assert stream.purged == []
    made.conductor.queue.move_fence = move_fence  # type: ignore[assignment,method-assign]  # a stand-in
    made._recorded = 900
    asyncio.run(made._purge())
    assert (stream.purged, moved) == ([(None, 900)], ["gpu.task.epoch.1"])


# ---- events ----------------------------------------------------------------------------------------------------------


def test_another_shards_last_event_says_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, str]] = []

    async def histories_since(_js: Any, when: float, shard: str) -> list[list[StateEvent]]:
        asked.append((when, shard))
        return []

    async def lost_since(_js: Any) -> float:
        return 77.0

    monkeypatch.setattr("organism.maestro.projections.histories_since", histories_since)
    monkeypatch.setattr("organism.maestro.projections.lost_since", lost_since)
    for subjects in (["gpu.task.epoch.1", "gpu.task.enqueue.alice.1"], ["gpu.task.epoch.1", "gpu.task.epoch.0"]):
        server: Any = Stream(*subjects)
        feed = Projections(server, pytest.fail)  # type: ignore[arg-type]  # never called
        feed.shard = "1"
        asyncio.run(feed._elsewhere())
    assert asked == [(77.0, "1"), (0.0, "1")]


# ---- one process, several shards -------------------------------------------------------------------------------------


def site(shard: str) -> Any:
    settings = SimpleNamespace(number=lambda name: {"LEASE_TTL_SEC": 6.0}[name])
    return SimpleNamespace(name="a", shard=shard, settings=settings)


def conducted(monkeypatch: pytest.MonkeyPatch, run: Callable[[str, asyncio.Event], Any]) -> tuple[int, list[str]]:
    """(exit code, shards in the order of their terms) of a process with the shards 1 and 0."""
    begun: list[str] = []
    waits: dict[str, float] = {}

    class Term:
        def __init__(self, _nc: Any, site: Any, *, leave: float, **_more: Any) -> None:
            self.shard = site.shard
            waits[site.shard] = leave

        async def run(self, stop: asyncio.Event) -> str:
            begun.append(self.shard)
            await run(self.shard, stop)
            return "stopped"

    async def main() -> int:
        monkeypatch.setattr(daemon, "Term", Term)
        status: Any = SimpleNamespace(conductors={}, leads=None)
        nc: Any = SimpleNamespace(is_closed=False)
        return await daemon._conduct(nc, [site("1"), site("0")], asyncio.Event(), status)

    code = asyncio.run(asyncio.wait_for(main(), 60))
    assert waits == {"1": 0.0, "0": 6.0}  # the second is left to its own conductor for a while
    return code, begun


def test_all_shards_are_conducted_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(shard: str, stop: asyncio.Event) -> None:
        if shard == "0":
            stop.set()
        await stop.wait()

    assert conducted(monkeypatch, run) == (0, ["1", "0"])


def test_a_shard_that_cannot_be_conducted_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(shard: str, stop: asyncio.Event) -> None:
        if shard == "0":
            raise BusError("a record of a later version")
        await stop.wait()

    assert conducted(monkeypatch, run) == (1, ["1", "0"])


def test_the_metrics_of_two_shards_are_one_page() -> None:
    sites: list[Any] = [SimpleNamespace(shard=shard, name="a", version="1") for shard in "01"]
    standby = [asyncio.run(exporter.families(None, site)) for site in sites]
    text = exposition.render(exporter.together(standby))
    assert text.count("# TYPE organism_maestro_leading ") == 1
    assert text.count("organism_maestro_leading{") == 2
