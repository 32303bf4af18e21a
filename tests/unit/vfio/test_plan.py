# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which functions are taken, in which groups, and which never are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from organism.core import _iommu, _vfio_files, _vfio_needs
from organism.core._vfio_plan import VfioRefused
from organism.core._vfio_select import SelectError

from .host import DEFAULT, ROUTES, Host, write

Hosts = Callable[[str], Host]
AMD = {"id": "1002", "class": "display"}
SHARED = ("0000:10:00",)
TWELVE = [f"0000:{3 + number:02x}:00.{function}" for number in range(12) for function in range(2)]


def test_twelve_cards_by_maker_with_their_sound_and_nothing_of_intel(host: Hosts) -> None:
    """S1h-D01: the console's adapter (8086:3e92) and the board's sound stay."""
    plan = host("pool_host").plan(AMD, exclude=SHARED, cards=12)
    assert list(plan.taken) == TWELVE
    assert [reason for address, reason in plan.taken.items() if address.endswith(".1")] == ["companion"] * 12


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"address": "04:00.0"}, ["0000:04:00.0", "0000:04:00.1"]),
        ({"address": "0000:04:00"}, ["0000:04:00.0", "0000:04:00.1"]),
        ({"id": "1002:67DF"}, TWELVE),
        ({"id": "1002"}, TWELVE),
        ({"driver": "amdgpu"}, TWELVE),
        ({"class": "vga", "driver": "amdgpu"}, TWELVE),
        ({"id": "1002:aaf0"}, TWELVE),
    ],
)
def test_ways_to_name_cards(host: Hosts, entry: dict[str, str], wanted: list[str]) -> None:
    assert list(host("pool_host").plan(entry, exclude=SHARED).taken) == wanted


def test_a_card_that_shares_its_group_with_a_port_in_use_is_refused_with_the_whole_group(host: Hosts) -> None:
    it = host("pool_host")
    before = it.state()
    with pytest.raises(VfioRefused) as refused:
        it.plan({"id": "1002:67df"})
    text = str(refused.value)
    assert "0000:11:00.0 is network port enp17s0 (up)" in text
    for member in ("0000:10:00.0 VGA", "0000:10:00.1 audio", "0000:11:00.0 network card", "0000:00:1c.0 PCI bridge"):
        assert member in text
    assert "0000:03:00.0" not in text  # only the group that must stay
    assert "ACS override" in text
    assert it.state() == before


def test_a_port_that_nobody_uses_goes_with_its_group(host: Hosts) -> None:
    it = host("pool_host")
    port = "/sys/class/net/enp17s0"
    write(it.root, f"{port}/flags", "0x1002")
    taken = it.plan({"address": "10:00.0"}).taken
    assert taken == {"0000:10:00.0": "selected", "0000:10:00.1": "companion", "0000:11:00.0": "group"}
    # unless the node's configuration will want it at the next boot
    write(
        it.root, "/etc/network/interfaces", "iface enp17s0 inet manual\n\niface vmbr1 inet manual\n\tbridge-ports none"
    )
    assert it.plan({"address": "10:00.0"}).taken == taken
    write(it.root, "/etc/network/interfaces", "iface vmbr1 inet manual\n\tbridge-ports enp17s0\n")
    with pytest.raises(VfioRefused, match="named in /etc/network/interfaces"):
        it.plan({"address": "10:00.0"})


def test_chipset_and_network_of_the_board_stay(host: Hosts) -> None:
    it = host("pool_host")
    with pytest.raises(VfioRefused) as refused:
        it.plan({"address": "00:1f.3"})
    assert "eno1 (default route via vmbr0, port of vmbr0" in str(refused.value)
    assert "0000:00:1f.0 is the chipset's own bridge" in str(refused.value)


def test_bond_and_vlan_ports_count(host: Hosts) -> None:
    it = host("epyc_two_sockets")
    uses = _vfio_needs.ports(it.root)
    assert set(uses) == {"ens1f0np0", "ens1f1np1"}
    assert set(uses["ens1f1np1"]) == {
        "default route via vmbr0",
        "port of bond0",
        "port of vmbr0 via bond0",
        "addresses via vmbr0",
    }
    needs = _vfio_needs.needs(it.root, _iommu.functions(it.root))
    assert "0000:a1:00.1" in needs
    write(it.root, "/proc/net/route", ROUTES)
    write(it.root, "/proc/net/if_inet6", "fe800000000000000000000000000001 02 40 20 80 bond0")
    assert "addresses via bond0" not in _vfio_needs.ports(it.root)["ens1f1np1"]
    write(it.root, "/proc/net/if_inet6", "20010db8000000000000000000000001 02 40 00 80 bond0")
    assert "addresses via bond0" in _vfio_needs.ports(it.root)["ens1f1np1"]


def test_the_boot_disk_blocks_its_group(host: Hosts) -> None:
    it = host("nvidia_workstation")
    with pytest.raises(VfioRefused) as refused:
        it.plan({"address": "0b:00.0"})
    assert "0000:01:00.0 is disk nvme0n1 (boot partition, zfs_member)" in str(refused.value)
    assert "0000:0b:00.2 USB controller [10de:1ad8] (xhci_hcd)" in str(refused.value)


def test_without_udevs_word_on_pools_every_disk_counts(host: Hosts) -> None:
    it = host("nvidia_workstation")
    for name in it.root.listdir("/run/udev/data"):
        it.root.path(f"/run/udev/data/{name}").unlink()
    with pytest.raises(VfioRefused, match="may belong to a ZFS pool"):
        it.plan({"address": "0b:00.0"})


def test_mapped_disks_and_swap_are_charged_to_the_drive_below(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/sys/block/dm-0/dev", "253:0")
    it.root.path("/sys/block/dm-0/slaves").mkdir()
    it.root.path("/sys/block/dm-0/slaves/sda").symlink_to("../../sda")
    write(it.root, "/proc/self/mountinfo", "22 1 253:0 / /var rw - ext4 /dev/mapper/pve-var rw")
    write(it.root, "/proc/swaps", "Filename Type Size Used Priority\n/dev/sdb partition 1 0 -2")
    assert _vfio_needs.disks(it.root) == {"sda": ["mounted on /var"], "sdb": ["swap"]}
    assert _vfio_needs.needs(it.root, {})["0000:00:17.0"] == ["disk sda (mounted on /var)", "disk sdb (swap)"]


def test_the_only_console_stays_unless_it_is_given(host: Hosts) -> None:
    it = host("nvidia_workstation")
    give_to_vfio(it, "0000:0b:00.0")  # already belongs to a VM, so it is nobody's console
    with pytest.raises(VfioRefused, match=r"0000:0a:00\.0 VGA .* is the only console"):
        it.plan({"address": "0a:00.0"})
    taken = it.plan({"address": "0a:00.0"}, give_console=True).taken
    assert list(taken) == [f"0000:0a:00.{number}" for number in range(4)]  # sound, USB-C and UCSI come along
    write(it.root, "/sys/class/tty/console/active", "tty0 ttyS1")
    assert it.plan({"address": "0a:00.0"}).taken == taken


def give_to_vfio(it: Host, address: str) -> None:
    it.command(["modprobe", "vfio-pci"])
    it.write(f"/sys/bus/pci/devices/{address}/driver/unbind", address)
    it.write(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci")
    it.probe(address)
    assert it.driver(address) == "vfio-pci"


def test_a_card_with_the_console_may_go_where_another_adapter_stays(host: Hosts) -> None:
    assert len(host("nvidia_workstation").plan({"address": "0a:00.0"}).taken) == 4


def test_graphics_inside_a_processor(host: Hosts) -> None:
    with pytest.raises(VfioRefused, match=r"0000:05:00\.0 VGA \[1002:1638\] \(amdgpu\) is the only console"):
        host("amd_apu").plan({"driver": "amdgpu"})


def test_virtual_functions_go_alone_and_their_parent_stays(host: Hosts) -> None:
    it = host("intel_sriov")
    plan = it.plan({"id": "8086:e212", "function": "virtual"})
    assert list(plan.taken) == [f"0000:03:00.{number}" for number in (1, 2, 3)]
    assert list(it.plan({"address": "03:00.2"}).taken) == ["0000:03:00.2"]
    with pytest.raises(VfioRefused, match="3 virtual functions, which would vanish"):
        it.plan({"id": "8086", "class": "display"})
    with pytest.raises(VfioRefused, match="virtual functions"):
        it.plan({"address": "03:00.0"})


def test_nvidia_by_driver(host: Hosts) -> None:
    assert list(host("nvidia_mig").plan({"driver": "nvidia"}).taken) == ["0000:21:00.0", "0000:c1:00.0"]


def test_cards_that_are_bound_already_are_found_again(host: Hosts) -> None:
    plan = host("epyc_two_sockets").plan({"class": "display"}, mode="ids")
    assert len(plan.taken) == 4 and not plan.bind and not plan.waiting


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"address": "0000:77:00.0"},
            r"nothing .* has address 0000:77:00\.0\. Display controllers here: .*0000:04:00\.0",
        ),
        ({"address": "GPU0"}, "is no PCI address"),
        ({"id": "10de"}, "nothing on this host's PCI bus has id 10de"),
        ({"id": "radeon"}, "write vendor:device"),
        ({"class": "graphics"}, "write display, vga, 3d"),
        ({"driver": "nvidia"}, "nothing"),
        ({"function": "virtual"}, "needs one of"),
        ({"address": "00:01.0"}, "nothing"),  # a bridge
    ],
)
def test_what_is_not_there_is_said(host: Hosts, entry: dict[str, str], said: str) -> None:
    with pytest.raises(SelectError, match=said):
        host("pool_host").plan(entry)


def test_exclude(host: Hosts) -> None:
    it = host("pool_host")
    with pytest.raises(SelectError, match="exclude: there is no PCI function 0000:66:00"):
        it.plan(AMD, exclude=("0000:66:00",))
    with pytest.raises(SelectError, match="excluded, and in one IOMMU group"):
        it.plan({"address": "10:00.0"}, exclude=("0000:11:00.0",))


def test_a_card_that_is_missing_is_noticed(host: Hosts) -> None:
    with pytest.raises(VfioRefused, match="13 cards are expected and 12 were found"):
        host("pool_host").plan(AMD, exclude=SHARED, cards=13)


def test_without_an_iommu_nothing_is_taken(host: Hosts) -> None:
    it = host("pool_host")
    for name in it.root.listdir("/sys/bus/pci/devices"):
        it.root.path(f"/sys/bus/pci/devices/{name}/iommu_group").unlink()
    with pytest.raises(VfioRefused, match="without an IOMMU.*intel_iommu=on"):
        it.plan(AMD)


def test_a_kernel_without_vfio_is_refused(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/lib/modules/6.17.2-1-pve/modules.dep", "")
    with pytest.raises(VfioRefused, match="no module vfio-pci"):
        it.plan(AMD, exclude=SHARED)


def test_ids_that_catch_others_are_refused(host: Hosts) -> None:
    """S1h-D04: no part of a pool by ids."""
    with pytest.raises(VfioRefused, match=r"by ids, 0000:03:00\.0 .* nobody asked"):
        host("pool_host").plan({"address": "04:00.0"}, mode="ids")


def test_texts_of_the_files(host: Hosts) -> None:
    it = host("nvidia_workstation")
    functions = [f for f in _iommu.functions(it.root).values() if f.slot == "0000:0a:00"]
    rules = _vfio_files.rules(functions)
    assert 'KERNEL=="0000:0a:00.0", ATTR{vendor}=="0x10de", ATTR{device}=="0x1e87", GOTO="organism_vfio_take"' in rules
    assert rules.index('GOTO="organism_vfio_end"\n\nLABEL') < rules.index('ATTR{driver_override}="vfio-pci"')
    options = _vfio_files.options(functions, "ids", disable_vga=True)
    assert "options vfio-pci ids=10de:1e87,10de:10f8,10de:1ad8,10de:1ad9 disable_vga=1\n" in options
    for name in ("nouveau", "nvidia", "snd_hda_intel", "xhci_pci", "i2c_nvidia_gpu"):
        assert f"softdep {name} pre: vfio-pci\n" in options
    assert "amdgpu" not in options
    by_address = _vfio_files.options(functions, "address", disable_vga=False)
    assert "softdep nouveau pre: vfio-pci\n" in by_address and "options" not in by_address
    assert "vfio_virqfd" not in _vfio_files.modules("6.17.2-1-pve")
    assert "vfio_virqfd" in _vfio_files.modules("6.1.0-32-amd64")


def test_the_default_route_without_a_bridge(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/proc/net/route", ROUTES + DEFAULT.replace("vmbr0", "enp17s0"))
    with pytest.raises(VfioRefused, match=r"enp17s0 \(default route"):
        it.plan({"address": "10:00.0"})
