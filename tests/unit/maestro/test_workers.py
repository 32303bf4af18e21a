# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Leases, incarnations and orders: what a heartbeat, or its absence, leads to."""

from __future__ import annotations

from typing import Any

from organism.bus.messages import Device, Heartbeat, Metrics, TaskRef
from organism.maestro.workers import Beat, Fleet, Limits

JOB = TaskRef("job", 1)
OTHER = TaskRef("other", 1)


def beat(
    incarnation: str = "one", gpu: str = "gpu0", host: str = "rig", address: str = "sim:0", **more: Any
) -> Heartbeat:
    return Heartbeat(
        ts="",
        gpu_id=gpu,
        incarnation=incarnation,
        host=host,
        pid=1,
        version="0",
        device=Device(backend="simulated", address=address, vram_mb=8192),
        types=["cmd"],
        **more,
    )


def fleet_with_order(*, committed: bool = True) -> Fleet:
    fleet = Fleet(Limits(), epoch=4)
    fleet.heartbeat(beat(), 0.0)
    order = fleet.assign(fleet.gpus["gpu0"], JOB, 7, 0.0)
    order.committed = committed
    return fleet


def lost(found: Beat) -> list[TaskRef]:
    return [order.ref for order in found.lost]


def test_a_heartbeat_is_granted_a_lease_shorter_than_the_silence_that_kills() -> None:
    fleet = Fleet(Limits(), epoch=4)
    reply = fleet.heartbeat(beat(), 0.0).reply
    assert (reply.ok, reply.epoch) == (True, 4)
    assert 0 < reply.lease_s < fleet.limits.heartbeat_ttl
    assert list(fleet.idle) == ["gpu0"]


def test_silence_kills_the_incarnation_which_is_then_told_to_reset() -> None:
    fleet = fleet_with_order()
    assert fleet.next_expiry() == 15.0
    assert fleet.expire(14.9) == []
    [(gpu, orders)] = fleet.expire(15.0)
    assert (gpu.id, [order.ref for order in orders]) == ("gpu0", [JOB])
    assert not fleet.idle
    reply = fleet.heartbeat(beat(running=[JOB]), 16.0).reply
    assert (reply.ok, reply.reset) == (False, True)
    assert fleet.heartbeat(beat("two"), 17.0).reply.ok
    assert list(fleet.idle) == ["gpu0"]
    assert fleet.expire(18.0) == []


def test_a_new_start_loses_what_it_does_not_know_at_once() -> None:
    fleet = fleet_with_order()
    found = fleet.heartbeat(beat("two"), 1.0)
    assert lost(found) == [JOB]
    assert found.reply.ok
    assert fleet.heartbeat(beat("one"), 2.0).reply.reset


def test_a_new_start_keeps_the_outcomes_on_its_disk() -> None:
    fleet = fleet_with_order()
    found = fleet.heartbeat(beat("two", unreported=[JOB]), 1.0)
    assert lost(found) == []
    assert JOB in fleet.gpus["gpu0"].orders
    assert not fleet.idle


def test_an_order_whose_commit_is_in_flight_is_not_judged_by_a_new_start() -> None:
    fleet = fleet_with_order(committed=False)
    assert lost(fleet.heartbeat(beat("two"), 1.0)) == []
    assert JOB in fleet.gpus["gpu0"].orders


def test_three_heartbeats_without_the_order_lose_it_but_not_in_a_hurry() -> None:
    fleet = fleet_with_order()
    for second in (0.1, 0.2, 0.3, 0.4):
        assert lost(fleet.heartbeat(beat(), second)) == []
    found = fleet.heartbeat(beat(), 8.0)
    assert lost(found) == [JOB]
    assert found.reply.reset


def test_a_mention_starts_the_count_anew() -> None:
    fleet = fleet_with_order()
    for second, running in ((5, []), (10, []), (15, [JOB]), (20, []), (25, [])):
        assert lost(fleet.heartbeat(beat(running=running), float(second))) == []


def test_running_is_told_once() -> None:
    fleet = fleet_with_order()
    assert [order.ref for order in fleet.heartbeat(beat(running=[JOB]), 1.0).started] == [JOB]
    assert fleet.heartbeat(beat(running=[JOB]), 2.0).started == []


def test_what_should_not_run_is_revoked() -> None:
    fleet = fleet_with_order()
    reply = fleet.heartbeat(beat(running=[JOB, OTHER]), 1.0).reply
    assert reply.revoked == [OTHER]


def test_a_reported_attempt_is_not_revoked_while_its_outcome_is_being_stored() -> None:
    fleet = fleet_with_order()
    assert fleet.reported("gpu0", JOB, 1.0)
    assert list(fleet.idle) == ["gpu0"]
    assert fleet.heartbeat(beat(running=[JOB]), 1.1).reply.revoked == []
    fleet.settled("gpu0", JOB, stored=False)
    assert JOB in fleet.gpus["gpu0"].orders
    assert not fleet.idle


def test_a_cancelled_gpu_is_busy_until_its_worker_was_told_and_no_longer_lists_it() -> None:
    fleet = fleet_with_order()
    assert not fleet.release("gpu0", JOB, 1.0, stop=True)
    assert fleet.heartbeat(beat(), 2.0).reply.revoked == [JOB]  # it may be about to start it
    assert not fleet.idle
    assert fleet.heartbeat(beat(running=[JOB]), 3.0).reply.revoked == [JOB]
    assert not fleet.idle
    assert fleet.heartbeat(beat(), 4.0).changed
    assert list(fleet.idle) == ["gpu0"]


def test_a_late_report_of_a_cancelled_attempt_frees_the_gpu() -> None:
    fleet = fleet_with_order()
    fleet.release("gpu0", JOB, 1.0, stop=True)
    assert fleet.release("gpu0", JOB, 1.1)


def test_one_id_on_two_machines_or_devices_is_refused_while_the_first_lives() -> None:
    fleet = Fleet()
    fleet.heartbeat(beat(), 0.0)
    for stranger in (beat("two", host="elsewhere"), beat("two", address="sim:1")):
        reply = fleet.heartbeat(stranger, 1.0).reply
        assert (reply.ok, reply.reset) == (False, False)
        assert "unique" in reply.reason
    assert fleet.heartbeat(beat(), 2.0).reply.ok
    fleet.expire(20.0)
    assert fleet.heartbeat(beat("three", host="elsewhere"), 21.0).reply.ok


def test_after_a_takeover_a_worker_gets_the_full_time_to_be_heard() -> None:
    fleet = Fleet(Limits(), epoch=5)
    fleet.restore("gpu0", "one", JOB, 7, 100.0)
    assert fleet.expire(114.9) == []
    assert fleet.heartbeat(beat(running=[JOB]), 114.95).lost == []
    assert fleet.expire(115.0) == []
    silent = Fleet(Limits(), epoch=5)
    silent.restore("gpu0", "one", JOB, 7, 100.0)
    [(_, orders)] = silent.expire(115.0)
    assert [order.ref for order in orders] == [JOB]


def test_what_a_former_conductor_buried_stays_buried() -> None:
    fleet = Fleet()
    fleet.buried.add(("gpu0", "one"))
    assert fleet.heartbeat(beat("one"), 0.0).reply.reset


def test_scores_and_limits() -> None:
    """S1k-024, S1k-025."""
    fleet = Fleet()
    fleet.heartbeat(beat(), 0.0)
    gpu = fleet.gpus["gpu0"]
    assert fleet.score(gpu, 0.0) == 50 + 30 + 30  # nothing known: stale
    fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x", temp_c=40.0, gpu_busy_percent=10.0), 1.0)
    assert fleet.score(gpu, 2.0) == 10 + 20
    assert fleet.score(gpu, 17.0) == 50 + 30 + 30
    fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x"), 20.0)
    assert fleet.score(gpu, 20.0) == 50 + 30
    for metrics, word in (({"temp_c": 78.1}, "hot"), ({"gpu_busy_percent": 95.1}, "others")):
        fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x", **metrics), 21.0)
        assert word in fleet.obstacle(gpu, 21.0)
    for metrics in ({"temp_c": 78.0}, {"gpu_busy_percent": 95.0}):
        fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x", **metrics), 22.0)
        assert fleet.obstacle(gpu, 22.0) == ""


def test_load_measured_while_our_own_job_ran_does_not_count() -> None:
    fleet = fleet_with_order()
    gpu = fleet.gpus["gpu0"]
    fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x", gpu_busy_percent=100.0, temp_c=60.0), 1.0)
    fleet.release("gpu0", JOB, 2.0)
    assert fleet.obstacle(gpu, 2.1) == ""
    assert fleet.score(gpu, 2.1) == 50 + 30
    fleet.measured(Metrics(ts="", gpu_id="gpu0", backend="x", gpu_busy_percent=100.0), 3.0)
    assert "used by others" in fleet.obstacle(gpu, 3.0)


def test_drained_and_stopping_gpus_take_nothing() -> None:
    fleet = Fleet()
    fleet.heartbeat(beat(draining=True), 0.0)
    gpu = fleet.gpus["gpu0"]
    assert "stopping" in fleet.obstacle(gpu, 0.0)
    gpu.drained = True
    assert "drained" in fleet.obstacle(gpu, 0.0)
    assert fleet.heartbeat(beat(), 1.0).reply.drain


def test_an_order_that_starts_nothing_is_not_missed_while_those_before_it_go_on() -> None:
    fleet = Fleet(Limits(), epoch=4)
    fleet.heartbeat(beat(), 0.0)
    for place, ref in enumerate((JOB, OTHER)):
        fleet.assign(fleet.gpus["gpu0"], ref, place, 0.0, brief=True).committed = True
    for second in range(1, 20):
        assert lost(fleet.heartbeat(beat(unreported=[JOB]), float(second))) == []
    fleet.reported("gpu0", JOB, 20.0)
    fleet.settled("gpu0", JOB, stored=True)
    found = [lost(fleet.heartbeat(beat(), 20.0 + second)) for second in range(1, 6)]
    assert found == [[], [], [], [OTHER], []], "the first heartbeat after a report counts for nothing, three others do"


def test_one_order_that_never_came_gives_all_of_the_workers_orders_away() -> None:
    fleet = Fleet(Limits(), epoch=4)
    fleet.heartbeat(beat(), 0.0)
    gpu = fleet.gpus["gpu0"]
    fleet.assign(gpu, JOB, 1, 0.0, brief=True).committed = True
    for second in range(1, 10):
        found = fleet.heartbeat(beat(), float(second))
        if second == 7:  # given just now: not missed yet, but to the same start of the worker, which has to reset
            fleet.assign(gpu, OTHER, 2, 7.0, brief=True).committed = True
        if found.reply.reset:
            break
    assert lost(found) == [JOB, OTHER]
    assert not gpu.orders


def hearing_fleet() -> Fleet:
    fleet = Fleet(Limits(), epoch=4)
    fleet.heartbeat(beat(hears=True), 0.0)
    order = fleet.assign(fleet.gpus["gpu0"], JOB, 7, 0.0)
    order.committed, order.handed = True, 0.0
    return fleet


def test_an_order_that_a_heartbeat_does_not_mention_is_handed_over_again_unless_it_may_be_on_its_way() -> None:
    fleet = hearing_fleet()
    again = [
        [order.ref for order in fleet.heartbeat(beat(hears=True), second).unheard] for second in (0.5, 1.2, 1.5, 2.3)
    ]
    assert again == [[], [JOB], [], [JOB]]
    assert fleet.heartbeat(beat(hears=True, running=[JOB]), 9.0).unheard == []


def test_an_earlier_conductors_order_is_handed_over_again_at_once() -> None:
    fleet = Fleet(Limits(), epoch=5)
    fleet.restore("gpu0", "one", JOB, 7, 100.0)
    assert [order.ref for order in fleet.heartbeat(beat(hears=True), 100.1).unheard] == [JOB]


def test_one_of_several_orders_that_got_lost_is_handed_over_again_whatever_becomes_of_the_others() -> None:
    fleet = hearing_fleet()
    for number in range(2, 9):
        other = fleet.assign(fleet.gpus["gpu0"], TaskRef("brief", number), 10 + number, float(number), brief=True)
        other.committed, other.handed = True, float(number)
    names = [TaskRef("brief", number) for number in (2, 3)]
    found = fleet.heartbeat(beat(hears=True, running=[JOB], coming=names), 5.5)
    assert [order.ref for order in found.unheard] == [TaskRef("brief", 4)], "5 and later may be on their way"
    assert found.reply.ok
    fleet.reported("gpu0", TaskRef("brief", 2), 5.6)
    assert TaskRef("brief", 4) in [order.ref for order in fleet.heartbeat(beat(hears=True), 7.0).unheard]


def test_an_order_in_hand_is_not_missed_however_long_it_waits_there() -> None:
    fleet = hearing_fleet()
    for second in range(5, 100, 5):
        found = fleet.heartbeat(beat(hears=True, coming=[JOB]), float(second))
        assert (found.reply.ok, found.unheard, found.lost) == (True, [], [])


def test_nothing_is_handed_over_to_a_worker_that_reads_the_stream_or_was_told_to_reset() -> None:
    fleet = fleet_with_order()
    assert fleet.heartbeat(beat(), 5.0).unheard == []
    fleet = hearing_fleet()
    for second in (6.0, 7.0, 8.0):
        found = fleet.heartbeat(beat(hears=True), second)
    assert (found.reply.reset, found.unheard, lost(found)) == (True, [], [JOB])
