# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two modules as Ansible runs them, in check mode on the machine at hand: nothing of it is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def module(name: str, /, **arguments: Any) -> dict[str, Any]:
    """The module's result in check mode; a refusal is a result, too."""
    given = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": True, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, "-m", f"ansible_collections.organism.proxmox.plugins.modules.{name}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def masks() -> dict[str, str]:
    return {str(path): path.read_text() for path in Path("/proc/irq").glob("*/smp_affinity_list")}


@pytest.fixture
def cpu() -> str:
    if not Path("/proc/irq").is_dir() or not Path("/sys/devices/system/cpu/online").exists():
        pytest.skip("no /proc/irq or no CPUs in sysfs here")
    return "0"


def test_interrupts_are_told_and_left(cpu: str) -> None:
    before = masks()
    result = module("irq_affinity", host_cpus=cpu, io_cpus=cpu, vcpu_cpus=cpu)
    assert not result.get("failed"), result["msg"]
    assert result["zones"] == {"host": "0", "vcpu": "0", "io": "0"}
    assert len(result["irqs"]) == sum(result["summary"].values())
    assert result["changed"] and "steer.json" in result["diff"]["after"]
    assert masks() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"devices": {"eno99": "io"}}, "no such device: eno99"),
        ({"io_cpus": "9000"}, "CPU 9000 is beyond"),
        ({"io_cpus": "4000"}, "CPU 4000 is not online"),
        ({"io_cpus": "3-1"}, "reversed"),
        ({"kinds": {"gpu": "io"}}, "no such kind of device: gpu"),
        ({"drift_check": 0}, "drift_check must be 1 second or more"),
    ],
)
def test_wrong_wishes_are_refused_by_name(cpu: str, arguments: dict[str, Any], said: str) -> None:
    result = module("irq_affinity", **{"host_cpus": cpu, "io_cpus": cpu, "vcpu_cpus": cpu, **arguments})
    assert result["failed"] and said in result["msg"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"interfaces": ["eno99"]}, "no network interface 'eno99'"),
        ({"interfaces": ["lo"]}, "lo ends at no physical port"),
        ({"interfaces": [], "flow_entries": 1000}, "power of two"),
        ({"interfaces": [], "channels": "many"}, "channels must be auto, keep or a number"),
        ({"interfaces": [], "coalesce": {"rx-usecs": 0}}, "rx-usecs"),
        ({"interfaces": [], "name": "../x"}, "a wish's name is lower case"),
    ],
)
def test_wrong_ports_and_values_are_refused_by_name(cpu: str, arguments: dict[str, Any], said: str) -> None:
    result = module("nic_steering", io_cpus=cpu, **arguments)
    assert result["failed"] and said in result["msg"]


def test_nothing_to_take_back_is_no_change() -> None:
    assert not module("nic_steering", name="of-a-test", state="absent")["changed"]
