# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of a node: configurations, devices, mappings, locks; and the records beside it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from organism.core import _guard_devices, _guard_profile, _guard_pve, _guard_records, _hook
from organism.core._guard_config import Config, GroupWish, GuardConfigError, from_dict, load
from organism.core._guard_devices import DeviceError, device_of, keys_of, parse_mappings
from organism.core._guard_pve import parse_config
from organism.core._guard_records import HostLock, Lease, Process, Records
from organism.core._root import Root


def card(top: Path, address: str, group: int, kind: str = "0x030000", physfn: str | None = None) -> None:
    device = top / "sys/bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "class").write_text(kind + "\n")
    (device / "iommu_group").symlink_to(f"../../kernel/iommu_groups/{group}")
    if physfn:
        (device / "physfn").symlink_to(f"../{physfn}")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    card(tmp_path, "0000:01:00.0", 7)
    card(tmp_path, "0000:01:00.1", 7, "0x040300")
    card(tmp_path, "0000:02:00.0", 8, "0x020000")
    card(tmp_path, "0000:02:00.1", 9, "0x020000")
    card(tmp_path, "0000:03:00.0", 10)
    card(tmp_path, "0000:03:10.0", 11, "0x038000", physfn="0000:03:00.0")
    card(tmp_path, "0000:03:10.1", 12, "0x038000", physfn="0000:03:00.0")
    return Root(tmp_path)


def test_a_gpu_is_its_slot_however_it_is_written(root: Root) -> None:
    expected = frozenset({"0000:01:00", "iommu:7"})
    assert {keys_of(root, text) for text in ("01:00", "01:00.0", "0000:01:00.1", "0000:01:00")} == {expected}


def test_ports_of_a_network_card_are_two_devices(root: Root) -> None:
    assert not keys_of(root, "02:00.0") & keys_of(root, "02:00.1")
    assert keys_of(root, "02:00") == keys_of(root, "02:00.0") | keys_of(root, "02:00.1")


def test_virtual_functions_are_their_gpu_unless_they_may_be_shared(root: Root) -> None:
    one, other = (keys_of(root, text) for text in ("03:10.0", "03:10.1"))
    assert "0000:03:00" in one & other & keys_of(root, "03:00")
    one, other = (keys_of(root, text, share_functions=True) for text in ("03:10.0", "03:10.1"))
    assert not one & other


def test_what_sysfs_does_not_tell_of_counts_as_a_gpu(root: Root) -> None:
    assert keys_of(root, "0A:00.1") == frozenset({"0000:0a:00"})
    with pytest.raises(DeviceError, match="'gpu0' is no PCI address"):
        keys_of(root, "gpu0")


PCI_CFG = """\
gpus
\tdescription all of them
\tmap id=1002:67df,iommugroup=7,node=pve1,path=0000:01:00,subsystem-id=1da2:e353
\tmap id=1002:67df,iommugroup=10,node=pve1,path=0000:03:00.0
\tmap id=1002:67df,iommugroup=1,node=pve2,path=0000:41:00

pair
\tmap node=pve1,path=0000:01:00;0000:03:00
"""


def test_mappings_are_alternatives_of_this_node(root: Root) -> None:
    known = parse_mappings(PCI_CFG, "pve1")
    assert known == {"gpus": (("0000:01:00",), ("0000:03:00.0",)), "pair": (("0000:01:00", "0000:03:00"),)}
    device = device_of(root, "hostpci0", "mapping=gpus,pcie=1", known)
    assert device.alternatives == (frozenset({"0000:01:00", "iommu:7"}), frozenset({"0000:03:00", "iommu:10"}))
    together = device_of(root, "hostpci1", "mapping=pair", known).alternatives
    assert together == (frozenset({"0000:01:00", "iommu:7", "0000:03:00", "iommu:10"}),)
    with pytest.raises(DeviceError, match="mapping none has no device on this node"):
        device_of(root, "hostpci0", "mapping=none", known)


def test_devices_of_a_running_qemu_are_those_of_its_command_line() -> None:
    words = [
        "-device", "vfio-pci,host=0000:01:00.0,id=hostpci0.0,bus=ich9-pcie-port-1,addr=0x0.0,multifunction=on",
        "-device", '{"driver":"vfio-pci","host":"0000:02:00.1","id":"hostpci1"}',
        "-device", "vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:03:10.0,id=hostpci2",
        "-device", "virtio-net,host=9999:99:99.9",
    ]  # fmt: skip
    assert list(_guard_devices.addresses_in(words)) == ["0000:01:00.0", "0000:02:00.1", "0000:03:10.0"]


CONFIG = """\
#a note
agent: 1
hostpci0: 0000:01:00,pcie=1
lock: backup
memory: current=4096
name: vm-train

[before]
memory: 1
name: other
"""


def test_a_vm_is_its_first_section() -> None:
    found = parse_config(100, CONFIG)
    assert (found.name, found.memory, found.lock, list(found.hostpci)) == ("vm-train", 4096, "backup", ["hostpci0"])
    assert parse_config(101, "memory: 2048\n").memory == 2048
    assert parse_config(102, "").memory == 512


def test_a_lock_is_seen_with_its_holder_and_gone_without(tmp_path: Path) -> None:
    root = _guard_pve.Tree(tmp_path)
    path = tmp_path / "lock"
    assert _guard_pve.lock_holder(root, "/lock") is None
    with path.open("w") as held:
        assert _guard_pve.lock_holder(root, "/lock") is None
        fcntl.flock(held, fcntl.LOCK_EX)
        assert _guard_pve.lock_holder(root, "/lock") == os.getpid()
    assert _guard_pve.lock_holder(root, "/lock") is None


def test_the_host_wide_lock_is_given_to_one_and_says_who_has_it(tmp_path: Path) -> None:
    root = Root(tmp_path)
    first, second = HostLock(root), HostLock(root)
    assert first.acquire("start of VM 100", 0) is None
    assert "start of VM 100" in (second.acquire("x", 0) or "")
    assert "start of VM 100" in (second.acquire("x", 0.05) or "")
    threading.Timer(0.05, first.release).start()
    assert second.acquire("start of VM 101", 30) is None
    second.release()
    assert first.acquire("again", 30) is None


def test_a_lease_survives_writing_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    records = Records(Root(tmp_path))
    lease = Lease(
        100, ("0000:01:00",), records.next_generation(), "now", "vm-train", ("ml",), 8, "start", Process(1, 2)
    )
    records.write_lease(lease)
    assert records.leases() == {100: lease}
    (tmp_path / "run/organism/guard/leases/101.json").write_text("{")
    assert (set(records.leases()), records.lease_names()) == ({100}, {100, 101})
    assert records.drop_lease(101) and not records.drop_lease(101)
    assert records.next_generation() == 2


def test_requests_rise_and_tell_whether_their_asker_lives(tmp_path: Path) -> None:
    root = _guard_pve.Tree(tmp_path)
    records = Records(root)
    first = records.announce(100, Process.of(root, os.getpid()))
    second = records.announce(101, Process(os.getpid(), 1))
    stop = records.announce_stop("ml")
    announced, stops = records.announced(root)
    assert first < second < stop == stops["ml"]
    assert (announced[100].alive, announced[101].alive) == (True, False)
    records.forget_request(100)
    assert set(records.announced(root)[0]) == {101}


def test_settings_survive_writing_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    config = Config(
        groups=(GroupWish("ml", "preempt", ("vm-train", "101")),),
        modes={"train": "vm-train"},
        profile={"vm-train": {"memory": 8}},
        claims={"layer": 5},
    )
    path = tmp_path / "etc/organism/guard.json"
    with pytest.raises(GuardConfigError, match="is missing"):
        load(Root(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_text(config.text())
    assert load(Root(tmp_path)) == config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"nonsense": 1}, "nonsense is no setting"),
        ({"groups": [{"name": "ml", "policy": "stop", "members": ["a", "b"]}]}, "policy 'stop'"),
        ({"groups": [{"name": "ml", "policy": "refuse", "members": ["a"]}]}, "two VMs or more"),
        ({"groups": [{"name": "m/l", "policy": "refuse", "members": ["a", "b"]}]}, "no name of a group"),
        ({"groups": [{"policy": "refuse"}]}, "'name'"),
        ({"modes": {"train": "a"}}, "no group has all VMs of the modes"),
        ({"modes": {"idle": "a"}}, "'idle' is no mode"),
        ({"profile": {"a": {"disk": 1}}}, "'disk' is not one of"),
        ({"reserve": -1}, "reserve is less than 0"),
        ({"deadline": 10}, "within a deadline of 10 s"),
        ({"shutdown_timeout": "soon"}, "not as the guard's settings are"),
        ({"watchdog": "bark"}, "enforce or report"),
    ],
)
def test_settings_that_cannot_be(raw: dict[str, object], said: str) -> None:
    with pytest.raises(GuardConfigError, match=said):
        from_dict(raw, "vm_guard")


def test_a_profile_keeps_what_it_does_not_name() -> None:
    values = {"memory": 4096, "cpu": "host", "agent": 1, "numa": True, "cores": 4}
    config = parse_config(100, "memory: 4096\ncpu: kvm64,flags=+aes\nagent: 1,fstrim_cloned_disks=1\nballoon: 0\n")
    assert _guard_profile.missing(config, values) == {
        "cpu": "host,flags=+aes",
        "numa": "1",
        "cores": "4",
        "balloon": "4096",
    }
    passed = parse_config(100, "memory: 4096\nballoon: 0\nhostpci0: 01:00\ncpu: host\nagent: 1\nnuma: 1\ncores: 4\n")
    assert _guard_profile.missing(passed, values) == {}


def test_an_entry_of_the_hook_may_say_how_long_it_takes(tmp_path: Path) -> None:
    folder = tmp_path / "etc/organism/hook.d/pre-start"
    folder.mkdir(parents=True)
    for name, head in {"10-guard": "# organism-hook: timeout=270", "20-b": "# timeout=270"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{head}\nexit 0\n")
        (folder / name).chmod(0o755)

    def limits(**timeouts: float) -> list[float]:
        wanted = _hook.Settings(timeouts={name.replace("_", "-"): value for name, value in timeouts.items()})
        plan = _hook.plan(Root(tmp_path), "pre-start", 100, wanted, owner=os.geteuid())
        return [entry.timeout for entry in plan.entries]

    assert limits() == [270, 60]
    assert (
        _hook.plan(Root(tmp_path), "pre-start", 100, _hook.Settings(timeouts={"10-guard": 5}), owner=os.geteuid())
        .entries[0]
        .timeout
        == 5
    )


def test_a_lease_is_json_with_its_fields() -> None:
    shown = json.loads(json.dumps(_guard_records.summary({100: Lease(100, ("a",), 1, "now", cluster=("ml",))})))
    assert shown[0]["keys"] == ["a"]
    assert {"vm", "cluster", "backend", "acquired", "generation"} <= shown[0].keys()


def test_reservations_count_for_their_process_or_until_their_time(tmp_path: Path) -> None:
    root = Root(tmp_path)
    (tmp_path / "run/qemu-server").mkdir(parents=True)
    lines = ["0000:01:00.0 100 pid:77", "0000:02:00.0 100 time:1", "0000:03:00.0 100 time:99999999999", "x 101 pid:77"]
    (tmp_path / "run/qemu-server/pci-id-reservations").write_text("\n".join(lines) + "\n")
    assert _guard_pve.reservations(root, 100, 77) == ["0000:01:00.0", "0000:03:00.0"]
    assert _guard_pve.reservations(root, 100, None) == ["0000:03:00.0"]


def test_a_vm_that_arrives_is_read_from_where_it_comes(tmp_path: Path) -> None:
    here, there = (tmp_path / f"etc/pve/nodes/{name}/qemu-server" for name in ("pve1", "pve2"))
    for folder in (here, there, tmp_path / "run/qemu-server"):
        folder.mkdir(parents=True)
    (tmp_path / "etc/pve/qemu-server").symlink_to("nodes/pve1/qemu-server")
    (here / "100.conf").write_text("name: own\n")
    (here / "101.conf").write_text("template: 1\n")
    (there / "102.conf").write_text("name: arrives\n")
    (there / "103.conf").write_text("name: runs\n")
    (tmp_path / "run/qemu-server/103.pid").write_text("1\n")
    root = Root(tmp_path)
    assert {vmid: config.name for vmid, config in _guard_pve.configs(root).items()} == {100: "own", 103: "runs"}
    assert _guard_pve.configs(root, [102])[102].name == "arrives"
    assert 101 in _guard_pve.configs(root, [101]), "a template is started for its backup"
