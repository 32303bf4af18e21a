# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel says of processors, read from recordings of several kinds of machines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from organism.core import _topology
from organism.core._root import Root
from organism.core._topology import IoDevice, TopologyError

Machines = Callable[[str], Root]


def test_siblings_are_where_the_firmware_put_them(machine: Machines) -> None:
    split = _topology.read(machine("coffee_lake_12_gpus"))
    assert split.cores == ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11))
    assert split.core_of(9) == (3, 9)
    assert split.caches == (tuple(range(12)),)
    adjacent = _topology.read(machine("alder_lake_hybrid"))
    assert adjacent.cores[:2] == ((0, 1), (2, 3))
    assert adjacent.cores[-2:] == ((18,), (19,))
    with pytest.raises(KeyError):
        adjacent.core_of(20)


def test_kinds_of_cores(machine: Machines) -> None:
    assert _topology.read(machine("alder_lake_hybrid")).efficiency == (16, 17, 18, 19)
    assert _topology.read(machine("amd_apu")).efficiency == ()


def test_kinds_of_cores_by_capacity(machine: Machines) -> None:
    root = machine("amd_apu")
    for cpu in range(16):
        path = root.path(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity")
        path.write_text("1024\n" if cpu in (0, 8) else "980\n" if cpu % 8 < 4 else "500\n")
    assert _topology.read(root).efficiency == (4, 5, 6, 7, 12, 13, 14, 15)
    path.unlink()
    assert _topology.read(root).efficiency == ()


def test_nodes_and_caches_of_two_sockets(machine: Machines) -> None:
    topology = _topology.read(machine("epyc_two_sockets"))
    assert {node: (cpus[0], len(cpus)) for node, cpus in topology.nodes.items()} == {0: (0, 32), 1: (16, 32)}
    assert len(topology.caches) == 8
    assert topology.caches[1] == (4, 5, 6, 7, 36, 37, 38, 39)
    assert topology.width == 128


def test_devices_that_the_host_uses(machine: Machines) -> None:
    """Graphics cards have no say, nor has what is handed to guests."""
    root = machine("epyc_two_sockets")
    devices = {device.address: device for device in _topology.read(root).devices}
    assert sorted(device.kind for device in devices.values()) == ["nic", "nic", "nvme", "nvme"]
    near = (*range(16, 32), *range(48, 64))
    assert devices["0000:c1:00.0"] == IoDevice("0000:c1:00.0", "nvme", 1, near)
    driver = root.path("/sys/bus/pci/devices/0000:c1:00.0/driver")
    driver.unlink()
    driver.symlink_to("../../../bus/pci/drivers/vfio-pci")
    assert "0000:c1:00.0" not in {device.address for device in _topology.read(root).devices}


def test_a_device_without_a_node_is_near_to_all(machine: Machines) -> None:
    topology = _topology.read(machine("coffee_lake_12_gpus"))
    assert {device.kind for device in topology.devices} == {"nic", "nvme", "storage"}
    assert {(device.node, device.cpus) for device in topology.devices} == {(None, tuple(range(12)))}


def test_offline_cpus_leave_their_cores_and_caches(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    root.path("/sys/devices/system/cpu/online").write_text("0-6,8-11\n")
    topology = _topology.read(root)
    assert (1,) in topology.cores
    assert 7 not in topology.caches[0] and 7 not in topology.nodes[0]
    assert 7 in topology.present


def test_cache_views_that_overlap_are_one_cache(machine: Machines) -> None:
    root = machine("amd_apu")
    root.path("/sys/devices/system/cpu/cpu3/cache/index3/shared_cpu_list").write_text("3,11\n")
    assert _topology.read(root).caches == (tuple(range(16)),)


def test_a_machine_that_hides_its_caches_and_nodes(machine: Machines) -> None:
    root = machine("single_core_vm")
    for path in sorted(root.path("/sys/devices/system/cpu/cpu0/cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.path("/sys/devices/system/node/node0/cpulist").unlink()
    topology = _topology.read(root)
    assert (topology.caches, topology.nodes, topology.cores) == ((), {0: (0,)}, ((0,),))


def test_contradictions_and_missing_trees_are_named(machine: Machines, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="is /sys mounted"):
        _topology.read(Root(tmp_path))
    root = machine("coffee_lake_12_gpus")
    root.path("/sys/devices/system/cpu/cpu6/topology/core_cpus_list").write_text("1,6\n")
    with pytest.raises(TopologyError, match=r"cpu6/topology: siblings 1,6 contradict"):
        _topology.read(root)
    root.path("/sys/devices/system/cpu/cpu6/topology/core_cpus_list").write_text("?\n")
    with pytest.raises(TopologyError, match="is no CPU number"):
        _topology.read(root)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the /sys of this machine")
def test_this_machine_is_a_partition_of_cores() -> None:
    topology = _topology.read()
    assert sorted(cpu for core in topology.cores for cpu in core) == list(topology.online)
