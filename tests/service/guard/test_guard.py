# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from chaos.guard.place import CONFIGURED, Place
from chaos.guard.storm import Storm, storm

from organism.core import _guard_profile
from organism.core._guard_config import CONFIG

TRAIN, INFER, POOL_A, CUDA, POOL_B, LAB = range(100, 106)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the simulated node's commands want root")


@pytest.fixture(scope="module")
def node() -> Iterator[Place]:
    with Place() as place:
        yield place


@pytest.fixture
def place(node: Place) -> Place:
    """Nothing runs, and the guard has looked."""
    for vmid in node.running():
        node.sim.control("crash", vmid=vmid)
    rest(node)
    (node.top / CONFIG.lstrip("/")).write_text(CONFIGURED.text())
    assert node.call([*node.guard, "watch"])[0]
    return node


def rest(place: Place) -> None:
    """The end of what follows a VM's end: qm cleanup and its hooks."""
    ends = time.monotonic() + 60
    while place.hooks() or any((place.top / f"run/qemu-server/{vmid}.cleanup").exists() for vmid in gone(place)):
        assert time.monotonic() < ends, place.hooks()
        place.pause()


def gone(place: Place) -> set[int]:
    return set(range(100, 106)) - set(place.running())


def asked(place: Place, *words: str) -> tuple[bool, Any]:
    good, text = place.call([*words, "--json"])
    return good, json.loads(text)


def test_mlmode_switches_says_what_runs_and_stays_idle(place: Place) -> None:
    assert asked(place, *place.mlmode, "train") == (True, {"ok": True, "mode": "train", "reasons": []})
    good, text = place.call([*place.mlmode, "infer"])
    assert good and "stopping VM 100 (vm-train) for VM 101 (vm-infer)" in text and text.endswith("mode: infer\n")
    assert set(place.running()) == {INFER}
    assert asked(place, *place.mlmode, "infer")[1]["mode"] == "infer", "it runs already"
    status = asked(place, *place.mlmode, "status")[1]
    assert (status["mode"], status["memory"]["vms_mib"]) == ("infer", 4096)
    assert asked(place, *place.mlmode, "stop")[1]["mode"] == "idle"
    assert place.call([*place.guard, "watch"])[0]
    assert not place.running()
    assert not place.leases()


def test_a_start_from_the_gui_stops_the_other_and_says_so_in_the_tasks_log(place: Place) -> None:
    assert place.by_api(TRAIN, "start")[0]
    good, log = place.by_api(INFER, "start")
    assert good
    assert "stopping VM 100 (vm-train) for VM 101 (vm-infer)" in log
    assert set(place.running()) == place.leases() == {INFER}


def test_a_guest_that_ignores_the_power_button_is_stopped(place: Place) -> None:
    hasty = replace(CONFIGURED, shutdown_timeout=1.0)
    (place.top / CONFIG.lstrip("/")).write_text(hasty.text())
    assert place.by_qm("start", TRAIN)[0]
    place.sim.control("behave", vmid=TRAIN, ignores_power_button=True)
    try:
        good, text = place.by_qm("start", INFER)
    finally:
        place.sim.control("behave", vmid=TRAIN, ignores_power_button=False)
    assert good and "qm shutdown 100 (for VM 101 (vm-infer)) has not stopped it" in text
    assert set(place.running()) == {INFER}


@pytest.mark.parametrize("way", ["api", "qm"])
def test_refusals_are_in_the_log_with_owner_and_way_out(place: Place, way: str) -> None:
    assert place.by_qm("start", CUDA)[0]
    good, log = place.by_api(POOL_A, "start") if way == "api" else place.by_qm("start", POOL_A)
    assert not good
    assert "group: VM 103 (cuda) runs, and of group three only one VM runs. Stop it first: qm shutdown 103" in log
    assert set(place.running()) == {CUDA}


def test_a_mapping_gives_what_is_left_and_then_refuses(place: Place) -> None:
    assert place.by_qm("start", CUDA)[0]
    assert place.by_qm("start", POOL_B)[0], "the other card of the mapping"
    assert place.devices()["0000:04:00.0"] == POOL_B
    assert place.by_qm("stop", CUDA)[0]
    assert place.by_qm("start", POOL_A)[0]
    assert place.devices()["0000:03:00.0"] == POOL_A
    explained = asked(place, *place.guard, "explain", str(CUDA))
    assert not explained[0]
    assert {reason["rule"] for reason in explained[1]["reasons"]} == {"group", "gpu"}


def test_memory_is_a_rule_over_all_vms(place: Place) -> None:
    assert place.by_qm("start", LAB)[0]
    assert place.by_qm("start", CUDA)[0]
    good, log = place.by_qm("start", POOL_B)
    assert not good
    assert "memory: with VM 104 (pool-b) 34816 MiB may be claimed, and this host has 32768" in log
    assert "Make 2048 MiB free" in log


def test_mlmode_gives_the_reason_that_proxmox_gives(place: Place) -> None:
    place.sim.control("lock", vmid=TRAIN, lock="snapshot")
    try:
        good, report = asked(place, *place.mlmode, "train")
    finally:
        place.sim.control("lock", vmid=TRAIN, lock=None)
    assert not good
    assert "VM is locked (snapshot)" in report["reasons"][0]["text"]


def test_a_backup_of_a_stopped_vm_switches_nothing(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    good, log = place.backup(INFER, "stop")
    assert not good
    assert "a backup of VM 101 (vm-infer) does not stop it" in log
    assert set(place.running()) == place.leases() == {TRAIN}


def test_a_backup_that_stops_its_vm_brings_it_back(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    before = place.running()
    assert place.backup(TRAIN, "stop")[0]
    assert set(place.running()) == {TRAIN} and place.running() != before
    assert asked(place, *place.mlmode, "status")[1]["mode"] == "train"
    assert place.backup(CUDA, "stop")[0], "nothing is in its way"
    assert set(place.running()) == {TRAIN}
    assert place.call([*place.guard, "watch"])[0]
    assert place.leases() == {TRAIN}


def test_a_vm_under_backup_is_not_stopped_for_another(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    place.sim.control("lock", vmid=TRAIN, lock="backup")
    try:
        good, log = place.by_qm("start", INFER)
    finally:
        place.sim.control("lock", vmid=TRAIN, lock=None)
    assert not good and "it is locked (backup) and cannot be stopped now" in log and "qm unlock 100" in log
    assert set(place.running()) == {TRAIN}


@pytest.mark.parametrize("how", ["guest-poweroff", "crash"])
def test_the_gpu_of_a_vm_that_ended_by_itself_is_free(place: Place, how: str) -> None:
    assert place.by_qm("start", CUDA)[0]
    place.sim.control(how, vmid=CUDA)
    rest(place)
    assert CUDA not in place.leases()
    assert place.by_qm("start", POOL_A)[0]


def test_whoever_got_past_the_hook_is_found_and_the_last_request_stays(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    place.sim.qm("set", INFER, "--delete", "hookscript")
    place.sim.qm("set", INFER, "--delete", "hostpci0")
    try:
        assert place.by_qm("start", INFER)[0]
        assert asked(place, *place.mlmode, "status")[1]["mode"] == "conflict"
        deaf = asked(place, *place.guard, "check")
        assert not deaf[0]
        assert any("VM 101 (vm-infer)" in check["detail"] for check in deaf[1]["checks"] if check["ok"] is False)
        good, text = place.call([*place.guard, "watch"])
        assert good, "it is put right"
        assert "stopping VM 101 (vm-infer)" in text
        assert set(place.running()) == {TRAIN}, "who was asked for by the hook is the last request that is known"
    finally:
        place.sim.qm("set", INFER, "--hookscript", place.volume)
        place.sim.qm("set", INFER, "--hostpci0", "0000:01:00")


def test_a_vm_under_ha_gives_way_and_stays_down(place: Place) -> None:
    """For such a VM qm only asks for it; what counts is that it has ended."""
    place.sim.control("set-ha", vmid=TRAIN, state="stopped")
    try:
        assert asked(place, *place.mlmode, "train")[1] == {"ok": True, "mode": "train", "reasons": []}
        assert place.by_qm("start", INFER)[0]
        assert set(place.running()) == {INFER}
        assert place.sim.control("ha")[str(TRAIN)] == "stopped", "nobody starts it again"
    finally:
        place.sim.control("set-ha", vmid=TRAIN, state=None)


def test_an_incoming_migration_takes_what_is_free_and_stops_nobody(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    name = f"etc/pve/nodes/{place.sim.node}/qemu-server/{INFER}.conf"
    config = dict(line.split(": ", 1) for line in (place.top / name).read_text().splitlines() if ": " in line)
    refused = place.sim.control("migrate-in", vmid=INFER, source="pve2", config=config)
    assert "organism-hook 101 pre-start" in refused
    assert set(place.running()) == place.leases() == {TRAIN}
    assert place.by_qm("stop", TRAIN)[0]
    assert place.sim.control("migrate-in", vmid=INFER, source="pve2", config=config) == "OK"
    assert set(place.running()) == {INFER}
    assert place.call([*place.guard, "watch"])[0]
    assert place.leases() == {INFER}


def test_a_killed_hook_starts_nothing_and_leaves_nothing(place: Place) -> None:
    assert place.by_qm("start", TRAIN)[0]
    place.sim.control("behave", vmid=TRAIN, delay=3)  # the switch takes a while
    told: list[tuple[bool, str]] = []
    ends = time.monotonic() + 120
    thread = threading.Thread(target=lambda: told.append(place.by_qm("start", INFER)))
    thread.start()
    try:
        while not (place.top / "run/organism/guard/requests/101.json").exists():
            assert time.monotonic() < ends
            place.pause()
        for process in place.hooks():
            os.kill(process, 9)
        thread.join(60)
    finally:
        place.sim.control("behave", vmid=TRAIN, delay=0.05)
    assert told and not told[0][0]
    # killed before it asked for the stop, it leaves the VM as it is; a stop that it had begun goes on without it
    soon = time.monotonic() + 20
    while TRAIN in place.running() and time.monotonic() < soon:
        place.pause()
    rest(place)
    assert set(place.running()) <= {TRAIN}
    assert place.call([*place.guard, "watch"])[0]
    assert place.leases() == set(place.running())
    assert place.by_qm("start", INFER)[0]


def test_settings_that_cannot_be_read_let_nothing_start(place: Place) -> None:
    (place.top / CONFIG.lstrip("/")).write_text("{")
    good, log = place.by_qm("start", CUDA)
    assert not good and "run the role vm_guard again" in log


def test_the_profile_is_applied_once_and_then_accepted(place: Place) -> None:
    profile = {"cuda": {"memory": 6144, "cores": 2, "sockets": 1, "numa": 1, "cpu": "host", "agent": 1}}
    raw = json.loads(CONFIGURED.text())
    (place.top / CONFIG.lstrip("/")).write_text(json.dumps({**raw, "profile": profile}))
    assert not place.call([*place.mlmode, "check", "--first"])[0]
    foretold = asked(place, *place.mlmode, "apply-profile", "--check")[1]
    done = asked(place, *place.mlmode, "apply-profile")[1]
    assert foretold == done and done["changed"]
    assert done["vms"]["103"] == {
        "memory": "6144", "cores": "2", "numa": "1", "cpu": "host", "agent": "1", "balloon": "0",
    }  # fmt: skip
    assert not asked(place, *place.mlmode, "apply-profile")[1]["changed"]
    good, report = asked(place, *place.mlmode, "check")
    assert good, report


@pytest.mark.parametrize("kills", [False, True], ids=["", "with-kills"])
def test_a_few_storms(kills: bool) -> None:
    """The long tier is ./run chaos SUITE=guard; ORGANISM_STORMS says how many here."""
    seed = int(os.environ.get("ORGANISM_SEED", random.SystemRandom().randrange(1_000_000)))
    told = storm(seed, range(int(os.environ.get("ORGANISM_STORMS", "2"))), kills)
    assert told.failure is None, f"ORGANISM_SEED={seed}: {told.failure}"
    assert told.done["samples"] > 10
    assert told.done["starts"] > 0


def test_a_look_finds_what_no_guard_keeps_apart(place: Place) -> None:
    """The check of the checks: with nothing to ask in the hook, two of a group run."""
    entry = place.top / _guard_profile.ENTRIES[0].lstrip("/")
    text = entry.read_text()
    entry.write_text("#!/bin/sh\n")
    try:
        assert place.by_qm("start", TRAIN)[0]
        place.sim.qm("set", LAB, "--delete", "hostpci0")
        assert place.by_qm("start", LAB)[0]
        found = Storm(place, random.Random(1))
        with place.watched() as line:
            found._look(line)
    finally:
        entry.write_text(text)
        place.sim.qm("stop", LAB)
        place.sim.qm("set", LAB, "--hostpci0", "0000:02:00")
    assert any("of group ml run" in text for text in found.broken)
