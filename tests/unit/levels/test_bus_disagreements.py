# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""All hosts of a pool must mean the same bus."""

from __future__ import annotations

from ansible_collections.organism.proxmox.plugins.filter.bus_disagreements import bus_disagreements


def test_hosts_that_agree_give_no_problem() -> None:
    same = {"bus1": ["192.0.2.11", "2001:db8::1"]}
    assert bus_disagreements({"bus1": same, "pool1": {"bus1": ["2001:db8::1", "192.0.2.11"]}}, ["bus1"]) == []


def test_one_machine_may_use_its_loopback() -> None:
    assert bus_disagreements({"box": {"127.0.0.1": ["127.0.0.1"]}}, ["box"]) == []


def test_debians_line_for_the_own_name_is_fine_on_the_bus_host_itself() -> None:
    resolved = {"bus1": {"bus1": ["127.0.1.1"]}, "pool1": {"bus1": ["192.0.2.11"]}}
    assert bus_disagreements(resolved, ["bus1"]) == []


def test_loopback_on_another_host_is_another_bus() -> None:
    resolved = {"bus1": {"127.0.0.1": ["127.0.0.1"]}, "pool1": {"127.0.0.1": ["127.0.0.1"]}}
    assert bus_disagreements(resolved, ["bus1"]) == ["pool1 would look for 127.0.0.1 on itself (127.0.0.1)"]


def test_loopback_is_no_address_of_a_cluster() -> None:
    resolved = {"bus1": {"bus1": ["127.0.1.1"]}, "bus2": {"bus1": ["192.0.2.11"]}}
    assert bus_disagreements(resolved, ["bus1", "bus2"]) == ["bus1 would look for bus1 on itself (127.0.1.1)"]


def test_different_addresses_are_told_with_their_hosts() -> None:
    resolved = {"a": {"bus": ["192.0.2.1"]}, "b": {"bus": ["192.0.2.2"]}, "c": {"bus": ["192.0.2.1"]}}
    assert bus_disagreements(resolved, ["a"]) == ["bus is not the same everywhere: 192.0.2.1 on a, c; 192.0.2.2 on b"]
