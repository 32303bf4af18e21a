# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cards and their sensors, from sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.gpu.trees import Card, kfd_node, make_tree, rx580, write

from organism.core._gpu import discover, mig_instances, visible_index
from organism.core._gpu_metrics import Readings, read_sysfs
from organism.core._root import Root

NVIDIA = Card(
    "0000:65:00.0", vendor="0x10de", device="0x2335", kind="0x030200", driver="nvidia", uuid="GPU-8a2b", vram_mb=None
)


def test_cards_are_found_by_class_and_maker_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    make_tree(tmp_path, [NVIDIA, rx580("0000:0b:00.0", 129), rx580("0000:03:00.0", 128)])
    found = discover(Root(tmp_path))
    assert [gpu.address for gpu in found] == ["0000:03:00.0", "0000:0b:00.0", "0000:65:00.0"]
    first, _, nvidia = found
    assert first.model == "Ellesmere [Radeon RX 470/480/570/570X/580/580X/590]"
    assert (first.backend, first.card, first.render, first.vram_mb) == ("amdgpu", "card0", "renderD128", 8192)
    assert (first.uuid, first.unusable) == (None, "")
    assert (nvidia.backend, nvidia.model, nvidia.uuid, nvidia.vram_mb) == ("nvml", "NVIDIA H200", "GPU-8a2b", 0)


def test_a_card_that_is_not_ours_to_use_says_why(tmp_path: Path) -> None:
    passed_on = Card("0000:03:00.0", driver="vfio-pci")
    bare = Card("0000:04:00.0", driver=None)
    old = Card("0000:05:00.0", driver="radeon")
    make_tree(tmp_path, [passed_on, bare, old])
    reasons = [gpu.unusable for gpu in discover(Root(tmp_path))]
    assert reasons == [
        "it is reserved for a virtual machine (driver vfio-pci)",
        "no driver is bound to it (amdgpu is needed)",
        "driver radeon cannot compute (amdgpu is needed)",
    ]


def test_without_a_list_of_names_a_card_is_called_by_its_numbers(tmp_path: Path) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128)])
    (tmp_path / "usr/share/misc/pci.ids").unlink()
    assert discover(Root(tmp_path))[0].model == "1002:67df"


def test_sensors_come_in_the_units_of_the_bus(tmp_path: Path) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128)])
    readings = read_sysfs(Root(tmp_path), "/sys/bus/pci/devices/0000:03:00.0")
    assert readings == Readings(37, 12, 54, 1180, 87.123, 8192, 512)


@pytest.mark.parametrize("broken", ["", "N/A", "65535", "-1"])
def test_what_a_card_does_not_tell_is_absent_and_never_zero(tmp_path: Path, broken: str) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128)])
    device = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    write(device / "gpu_busy_percent", broken)
    (device / "hwmon/hwmon3/power1_average").unlink()
    (device / "hwmon/hwmon3/fan1_input").unlink()
    readings = read_sysfs(Root(tmp_path), "/sys/bus/pci/devices/0000:03:00.0")
    assert (readings.gpu_busy_percent, readings.fan_rpm, readings.power_w) == (None, None, None)
    assert readings.temp_c == 54
    write(device / "hwmon/hwmon3/power1_input", "91000000")
    assert read_sysfs(Root(tmp_path), "/sys/bus/pci/devices/0000:03:00.0").power_w == 91
    assert read_sysfs(Root(tmp_path), "/sys/bus/pci/devices/0000:99:00.0") == Readings()


def test_rocm_counts_gpu_nodes_only(tmp_path: Path) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128), rx580("0000:04:00.0", 129), rx580("0000:05:00.0", 130)])
    kfd_node(tmp_path, 0, simd=0)
    kfd_node(tmp_path, 1, simd=144, minor=130)  # not in the order of the bus
    kfd_node(tmp_path, 2, simd=144, minor=128)
    root = Root(tmp_path)
    positions = {gpu.render: visible_index(root, gpu) for gpu in discover(root)}
    assert positions == {"renderD128": 1, "renderD129": None, "renderD130": 0}


def test_a_card_split_by_mig_gives_way_to_its_instances(tmp_path: Path) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128), NVIDIA])
    listing = (
        "GPU 0: NVIDIA H200 (UUID: GPU-8a2b)\n"
        "  MIG 3g.71gb     Device  0: (UUID: MIG-11aa)\n"
        "  MIG 1g.18gb     Device  1: (UUID: MIG-22bb)\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-elsewhere)\n"
        "  MIG 1g.18gb     Device  0: (UUID: MIG-33cc)\n"
    )
    cards = discover(Root(tmp_path))
    split = mig_instances(listing, cards)
    assert [(gpu.address, gpu.uuid, gpu.vram_mb) for gpu in split] == [
        ("0000:03:00.0", None, 8192),
        ("0000:65:00.0", "MIG-11aa", 71 * 1024),
        ("0000:65:00.0", "MIG-22bb", 18 * 1024),
    ]
    assert split[1].model == "NVIDIA H200 MIG 3g.71gb"
    assert mig_instances("", cards) == cards
