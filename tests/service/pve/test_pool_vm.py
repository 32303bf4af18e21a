# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role gpu_pool_vm against a simulated node: predicted, made, left alone, adopted, cold-started, taken back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pvesim.harness import Sim

from organism.core import _pve_strings
from organism.core._pve_client import PveNotFound
from service.pve.support import PASSWORD, local

PLAY = Path(__file__).with_name("plays") / "pool_vm.yml"
REPO = Path(__file__).resolve().parents[3]
CARDS = [f"0000:{number:02x}:00" for number in range(1, 13)]
ZONES = {"plan": {"lists": {"io": "1,7", "vcpu": "2-5,8-11", "host": "0,6"}}}


@pytest.fixture
def sim() -> Iterator[Sim]:
    """A node of its own for each test."""
    if os.geteuid() != 0:
        pytest.skip("pvesh and qm answer root alone: run as root")
    with Sim() as made:
        yield made


def play(sim: Sim, *words: str, expected: int = 0, **variables: Any) -> tuple[int, str]:
    """(changed tasks, output)."""
    said = {
        "ansible_python_interpreter": sys.executable,
        "cpu_plan_result": ZONES,
        "gpu_pool_vm_gpus": CARDS,
        "gpu_pool_vm_storage": "fast",
        "gpu_pool_vm_disk_gib": 4,
        "gpu_pool_vm_memory_mib": 1024,
        **variables,
    }
    link = sim.top / "collections/ansible_collections/organism/proxmox"
    if not link.exists():
        link.parent.mkdir(parents=True)
        link.symlink_to(REPO)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", "-c", "local", str(PLAY)),
            *("--diff", "-e", json.dumps(said), *words),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={
            **sim.environment(),
            "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(sim.top / "collections"),
            "ANSIBLE_HOME": str(sim.top / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_NOCOLOR": "1",
        },
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert "[WARNING]" not in done.stderr and "DEPRECATION" not in done.stderr, done.stderr
    return sum(int(number) for number in re.findall(r"changed=(\d+)", done.stdout)), done.stdout


def config(sim: Sim, vmid: int = 200) -> dict[str, str]:
    return {key: str(value) for key, value in local(sim).get(f"/nodes/pve1/qemu/{vmid}/config").items()}


def test_the_life_of_a_pool_vm(sim: Sim) -> None:
    predicted, _ = play(sim, "--check")
    with pytest.raises(PveNotFound):
        config(sim)
    changed, _ = play(sim)
    assert changed == predicted + 1, "check mode cannot start a VM that is not there"
    made = config(sim)
    assert [made[f"hostpci{n}"] for n in (0, 11)] == [
        "mapping=gpu-0000-01-00,pcie=1",
        "mapping=gpu-0000-0c-00,pcie=1",
    ]
    expected = {"machine": "q35", "bios": "ovmf", "affinity": "1,7", "balloon": "0", "tags": "organism-pool"}
    assert {key: made[key] for key in expected} == expected
    assert "queues=4" in made["net0"] and "aio=io_uring" in made["scsi0"] and "efitype=4m" in made["efidisk0"]
    vendor = sim.snippets / "organism-gpu-pool-200.yml"
    assert vendor.read_text().startswith("#cloud-config\n") and "qemu-guest-agent" in vendor.read_text()
    for words in ((), ("--check",)):
        assert play(sim, *words)[0] == 0
    assert config(sim) == made

    changed, said = play(sim, gpu_pool_vm_cores=2, gpu_pool_vm_net_queues=2)
    assert changed == 1
    assert "wait for a cold start" in said and "cores" in said
    assert play(sim, gpu_pool_vm_cores=2, gpu_pool_vm_net_queues=2, gpu_pool_vm_cold_start="auto")[0] == 1
    assert local(sim).get("/nodes/pve1/qemu/200/pending") != []
    assert all("pending" not in each for each in local(sim).get("/nodes/pve1/qemu/200/pending"))

    assert play(sim, "--check", gpu_pool_vm_state="absent")[0] > 0
    play(sim, gpu_pool_vm_state="absent")
    assert local(sim).get("/nodes/pve1/qemu/200/status/current")["status"] == "running"
    assert not [key for key in config(sim) if key.startswith("hostpci")]
    assert local(sim).get("/cluster/mapping/pci") == []
    assert play(sim, gpu_pool_vm_state="absent")[0] == 0
    play(sim, gpu_pool_vm_state="absent", gpu_pool_vm_purge=True)
    with pytest.raises(PveNotFound):
        config(sim)


def test_a_vm_that_is_there_gets_its_cards_and_nothing_else(sim: Sim) -> None:
    pve = local(sim)
    pve.post(
        "/nodes/pve1/qemu",
        vmid=200,
        name="grown",
        memory=2048,
        cores=3,
        balloon=0,
        machine="q35",
        net0="virtio=BC:24:11:AA:BB:CC,bridge=vmbr0,mtu=1400",
        scsi0="fast:2,ssd=1",
        hostpci5="0000:02:00,pcie=1,rombar=0",
    )
    before = config(sim)
    _, said = play(sim, gpu_pool_vm_gpus=CARDS[:2], expected=2)
    assert "VM 200 (grown) is there already, under another name than gpu-pool" in said
    adopt = {"gpu_pool_vm_gpus": CARDS[:2], "gpu_pool_vm_power": "unchanged", "gpu_pool_vm_adopt": True}
    play(sim, **adopt)
    after = config(sim)
    assert {key for key in after if before.get(key) != after[key]} == {"hostpci0", "hostpci5", "digest"}
    string = _pve_strings.parse_option("hostpci5", after["hostpci5"])
    assert (string.get("mapping"), string.get("rombar"), string.get("host")) == ("gpu-0000-02-00", "0", None)
    assert play(sim, **adopt)[0] == 0
    play(sim, gpu_pool_vm_state="absent", gpu_pool_vm_purge=True)
    assert config(sim)["net0"] == before["net0"], "not made by the role, so not destroyed by it"
    assert not [key for key in config(sim) if key.startswith("hostpci")]


def test_by_ticket_from_elsewhere_and_a_card_that_leaves(sim: Sim) -> None:
    api = {
        "api_host": "127.0.0.1",
        "api_port": sim.port,
        "api_ca": str(sim.ca),
        "api_user": "root@pam",
        "api_password": PASSWORD,
    }
    play(sim, gpu_pool_vm_api=api, gpu_pool_vm_gpus=CARDS[:3], gpu_pool_vm_power="unchanged")
    play(sim, gpu_pool_vm_api=api, gpu_pool_vm_gpus=[CARDS[0], CARDS[2]], gpu_pool_vm_power="unchanged")
    assert {key: value[:22] for key, value in config(sim).items() if key.startswith("hostpci")} == {
        "hostpci0": "mapping=gpu-0000-01-00",
        "hostpci2": "mapping=gpu-0000-03-00",
    }
    assert sorted(each["id"] for each in local(sim).get("/cluster/mapping/pci")) == ["gpu-0000-01-00", "gpu-0000-03-00"]


def test_a_card_that_is_not_there_and_one_too_many_are_refused_by_name(sim: Sim) -> None:
    _, said = play(sim, gpu_pool_vm_gpus=["0000:44:00"], expected=2)
    assert "there is no PCI device 0000:44:00; displays are 0000:01:00.0" in said
    _, said = play(sim, gpu_pool_vm_gpus=[f"0000:{n:02x}:00" for n in range(1, 18)], expected=2)
    assert "at most 16 GPUs" in said
    with pytest.raises(PveNotFound):
        config(sim)
