# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PCI mappings: complete, stable, and refused where the hardware or a VM says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from unit.pve_vm.fake import FakePve, Guest

from organism.core import _pve_mapping as pm
from organism.core._pve_mapping import Device, MappingRefused, Wish


def card(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"0000:{number:02x}:00.0",
        "class": "0x030000",
        "vendor": "0x1002",
        "device": "0x67df",
        "subsystem_vendor": "0x1DA2",
        "subsystem_device": "0xe366",
        "iommugroup": 10 + number,
        "device_name": "RX 580",
        **more,
    }


@pytest.fixture
def pve() -> FakePve:
    fake = FakePve()
    fake.pci = [card(1), card(2), card(3, iommugroup=-1), {**card(4), "subsystem_vendor": None}]
    return fake


def wish(number: int, name: str = "", **more: Any) -> Wish:
    return Wish(name or f"gpu-{number:02}", (Device(f"0000:{number:02x}:00", "pve1"),), **more)


def converge(pve: FakePve, *wishes: Wish, check: bool = False, **more: Any) -> pm.Outcome:
    return pm.converge(pve, wishes, check_mode=check, **more)


def test_a_mapping_has_all_that_a_start_compares_and_stays(pve: FakePve) -> None:
    predicted = converge(pve, wish(1), check=True)
    assert (predicted.difference.changed, pve.maps) == (True, {})
    done = converge(pve, wish(1), wish(4))
    assert pve.maps["gpu-01"]["map"] == ["node=pve1,path=0000:01:00,id=1002:67df,subsystem-id=1da2:e366,iommugroup=11"]
    assert "subsystem-id" not in pve.maps["gpu-04"]["map"][0]
    assert done.pending == {"gpu-01": ["0000:01:00"], "gpu-04": ["0000:04:00"]}
    sent = len(pve.writes)
    assert not converge(pve, wish(1), wish(4)).difference.changed
    assert len(pve.writes) == sent


def test_a_group_that_changed_is_corrected(pve: FakePve) -> None:
    converge(pve, wish(1, description="upper slot"))
    pve.pci[0]["iommugroup"] = 99
    done = converge(pve, wish(1))
    assert done.difference.changed
    assert pve.maps["gpu-01"]["map"][0].endswith("iommugroup=99")
    assert pve.maps["gpu-01"]["description"] == "upper slot"


def test_entries_of_other_nodes_stay_and_the_whole_list_is_sent(pve: FakePve) -> None:
    other = "node=pve2,path=0000:81:00,id=10de:26b9,iommugroup=3"
    pve.maps["gpu-01"] = {"map": [other]}
    converge(pve, wish(1))
    assert pve.maps["gpu-01"]["map"][0] == other
    assert len(pve.maps["gpu-01"]["map"]) == 2
    converge(pve, wish(1, description="new"))
    assert pve.writes[-1][2]["map"] == pve.maps["gpu-01"]["map"]


def test_a_concurrent_edit_is_planned_anew(pve: FakePve) -> None:
    pve.maps["gpu-01"] = {"map": []}

    def other(fake: FakePve) -> None:
        fake.maps["gpu-01"]["map"] = ["node=pve2,path=0000:81:00,id=10de:26b9"]

    pve.before_write = other
    converge(pve, wish(1))
    assert [text.split(",")[0] for text in pve.maps["gpu-01"]["map"]] == ["node=pve2", "node=pve1"]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (wish(9), r"there is no PCI device 0000:09:00; displays are 0000:01:00.0 \(RX 580\)"),
        (wish(3), "it is in no IOMMU group, so no VM can have it; switch the IOMMU on"),
        (Wish("gpu", (Device("0000:01:00", "pve1", "", {"id": "10de:26b9"}),)), "id is 1002:67df, not 10de:26b9"),
        (Wish("1gpu", (Device("0000:01:00", "pve1"),)), "a name begins with a letter"),
        (Wish("gpu"), "it names no device"),
    ],
)
def test_what_does_not_fit_the_hardware_is_refused_before_anything_is_written(
    pve: FakePve, wanted: Wish, told: str
) -> None:
    with pytest.raises(MappingRefused, match=told):
        converge(pve, wish(1), wanted)
    assert pve.writes == []


def test_one_card_in_two_mappings_is_refused(pve: FakePve) -> None:
    with pytest.raises(MappingRefused, match="0000:01:00 on node pve1 is in mapping gpu-01 and in twin"):
        converge(pve, wish(1), wish(1, "twin"))


@pytest.mark.parametrize("text", ["", "01", "0000:01:00.0.0", "gpu", "0000:zz:00"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(MappingRefused, match="is no PCI address"):
        pm.address(text)


def test_addresses_have_one_spelling() -> None:
    assert pm.path_of("01:00.0;0000:0A:00") == "0000:01:00.0;0000:0a:00"


def test_ours_that_are_no_longer_wished_for_go_unless_a_vm_has_them(pve: FakePve) -> None:
    converge(pve, wish(1), wish(2))
    pve.maps["foreign"] = {"map": []}
    pve.guests[200] = Guest({"name": "pool", "hostpci3": "mapping=gpu-02,pcie=1"})
    told = r"mapping gpu-02 is hostpci3 of VM 200 \(pool\).*qm set 200 --delete hostpci3"
    with pytest.raises(MappingRefused, match=told):
        converge(pve, wish(1), owned_prefix="gpu-")
    with pytest.raises(MappingRefused, match=told):
        pm.remove(pve, ["gpu-02"], force=False, check_mode=False)
    del pve.guests[200].config["hostpci3"]
    assert converge(pve, wish(1), owned_prefix="gpu-", check=True).difference.changed
    converge(pve, wish(1), owned_prefix="gpu-")
    assert set(pve.maps) == {"gpu-01", "foreign"}
    assert pm.remove(pve, ["gpu-01", "never"], force=False, check_mode=False).difference.changed
    assert set(pve.maps) == {"foreign"}
    converge(pve, wish(1), wish(2))
    pm.remove(pve, [], owned_prefix="gpu-", keep=["gpu-01"], force=False, check_mode=False)
    assert set(pve.maps) == {"foreign", "gpu-01"}


def test_what_proxmox_says_of_the_result_is_passed_on(pve: FakePve) -> None:
    pve.checks["gpu-01"] = [{"severity": "error", "message": "'mdev' does not match"}]
    assert converge(pve, wish(1)).problems == ["gpu-01 on node pve1: 'mdev' does not match"]
