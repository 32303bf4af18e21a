# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the stacks' tools say, read."""

from __future__ import annotations

import pytest
from unit.worker.stack_outputs import Cl, clinfo, khr, nvidia_smi, recorded, rocminfo, vulkaninfo

from organism.worker.stacks import Device, parse_clinfo, parse_nvidia_smi, parse_rocminfo, parse_vulkaninfo


def test_a_recorded_pocl_is_a_cpu() -> None:
    (device,) = parse_clinfo(recorded("clinfo_pocl.txt"))
    assert (device.stack, device.driver, device.cpu) == ("opencl", "Portable Computing Language", True)
    assert device.name.startswith("pthread-skylake-avx512")
    assert not device.address


def test_a_recorded_llvmpipe_is_a_cpu() -> None:
    (device,) = parse_vulkaninfo(recorded("vulkaninfo_llvmpipe.txt"))
    assert device == Device(
        "vulkan", "llvmpipe (LLVM 15.0.6, 256 bits)", "llvmpipe Mesa 22.3.6 (LLVM 15.0.6)", cpu=True
    )


def test_platforms_that_share_a_suffix_keep_their_devices() -> None:
    text = clinfo({"Clover": [Cl("RX 580 one"), Cl("RX 580 two")], "rusticl": [Cl("RX 580 three")]})
    assert [(device.driver, device.name) for device in parse_clinfo(text)] == [
        ("Clover", "RX 580 one"),
        ("Clover", "RX 580 two"),
        ("rusticl", "RX 580 three"),
    ]


@pytest.mark.parametrize(
    ("place", "vendor", "address"),
    [
        (khr("0000:0a:00.0"), "0x1002", "0000:0a:00.0"),
        ("CL_DEVICE_TOPOLOGY_AMD       PCI-E, 0000:0a:00.1", "0x1002", "0000:0a:00.1"),
        ("CL_DEVICE_TOPOLOGY_AMD       PCI-E, 0a:00.0", "0x1002", "0a:00.0"),
        ("CL_DEVICE_UUID_KHR           00000000-0a00-0000-0000-000000000000", "0x1002", "0000:0a:00.0"),
        ("CL_DEVICE_UUID_KHR           00000000-0a00-0000-0000-000000000000", "0x8086", ""),
        ("CL_DEVICE_UUID_KHR           91c0b9f4-e340-3c73-1422-c227930ae260", "0x1002", ""),
        (
            "CL_DEVICE_PCI_BUS_ID_NV   10\nCL_DEVICE_PCI_SLOT_ID_NV   9\nCL_DEVICE_PCI_DOMAIN_ID_NV   1",
            "0x10de",
            "0001:0a:01.1",
        ),
        ("CL_DEVICE_PCI_BUS_ID_NV   10\nCL_DEVICE_PCI_SLOT_ID_NV   0", "0x10de", "0a:00.0"),
        ("", "0x1002", ""),
    ],
)
def test_each_way_in_which_opencl_tells_the_address(place: str, vendor: str, address: str) -> None:
    (device,) = parse_clinfo(clinfo({"any": [Cl("card", vendor, place)]}))
    assert device.address == address


def test_an_opencl_device_that_cannot_be_used_says_why() -> None:
    away, bare = parse_clinfo(clinfo({"Clover": [Cl("a", available=False), Cl("b", compiler=False)]}))
    assert "not available" in away.broken
    assert "compiler" in bare.broken


@pytest.mark.parametrize("pci", [True, False], ids=["by the extension", "by RADV's UUID"])
def test_vulkan_devices_by_address(pci: bool) -> None:
    devices = parse_vulkaninfo(vulkaninfo(["0000:03:00.0", "0000:1b:00.0"], pci=pci))
    assert [device.address for device in devices] == ["0000:03:00.0", "0000:1b:00.0"]
    assert {(device.vendor, device.driver, device.cpu) for device in devices} == {("amd", "radv Mesa 22.3.6", False)}


def test_rocm_agents_by_address_and_what_it_dropped() -> None:
    cpu, card = parse_rocminfo(rocminfo(["0000:1b:00.1"]))
    assert cpu.cpu
    assert (card.address, card.name, card.driver, card.cpu) == ("1b:00.1", "Radeon RX 580 Series", "gfx803", False)
    assert "dropped" in card.note
    assert not parse_rocminfo(rocminfo(["0000:1b:00.0"], isa="gfx1030"))[1].note


def test_cuda_is_more_than_a_driver_that_answers() -> None:
    (card,) = parse_nvidia_smi(nvidia_smi(["0000:1b:00.0"]))
    assert (card.address, card.name, card.driver, card.broken) == ("0000:1b:00.0", "NVIDIA H200", "CUDA 12.4", "")
    (card,) = parse_nvidia_smi(nvidia_smi(["0000:1b:00.0"], cuda="Not Found"))
    assert "libcuda" in card.broken


@pytest.mark.parametrize("parse", [parse_clinfo, parse_vulkaninfo, parse_rocminfo, parse_nvidia_smi])
@pytest.mark.parametrize("text", ["", "GPU0:\n", "[X/0]\n[X/0] CL_DEVICE_NAME\n", "Agent 1\n", "GPU x\n"])
def test_an_answer_without_devices_has_none(parse: object, text: str) -> None:
    assert callable(parse)
    assert parse(text) == []
