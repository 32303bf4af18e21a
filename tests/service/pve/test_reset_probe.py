# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbook and module gpu_reset_probe on a simulated node, whose sysfs stands in for this machine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pvesim.harness import Sim

from service.pve.support import local

REPO = Path(__file__).resolve().parents[3]
PLAYBOOK = REPO / "playbooks" / "gpu_reset_probe.yml"
VM, HANG_S = 700, 1800
GOOD, BAD = "0000:01:00.0", "0000:02:00.0"


@pytest.fixture
def sim() -> Iterator[Sim]:
    """A node of its own for each test, with a VM that has two cards, which do not come to life before they are used."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace wants root")
    with Sim() as made:
        made.qm("create", VM, "--name", "gpu-pool", "--memory", 512, "--machine", "q35", "--balloon", 0,
                "--hostpci0", "0000:01:00,pcie=1", "--hostpci1", "0000:02:00,pcie=1")  # fmt: skip
        (made.bin / "dmesg").write_text('#!/bin/sh\ncat "${0%/bin/dmesg}/var/log/kernel" 2>/dev/null || :\n')
        (made.bin / "dmesg").chmod(0o755)
        yield made


def on_the_node(sim: Sim, *words: str | Path) -> tuple[int, dict[str, Any]]:
    """Run a program of Ansible where /sys and /etc/pve are the node's: exit code, and the report of callback json."""
    link = sim.top / "collections/ansible_collections/organism/proxmox"
    if not link.exists():
        link.parent.mkdir(parents=True)
        link.symlink_to(REPO)
    made = not Path("/etc/pve").exists()
    Path("/etc/pve").mkdir(exist_ok=True)
    script = 'mount --bind "$0/sys" /sys && mount --bind "$0/etc/pve" /etc/pve && exec "$@"'
    inventory = sim.top / "inventory.yml"
    inventory.write_text(json.dumps({"pve": {"hosts": {"pve1": {
        "ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable,
    }}}}))  # fmt: skip
    try:
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(sim.top)),
                *(sys.executable, "-m", "ansible", "playbook", "-i", str(inventory), *map(str, words)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
            env={
                **sim.environment(),
                "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(sim.top / "collections"),
                "ANSIBLE_HOME": str(sim.top / "ansible"),
                "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            },
        )
    finally:
        if made:
            Path("/etc/pve").rmdir()
    assert "{\n" in done.stdout, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout[done.stdout.index("{\n") :])


def probe(sim: Sim, *words: str, **variables: Any) -> tuple[int, dict[str, Any]]:
    """The playbook: exit code, and the result of its probe."""
    said = {"gpu_reset_probe_vm": "gpu-pool", "gpu_reset_probe_run_seconds": 0, **variables}
    code, report = on_the_node(sim, PLAYBOOK, "-e", json.dumps(said), *words)
    tasks = [task for play in report["plays"] for task in play["tasks"]]
    return code, next(
        (task["hosts"]["pve1"] for task in reversed(tasks) if task["task"]["name"].startswith("Start and stop")),
        tasks[-1]["hosts"]["pve1"],
    )


def starts(sim: Sim) -> int:
    return len(sim.control("starts"))


def running(sim: Sim) -> bool:
    return str(VM) in sim.control("machines")


def test_ten_cycles_and_a_line_each_card(sim: Sim) -> None:
    foretold_code, foretold = probe(sim, "--check")
    assert (foretold_code, foretold["changed"], starts(sim)) == (0, True, 0)
    assert "would start and stop VM 700 (gpu-pool) 10 times" in foretold["msg"]
    assert [card["address"] for card in foretold["cards"]] == [GOOD, BAD]

    code, result = probe(sim)
    assert (code, result["passed"], result["cycles_done"], starts(sim)) == (0, True, 10, 10)
    assert [(card["address"], card["passed"], card["reset"]) for card in result["cards"]] == [
        (GOOD, 10, ["bus"]),
        (BAD, 10, ["bus"]),
    ]
    assert result["table"] == [f"ok    {address}  10 of 10  reset bus" for address in (GOOD, BAD)]
    assert not running(sim)


def test_a_card_that_does_not_come_back_in_the_third_cycle(sim: Sim) -> None:
    sim.control("break-reset", slot="0000:02:00", stops=3)
    code, result = probe(sim)
    assert code == 2 and "cards" in result, result
    assert (result["failed"], result["passed"], result["cycles_done"], starts(sim)) == (True, False, 3, 3)
    good, bad = result["cards"]
    assert (good["address"], good["good"], good["passed"]) == (GOOD, True, 3)
    assert (bad["address"], bad["good"], bad["passed"]) == (BAD, False, 2)
    assert [each["cycle"] for each in bad["failed"]] == [3]
    assert "configuration space is all ones" in bad["failed"][0]["reasons"][0]
    assert BAD in result["msg"] and "cycle 3" in result["msg"]
    assert not running(sim)
    code, result = probe(sim)
    assert (code, starts(sim)) == (2, 0), "a card that is dead already is no card to be started with"
    assert f"{BAD} does not answer even now" in result["msg"]


def test_what_is_refused_starts_nothing(sim: Sim) -> None:
    sim.qm("create", 701, "--name", "cardless", "--memory", 512)
    for variables, told in (
        ({"gpu_reset_probe_vm": "nobody"}, "nobody"),
        ({"gpu_reset_probe_vm": "cardless"}, "has no card on pve1"),
        ({"gpu_reset_probe_cycles": 0}, "cycles must be 1 or more"),
        ({"gpu_reset_probe_cycles": "often"}, "often"),
        ({"gpu_reset_probe_run_seconds": -5}, "run_seconds"),
    ):
        for words in ((), ("--check",)):
            code, result = probe(sim, *words, **variables)
            assert (code, result["failed"]) == (2, True), (variables, result)
            assert told in result["msg"], result["msg"]
    assert starts(sim) == 0
    sim.qm("start", VM)
    assert starts(sim) == 1
    pid = sim.control("machines")[str(VM)]
    code, result = probe(sim)
    assert code == 2 and "runs, and the probe would stop it 10 times" in result["msg"]
    assert sim.control("machines")[str(VM)] == pid, "the VM that runs is left alone"


def test_the_module_alone_goes_on_after_a_failure_and_puts_a_running_vm_back(sim: Sim) -> None:
    play = sim.top / "play.yml"
    task = {"organism.proxmox.gpu_reset_probe": {
        "vmid": VM, "cycles": 2, "run_seconds": 0, "interrupt": True, "shutdown_timeout": 5,
    }}  # fmt: skip
    play.write_text(json.dumps([{"hosts": "pve", "gather_facts": False, "tasks": [{"name": "probe", **task}]}]))
    sim.qm("start", VM)
    code, _report = on_the_node(sim, play)
    assert code == 0
    assert running(sim), "what ran before runs again"
    assert local(sim).get(f"/nodes/pve1/qemu/{VM}/status/current")["status"] == "running"
    sim.control("break-reset", slot="0000:01:00", stops=2)
    task["organism.proxmox.gpu_reset_probe"] |= {"cycles": 4, "go_on": True}
    play.write_text(json.dumps([{"hosts": "pve", "gather_facts": False, "tasks": [{"name": "probe", **task}]}]))
    code, report = on_the_node(sim, play)
    result = report["plays"][0]["tasks"][0]["hosts"]["pve1"]
    assert (code, result["cycles_done"]) == (2, 4)
    assert [each["cycle"] for each in result["cards"][0]["failed"]] == [1, 2, 3, 4]
    assert not running(sim), "a VM with a dead card is not started again"
