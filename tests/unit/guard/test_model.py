# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every interleaving: six VMs, four GPUs, starts, stops, backups, power-offs and kills in any order."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.guard.model import Node, Task

from organism.core._guard import PREEMPT, REFUSE, Group, Memory, Vm
from organism.core._guard_devices import Device

GPUS = ["0000:01:00", "0000:02:00", "0000:03:00", "0000:04:00"]
VMIDS = range(100, 106)


def node_of(random: Random) -> Node:
    vms = {}
    for vmid in VMIDS:
        devices = []
        for number in range(random.choice([0, 1, 1, 2])):
            choices = random.sample(GPUS, random.choice([1, 1, 2, 3]))
            devices.append(Device(f"hostpci{number}", tuple(frozenset({key}) for key in choices), "x"))
        vms[vmid] = Vm(vmid, f"vm{vmid}", memory=random.choice([8, 16, 32]), devices=tuple(devices))
    names = random.sample(list(VMIDS), 6)
    groups = (
        Group("ml", PREEMPT, frozenset(names[:3])),
        Group("pair", REFUSE, frozenset(names[3:5])),
        Group("cross", random.choice([PREEMPT, REFUSE]), frozenset({names[0], names[4]})),
    )
    return Node(vms, groups, Memory(total=random.choice([64, 96, 200]), reserve=8, arc=8))


def act(node: Node, random: Random) -> None:
    """One thing that happens to the node."""
    vmid = random.choice(VMIDS)
    what = random.choice(["start"] * 6 + ["stop", "stop", "power off", "backup", "group", "watch", "kill", "kill"])
    if what == "start":
        node.start(vmid)
    elif what == "stop":
        node.stop(vmid)
    elif what == "power off":
        node.power_off(vmid)
    elif what == "backup":
        node.backup(vmid)
    elif what == "group":
        node.command_stop("ml")
    elif what == "watch":
        node.watch()
    else:
        killable = [task for task in node.tasks if task.what.startswith(("hook", "stop ml", "watchdog", "qm start"))]
        if killable:
            node.end(random.choice(killable))


def play(random: Random, turns: int) -> Node:
    node = node_of(random)
    for _turn in range(turns):
        ready = node.ready()
        if not ready or (len(node.tasks) < 12 and random.random() < 0.25):
            act(node, random)
        else:
            node.step(random.choice(ready))
        node.check()
    rest(node)
    return node


def rest(node: Node) -> None:
    """Nothing new happens: everything that is under way comes to its end."""
    for _turn in range(5000):
        ready = node.ready()
        if not ready:
            break
        for task in ready:
            if task.ready:
                node.step(task)
            node.check()
    assert not node.tasks, f"wait for each other: {[task.what for task in node.tasks]}"
    assert node.guard_lock is None
    assert not node.vm_locks
    assert not list(node.leftovers()), "a lease is left behind"


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_two_vms_on_a_gpu_or_in_a_group_and_nobody_waits_for_ever(random: Random) -> None:
    play(random, 150)


@pytest.mark.parametrize("seed", range(6))
def test_long_histories(seed: int) -> None:
    node = play(Random(seed), 800)
    assert node.clock > 25


def test_the_model_finds_two_on_one_gpu_when_the_guard_and_proxmox_do_not_look() -> None:
    """The check of the checks."""
    node = node_of(Random(1))
    node.running = {100: frozenset({GPUS[0]}), 101: frozenset({GPUS[0]})}
    with pytest.raises(AssertionError, match="has two VMs"):
        node.check()


def test_the_model_finds_two_that_wait_for_each_other() -> None:
    node = node_of(Random(1))
    never = Task("waits", iter([lambda: False]))
    node.tasks.append(never)
    with pytest.raises(AssertionError, match="wait for each other"):
        rest(node)
