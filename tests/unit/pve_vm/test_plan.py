# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a configuration and wishes to the one change: what is not named stays as it was written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _pve_vm_plan as vp
from organism.core._pve_vm_plan import WishRefused

CONFIG: dict[str, Any] = {
    "agent": "1,fstrim_cloned_disks=1",
    "bios": "ovmf",
    "boot": "order=scsi0;net0",
    "cores": 4,
    "cpu": "host",
    "efidisk0": "tank:vm-200-disk-0,efitype=4m,pre-enrolled-keys=1,size=1M",
    "hostpci0": "mapping=gpu-01,pcie=1,rombar=0",
    "machine": "pc-q35-9.2+pve1",
    "memory": "16384",
    "name": "gpu-pool",
    "net0": "virtio=BC:24:11:AA:BB:CC,bridge=vmbr0,firewall=1,queues=4,future=7",
    "scsi0": "tank:vm-200-disk-1,aio=io_uring,discard=on,iothread=1,size=64G",
    "scsihw": "virtio-scsi-single",
    "tags": "gpu;organism",
}


def plan(wishes: dict[str, Any], config: dict[str, Any] | None = None) -> vp.ConfigPlan:
    return vp.plan(CONFIG if config is None else config, vp.read_wishes(wishes))


@pytest.mark.parametrize(
    "wishes",
    [
        {"cores": "4", "cpu": "host", "memory": 16384, "bios": "ovmf"},
        {"memory": {"current": 16384}},
        {"machine": "q35"},
        {"agent": True},
        {"agent": {"enabled": 1}},
        {"onboot": False, "numa": 0, "protection": False, "ostype": "other"},
        {"net0": {"bridge": "vmbr0", "queues": 4, "macaddr": "bc:24:11:aa:bb:cc"}},
        {"net0": "virtio,bridge=vmbr0,link_down=0"},
        {"scsi0": {"discard": True, "iothread": "yes", "file": "tank:64"}},
        {"scsi0": {"size": "64G", "import-from": "local:import/debian.qcow2", "file": "other:0"}},
        {"hostpci0": {"mapping": "gpu-01", "pcie": True, "x-vga": False}},
        {"tags": ["Organism", "gpu"]},
        {"boot": ["scsi0", "net0"]},
        {"ide2": None, "affinity": None},
    ],
)
def test_what_is_there_already_is_no_change(wishes: dict[str, Any]) -> None:
    made = plan(wishes)
    assert not made
    assert not made.difference.changed


def test_a_mac_and_what_nobody_named_survive_a_change() -> None:
    made = plan({"net0": {"bridge": "vmbr1", "queues": 2}})
    assert made.sets == {"net0": "virtio=BC:24:11:AA:BB:CC,bridge=vmbr1,firewall=1,queues=2,future=7"}


def test_a_changed_model_keeps_the_mac() -> None:
    assert plan({"net0": {"model": "e1000"}}).sets["net0"].startswith("e1000=BC:24:11:AA:BB:CC,bridge=vmbr0")


def test_a_sub_option_and_an_option_are_removed_by_null() -> None:
    made = plan({"agent": {"fstrim_cloned_disks": None}, "tags": None})
    assert made.sets == {"agent": "1"}
    assert made.deletes == ["tags"]
    assert made.difference.changed


def test_a_volume_stays_when_its_options_change() -> None:
    made = plan({"scsi0": {"file": "tank:64", "cache": "none", "ssd": True}})
    assert made.sets == {"scsi0": "tank:vm-200-disk-1,aio=io_uring,discard=on,iothread=1,size=64G,cache=none,ssd=1"}
    assert not made.allocates


def test_a_volume_grows_and_never_shrinks_or_changes() -> None:
    assert plan({"scsi0": {"size": "100G"}}).grows == {"scsi0": "100G"}
    assert not plan({"scsi0": {"size": "65536M"}})
    with pytest.raises(WishRefused, match="scsi0: tank:vm-200-disk-1 has 64G, and 32G would shrink it"):
        plan({"scsi0": {"size": "32G"}})
    with pytest.raises(WishRefused, match="tank:vm-9-disk-0 would take its place; volumes are not replaced"):
        plan({"scsi0": {"file": "tank:vm-9-disk-0"}})


def test_what_a_volume_was_made_with_is_told_and_kept() -> None:
    made = plan({"efidisk0": {"file": "tank:1", "efitype": "4m", "pre-enrolled-keys": 0}})
    assert not made
    assert made.kept == [
        "efidisk0: pre-enrolled-keys stays 1, as tank:vm-200-disk-0 was made with it (0 is for a new volume)"
    ]


def test_a_new_vm_gets_each_string_with_its_default_key_first() -> None:
    made = plan(
        {
            "net0": {"bridge": "vmbr0", "model": "virtio", "queues": 4},
            "net1": {"bridge": "vmbr0", "macaddr": "BC:24:11:00:00:01", "model": "virtio"},
            "scsi0": {"iothread": 1, "file": "tank:0", "import-from": "local:import/d.qcow2", "size": "64G"},
            "efidisk0": {"file": "tank:1", "efitype": "4m"},
            "ide2": "tank:cloudinit",
            "boot": {"order": ["scsi0"]},
            "onboot": 0,
        },
        {},
    )
    assert made.sets == {
        "net0": "virtio,bridge=vmbr0,queues=4",
        "net1": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
        "scsi0": "tank:0,iothread=1,import-from=local:import/d.qcow2",
        "efidisk0": "tank:1,efitype=4m",
        "ide2": "tank:cloudinit",
        "boot": "order=scsi0",
    }
    assert made.grows == {"scsi0": "64G"}
    assert made.allocates


def test_a_drive_that_is_not_there_must_say_what_to_make() -> None:
    with pytest.raises(WishRefused, match="scsi3: the VM has no such drive, and file says not what to make"):
        plan({"scsi3": {"ssd": 1}})


def test_a_raw_gpu_becomes_a_mapping_and_keeps_its_other_options() -> None:
    config = {"hostpci0": "0000:01:00,pcie=1,rombar=0"}
    assert plan({"hostpci0": {"mapping": "gpu-01"}}, config).sets == {"hostpci0": "pcie=1,rombar=0,mapping=gpu-01"}


def test_keys_are_compared_as_lines_and_sent_encoded() -> None:
    config = {"sshkeys": "ssh-ed25519%20AAA%2B%20me%0Assh-rsa%20BBB%20you%0A"}
    same = plan({"sshkeys": ["ssh-ed25519 AAA+ me", "ssh-rsa BBB you"]}, config)
    assert not same
    made = plan({"sshkeys": "ssh-ed25519 CCC"}, config)
    assert made.sets == {"sshkeys": "ssh-ed25519%20CCC"}
    assert made.difference.changes[0].after == "ssh-ed25519 CCC"


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"core": 4}, "core: a VM has no such option; did you mean cores?"),
        ({"hostpci": "x"}, "hostpci: it needs a number, as hostpci0"),
        ({"hostpci16": {"mapping": "x"}}, "hostpci16: a VM has hostpci0 to hostpci15"),
        ({"hostpci0": "0000:01:00,all-functions=1"}, "all-functions does not exist; an address without .FUNCTION"),
        ({"net0": {"queue": 4}}, "net0: no sub-option queue; did you mean queues?"),
        ({"cores": "four"}, "cores: 'four' is no whole number"),
        ({"scsi0": {"cache": False}}, "scsi0.cache: False is a boolean, and this option takes a word"),
        ({"onboot": "perhaps"}, "onboot: 'perhaps' is neither yes nor no"),
        ({"affinity": "3-1"}, "affinity: the range '3-1' is reversed"),
        ({"name": ""}, "name: the value is empty; null removes the option"),
        ({"cores": {"a": 1}}, "cores: it takes one value, not sub-options"),
        ({"efidisk1": "tank:1"}, "efidisk1: a VM has no such option"),
    ],
)
def test_what_no_vm_can_have_is_refused_by_name(wishes: dict[str, Any], told: str) -> None:
    with pytest.raises(WishRefused) as caught:
        vp.read_wishes(wishes)
    assert told in str(caught.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(WishRefused, match=r"core: .*; hostpci99: "):
        vp.read_wishes({"core": 1, "hostpci99": "a"})


SUBS = st.fixed_dictionaries(
    {},
    optional={
        "bridge": st.sampled_from(["vmbr0", "vmbr1"]),
        "queues": st.one_of(st.none(), st.integers(0, 8)),
        "firewall": st.booleans(),
        "tag": st.one_of(st.none(), st.integers(1, 9)),
    },
)


@given(SUBS)
def test_applying_a_plan_leaves_nothing_to_do_and_the_mac_alone(subs: dict[str, Any]) -> None:
    wish = {"net0": subs}
    made = plan(wish)
    after = {**CONFIG, **made.sets}
    assert not plan(wish, after)
    assert "virtio=BC:24:11:AA:BB:CC" in after["net0"]
    assert "future=7" in after["net0"]
