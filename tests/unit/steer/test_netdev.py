# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a bridge, bond, VLAN or the default route down to the ports that have queues."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.steer.trees import default_route, interface, port, write

from organism.core import _netdev
from organism.core._netdev import NetdevError
from organism.core._root import Root


@pytest.fixture
def pve(tmp_path: Path) -> Root:
    """A PVE host: vmbr0 over a bond of two ports, with a guest's tap; vmbr1 without a port; a VLAN and a macvlan."""
    for number, name in enumerate(("eno1", "eno2", "eno10")):
        port(tmp_path, name, address=f"0000:0{number + 3}:00.0")
    interface(tmp_path, "lo")
    interface(tmp_path, "tap100i0")
    interface(tmp_path, "bond0", "eno1", "eno2")
    interface(tmp_path, "vmbr0", "bond0", "tap100i0")
    interface(tmp_path, "vmbr1", "tap100i0")
    interface(tmp_path, "vmbr0.5", "vmbr0")
    interface(tmp_path, "mv0", "eno10")
    write(tmp_path / "sys/class/net/bonding_masters", "bond0")
    default_route(tmp_path, ("vmbr0", 100), ("mv0", 200))
    return Root(tmp_path)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["auto"], ["eno1", "eno2"]),
        (["vmbr0"], ["eno1", "eno2"]),
        (["vmbr0.5", "bond0"], ["eno1", "eno2"]),
        (["mv0"], ["eno10"]),
        (["eno1"], ["eno1"]),
        (["eno1", "mv0"], ["eno1", "eno10"]),
    ],
)
def test_every_way_ends_at_the_ports(pve: Root, given: list[str], found: list[str]) -> None:
    assert _netdev.ports(pve, given) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("vmbr1", "vmbr1 ends at no physical port .below it: tap100i0.; name the port itself"),
        ("eno3", "no network interface 'eno3' on this host .there are bond0, eno1"),
        ("bonding_masters/..", "no network interface"),
        ("..", "no network interface"),
        ("lo", "lo ends at no physical port .below it: nothing"),
    ],
)
def test_what_ends_nowhere_is_refused_by_name(pve: Root, given: str, said: str) -> None:
    with pytest.raises(NetdevError, match=said):
        _netdev.ports(pve, [given])


def test_auto_is_kept_by_the_name_that_it_stands_for(pve: Root) -> None:
    assert _netdev.named(pve, ["eno10", "auto", "vmbr0"]) == ("eno10", "vmbr0")


def test_without_a_route_there_is_no_auto(tmp_path: Path) -> None:
    default_route(tmp_path)
    with pytest.raises(NetdevError, match="no default route"):
        _netdev.ports(Root(tmp_path), ["auto"])


def test_a_host_with_ipv6_alone_has_a_default_route(tmp_path: Path) -> None:
    default_route(tmp_path)
    zero = "0" * 32
    lines = [
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo",
        f"{zero} 00 {zero} 00 fe80{'0' * 27}1 00000400 00000002 00000000 00000003     eno1",
    ]
    write(tmp_path / "proc/net/ipv6_route", "\n".join(lines))
    assert _netdev.default_route(Root(tmp_path)) == ["eno1"]


def test_a_ring_of_links_ends(tmp_path: Path) -> None:
    interface(tmp_path, "a", "b")
    interface(tmp_path, "b", "a")
    with pytest.raises(NetdevError, match="below it: b"):
        _netdev.ports(Root(tmp_path), ["a"])


def test_a_virtio_port_has_its_parent_s_address_and_queues_in_order(tmp_path: Path) -> None:
    port(tmp_path, "eno1", rx=12, tx=2)
    assert _netdev.address(Root(tmp_path), "eno1") == "0000:03:00.0"
    assert _netdev.queues(Root(tmp_path), "eno1", "rx")[-2:] == ["rx-10", "rx-11"]
