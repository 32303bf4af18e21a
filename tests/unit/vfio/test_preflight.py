# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host is told of its IOMMU before any card is given away, as library, command and module."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from organism.core import _iommu_preflight
from organism.core._preflight import Record
from organism.host import iommu

from .host import Host, write

Hosts = Callable[[str], Host]


def records(it: Host) -> dict[str, Record]:
    return {record.check: record for record in _iommu_preflight.report(it.root).records}


def without_groups(it: Host) -> None:
    for name in it.root.listdir("/sys/bus/pci/devices"):
        it.root.path(f"/sys/bus/pci/devices/{name}/iommu_group").unlink()


def test_verdicts(host: Hosts) -> None:
    report = _iommu_preflight.report(host("pool_host").root)
    assert report.ready and report.tokens == {"intel_iommu": "on", "iommu": "pt"}
    cards = {card.address: card for card in report.cards}
    assert len(cards) == 14 and cards["0000:00:02.0"].console
    assert [cards[f"0000:{3 + number:02x}:00.0"].verdict for number in range(12)] == ["own group"] * 12
    assert cards["0000:10:00.0"].verdict == "must stay"
    assert cards["0000:10:00.0"].beside == ("0000:11:00.0",)
    assert cards["0000:10:00.0"].reasons == ("0000:11:00.0 is network port enp17s0 (up)",)


def test_a_group_with_a_port_that_nobody_uses_is_shared(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/sys/class/net/enp17s0/flags", "0x1002")
    card = next(card for card in _iommu_preflight.report(it.root).cards if card.address == "0000:10:00.0")
    assert card.verdict == "shared group" and "0000:11:00.0 network card" in card.reasons[0]


def test_amd_needs_no_switch(host: Hosts) -> None:
    assert _iommu_preflight.report(host("nvidia_workstation").root).tokens == {"iommu": "pt"}


@pytest.mark.parametrize(
    ("line", "said", "step"),
    [
        ("quiet", "intel_iommu=on is not set", "role gpu_passthrough"),
        ("intel_iommu=on quiet", "has no groups", "DMAR or AMD-Vi in dmesg"),
        ("intel_iommu=off", "switched off by intel_iommu=off", "take that off"),
        ("iommu=off", "switched off by iommu=off", "take that off"),
    ],
)
def test_an_iommu_that_is_off(host: Hosts, line: str, said: str, step: str) -> None:
    it = host("pool_host")
    without_groups(it)
    write(it.root, "/proc/cmdline", line)
    found = records(it)
    assert (found["kernel"].status, found["firmware"].status) == ("fail", "fail")
    assert said in found["kernel"].detail and step in found["kernel"].next
    write(it.root, "/sys/firmware/acpi/tables/DMAR", "x")
    assert records(it)["firmware"].detail == "Intel VT-d (DMAR)"


def test_an_override_is_told_and_explained_and_never_proposed(host: Hosts) -> None:
    it = host("pool_host")
    assert records(it)["ACS override"].status == "ok"
    write(it.root, "/proc/cmdline", "pcie_acs_override=downstream,multifunction quiet")
    found = records(it)["ACS override"]
    assert found.status == "warn" and "pcie_acs_override=downstream,multifunction" in found.detail
    assert "take it off" in found.next
    assert "pcie_acs_override" not in json.dumps(_iommu_preflight.report(it.root).as_dict()["tokens"])


def test_leftovers_of_recipes(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/etc/modprobe.d/vfio-pci-ids.conf", "options vfio-pci ids=1002:67df,1002:aaf0 disable_vga=1")
    write(it.root, "/etc/modprobe.d/blacklist-amd-gpu.conf", "blacklist amdgpu\nblacklist radeon\n# blacklist i915")
    write(it.root, "/etc/modules-load.d/vfio.conf", "vfio\nvfio_virqfd")
    found = records(it)
    assert "every card of a kind" in found["/etc/modprobe.d/vfio-pci-ids.conf"].detail
    assert "keeps amdgpu, radeon away" in found["/etc/modprobe.d/blacklist-amd-gpu.conf"].detail
    assert "since Linux 6.2" in found["/etc/modules-load.d/vfio.conf"].detail
    it.have({"address": "05:00"}, disable_vga=True)
    assert not any("organism" in name for name in records(it))  # our own files are none


def test_interrupts(host: Hosts) -> None:
    it = host("pool_host")
    assert records(it)["interrupts"].status == "ok"
    write(it.root, "/proc/interrupts", "  24:  0  PCI-MSI  eno1")
    assert "x2APIC" in records(it)["interrupts"].next
    write(it.root, "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")
    assert "any" in records(it)["interrupts"].detail


def test_the_command_for_people_and_for_machines(host: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    it = host("pool_host")
    assert iommu.main(["--root", str(it.root.top)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("card "))
    row = next(line for line in lines if line.startswith("0000:04:00.0"))
    assert row.index("amdgpu") == head.index("driver") and row.index("own group") == head.index("verdict")
    assert "  0000:10:00.0: 0000:11:00.0 is network port enp17s0 (up)" in lines
    assert "pcie_acs_override= only makes the kernel list smaller groups" in text
    assert iommu.main(["--root", str(it.root.top), "--groups"]) == 0
    assert "0000:00:1f.4 SMBus [8086:a2a3] (i801_smbus)" in capsys.readouterr().out
    assert iommu.main(["--root", str(it.root.top), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == _iommu_preflight.report(it.root).as_dict()
    without_groups(it)
    assert iommu.main(["--root", str(it.root.top), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False
    with pytest.raises(SystemExit) as end:
        iommu.main(["--unknown"])
    assert end.value.code == 2


def test_no_explanation_where_nothing_is_shared(host: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    iommu.main(["--root", str(host("intel_sriov").root.top)])
    assert "pcie_acs_override=" not in capsys.readouterr().out


def test_models_come_from_pci_ids(host: Hosts) -> None:
    it = host("pool_host")
    ids = "# pci.ids\n1002  Advanced Micro Devices\n\t67df  Ellesmere [Radeon RX 580]\n\t\t1da2 e366  Nitro+\n8086  I\n"
    write(it.root, "/usr/share/misc/pci.ids", ids)
    models = {card.model for card in _iommu_preflight.report(it.root).cards}
    assert models == {"Ellesmere [Radeon RX 580]", "8086:3e92"}
