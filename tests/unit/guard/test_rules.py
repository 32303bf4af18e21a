# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules one by one: who is stopped, who is refused, and what an operator is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from organism.core._guard import (
    BACKUP,
    KEPT,
    MIGRATION,
    PREEMPT,
    REFUSE,
    RUNNING,
    STARTING,
    Announced,
    Group,
    Memory,
    Request,
    State,
    Vm,
    budget,
    conflicts,
    decide,
)
from organism.core._guard_devices import Device

TRAIN, INFER, OTHER = 100, 101, 102
GPU = "0000:01:00"


def vm(vmid: int, name: str = "", **more: object) -> Vm:
    return replace(Vm(vmid, name or f"vm{vmid}", memory=8), **more)


def gpu(*keys: str, name: str = "hostpci0") -> Device:
    return Device(name, tuple(frozenset({key}) for key in keys), "/".join(keys))


def state(*vms: Vm, policy: str = PREEMPT, **more: object) -> State:
    known = {each.vmid: each for each in (vm(TRAIN, "vm-train"), vm(INFER, "vm-infer"), vm(OTHER), *vms)}
    return replace(State(known, (Group("ml", policy, frozenset({TRAIN, INFER})),)), **more)


def test_the_other_of_a_group_is_stopped_first() -> None:
    decision = decide(state(vm(INFER, phase=RUNNING)), Request(TRAIN))
    assert (decision.stop, decision.reasons, decision.allowed) == ((INFER,), (), False)


def test_a_refusing_group_names_who_runs_and_the_command_that_stops_it() -> None:
    decision = decide(state(vm(INFER, "vm-infer", phase=RUNNING), policy=REFUSE), Request(TRAIN))
    assert decision.refused
    assert str(decision.reasons[0]) == (
        "VM 101 (vm-infer) runs, and of group ml only one VM runs. Stop it first: qm shutdown 101"
    )


@pytest.mark.parametrize("kind", [BACKUP, MIGRATION])
def test_a_backup_and_a_migration_stop_nobody(kind: str) -> None:
    decision = decide(state(vm(INFER, phase=RUNNING)), Request(TRAIN, kind))
    assert decision.refused and not decision.stop


@pytest.mark.parametrize("rival", [vm(INFER, phase=RUNNING, lock="snapshot"), vm(INFER, phase=KEPT)])
def test_who_is_locked_is_not_stopped(rival: Vm) -> None:
    decision = decide(state(rival), Request(TRAIN))
    assert decision.refused and not decision.stop
    assert "qm unlock 101" in decision.reasons[0].next


def test_who_is_starting_gives_way_too() -> None:
    assert decide(state(vm(INFER, phase=STARTING)), Request(TRAIN)).stop == (INFER,)


def test_the_last_request_wins_while_its_asker_waits_or_its_vm_runs() -> None:
    later = {INFER: Announced(INFER, 5, alive=True)}
    refused = decide(state(announced=later), Request(TRAIN, at=3))
    assert [reason.rule for reason in refused.reasons] == ["superseded"]
    assert decide(state(announced=later), Request(TRAIN, at=7)).allowed
    dead = {INFER: Announced(INFER, 5, alive=False)}
    assert decide(state(announced=dead), Request(TRAIN, at=3)).allowed
    runs = state(vm(INFER, phase=RUNNING), announced=dead)
    assert decide(runs, Request(TRAIN, at=3)).refused


def test_a_later_request_that_is_refused_itself_takes_nothing() -> None:
    blocked = state(
        vm(INFER, devices=(gpu(GPU),)),
        vm(OTHER, phase=RUNNING, held=frozenset({GPU})),
        announced={INFER: Announced(INFER, 5, alive=True)},
    )
    assert decide(blocked, Request(TRAIN, at=3)).allowed


def test_a_wish_to_stop_the_group_refuses_the_starts_before_it_and_none_after() -> None:
    stopped = state(stops={"ml": 5})
    assert decide(stopped, Request(TRAIN, at=3)).refused
    assert decide(stopped, Request(TRAIN, at=7)).allowed


def test_a_gpu_of_a_running_vm_is_refused_with_owner_and_way_out() -> None:
    node = state(vm(OTHER, "pool", phase=RUNNING, held=frozenset({GPU})), vm(TRAIN, "vm-train", devices=(gpu(GPU),)))
    decision = decide(node, Request(TRAIN))
    assert [reason.rule for reason in decision.reasons] == ["gpu"]
    text = str(decision.reasons[0])
    assert "VM 102 (pool) runs and has device 0000:01:00" in text and "hostpci0 of VM 100 (vm-train)" in text
    assert "qm shutdown 102" in text


def test_the_gpu_of_a_vm_that_gives_way_is_free() -> None:
    node = state(vm(INFER, phase=RUNNING, held=frozenset({GPU})), vm(TRAIN, devices=(gpu(GPU),)))
    assert decide(node, Request(TRAIN)).stop == (INFER,)


def test_alternatives_are_enough_for_as_many_as_there_are() -> None:
    pool = gpu("a", "b")
    two = state(vm(INFER, devices=(pool,)), vm(OTHER, phase=STARTING, devices=(pool,)), vm(TRAIN, devices=(pool,)))
    assert decide(two, Request(TRAIN)).allowed
    three = replace(two, vms={**two.vms, 103: vm(103, phase=RUNNING, held=frozenset({"a"}), devices=(pool,))})
    decision = decide(three, Request(TRAIN))
    assert decision.refused and "no device of a/b is left" in decision.reasons[0].text


def test_alternatives_that_overlap_are_matched_and_not_taken_greedily() -> None:
    """The one that starts takes the device that the chooser before it can do without."""
    node = state(vm(OTHER, phase=STARTING, devices=(gpu("a", "b"),)), vm(TRAIN, devices=(gpu("a"),)))
    assert decide(node, Request(TRAIN)).keys == frozenset({"a"})


def test_a_device_given_twice_to_one_vm_is_refused() -> None:
    node = state(vm(TRAIN, devices=(gpu(GPU), gpu(GPU, name="hostpci1"))))
    assert "the same VM has already been given" in decide(node, Request(TRAIN)).reasons[0].text


def test_memory_counts_all_running_vms_the_arc_hugepages_and_the_one_that_starts() -> None:
    memory = Memory(total=100, reserve=10, arc=20, pool=30, pool_free=30)
    fits = state(vm(OTHER, memory=30, phase=RUNNING), vm(TRAIN, memory=10), memory=memory)
    assert decide(fits, Request(TRAIN)).allowed  # 20 + 30 + 30 + 10 + 10
    over = decide(replace(fits, vms={**fits.vms, TRAIN: vm(TRAIN, memory=11)}), Request(TRAIN))
    assert [reason.rule for reason in over.reasons] == ["memory"]
    assert "Make 1 MiB free" in over.reasons[0].next and "ZFS ARC at most 20" in over.reasons[0].text


def test_a_vm_that_gives_way_gives_its_memory_too() -> None:
    memory = Memory(total=100, reserve=10)
    node = state(vm(INFER, memory=80, phase=RUNNING), vm(TRAIN, memory=90), memory=memory)
    assert decide(node, Request(TRAIN)).stop == (INFER,)


def test_vms_on_hugepages_live_in_the_pool_as_far_as_it_goes() -> None:
    memory = Memory(total=100, pool=40, pool_free=10)
    paged = vm(TRAIN, memory=10, hugepages=True)
    inside = budget(memory, paged, [vm(OTHER, memory=30, hugepages=True, phase=RUNNING)])
    assert inside.total == 40
    assert budget(memory, replace(paged, memory=25), []).total == 55


def test_the_limit_of_all_vms_is_a_rule_of_its_own() -> None:
    memory = Memory(total=1000, limit=30)
    node = state(vm(OTHER, memory=20, phase=RUNNING), vm(TRAIN, memory=11), memory=memory)
    assert "their limit is 30" in decide(node, Request(TRAIN)).reasons[0].text


def test_every_reason_is_told_at_once() -> None:
    node = state(
        vm(OTHER, phase=RUNNING, held=frozenset({GPU}), memory=90),
        vm(TRAIN, devices=(gpu(GPU),), memory=50),
        memory=Memory(total=100),
    )
    assert [reason.rule for reason in decide(node, Request(TRAIN)).reasons] == ["gpu", "memory"]


def test_of_two_that_run_the_last_that_was_asked_for_stays() -> None:
    both = state(vm(TRAIN, phase=RUNNING, since=2.0), vm(INFER, phase=RUNNING, since=1.0))
    assert conflicts(both)[0].losers == (INFER,)
    asked = {INFER: Announced(INFER, 9, alive=False), TRAIN: Announced(TRAIN, 8, alive=False)}
    assert conflicts(replace(both, announced=asked))[0].losers == (TRAIN,)
    first = replace(both, groups=(Group("ml", REFUSE, frozenset({TRAIN, INFER})),))
    assert conflicts(first)[0].losers == (TRAIN,)
