# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""community.proxmox's modules against the simulated node: it is no mirror of our own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pvesim.harness import Sim

PLAY = Path(__file__).with_name("plays") / "community.yml"


@pytest.mark.usefixtures("checked_by_schema")
def test_the_life_of_a_vm(sim: Sim, tmp_path: Path) -> None:
    sim.control("user", name="theirs@pve", password=None)
    secret = sim.control("token", user="theirs@pve", token_id="t", acl={"/": "Administrator"})
    said = {
        "port": sim.port,
        "answers": str(tmp_path / "answers.json"),
        "token_secret": secret,
        "ansible_python_interpreter": sys.executable,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", "-c", "local", str(PLAY)),
            *("-e", json.dumps(said)),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "ANSIBLE_CONFIG"}
        | {"ANSIBLE_HOME": str(tmp_path / "ansible"), "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_PIPELINING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert {name: answer["changed"] for name, answer in answers.items()} == {
        "created": True,
        "changed": True,
        "disk": True,
        "nic": True,
        "started": True,
        "info": False,
        "restarted": True,
        "stopped": True,
        "deleted": True,
        "storages": False,
    }
    assert answers["created"]["mac"]["net0"].startswith("BC:24:11:")
    (vm,) = answers["info"]["proxmox_vms"]
    assert vm["status"] == "running" and vm["name"] == "theirs"
    config = vm["config"]
    assert (config["cores"], config["onboot"], config["tags"]) == (4, 1, "gpu;pool")
    assert config["scsi1"].endswith("size=2G")
    assert f"virtio={answers['created']['mac']['net0']}" in config["net0"] and "tag=7" in config["net0"]
    assert [each["storage"] for each in answers["storages"]["proxmox_storages"]] == ["fast"]
    assert not (sim.top / "etc/pve/qemu-server/500.conf").exists()
