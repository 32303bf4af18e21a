# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's pass, its settings, its reports, and how it hears of changes."""

from __future__ import annotations

import errno
import json
import logging
import socket
import struct
from pathlib import Path

import pytest
from unit.steer import trees
from unit.steer.nics import Driver, TrafficControl
from unit.steer.trees import NIC, NVME, SATA, ZONES, machine, mask

from organism.core import _irq_apply, _netlink, _nic_apply, _steer_config, _steer_pass
from organism.core._irq_plan import IrqWish
from organism.core._nic import Nics
from organism.core._nic_plan import NicWish
from organism.core._root import Root
from organism.host.steer import Keeper


@pytest.fixture
def host(tmp_path: Path) -> Nics:
    """A host whose two modules have left their wishes, and that has just booted: nothing is steered yet."""
    machine(tmp_path, NIC, NVME, SATA)
    trees.port(tmp_path, "eth7", address="0000:09:00.0")
    root = Root(tmp_path)
    irq = {"wish": IrqWish(ZONES, {"eno1": "io"}).as_dict(), "drift_check": 300}
    nic = {"wishes": {"packets": NicWish(("eth7",), (1, 7), rps=True).as_dict()}, "drift_check": 600}
    _steer_config.write_section(root, "irq", irq)
    _steer_config.write_section(root, "nic", nic)
    return Nics(root, Driver(tmp_path), TrafficControl(tmp_path, "eth7"))


def state(host: Nics) -> dict[str, object]:
    found: dict[str, object] = json.loads(host.root.read("/run/organism/steer.json"))
    return found


def test_a_pass_sets_what_differs_and_the_next_nothing(host: Nics, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keeper = Keeper(host.root, host)
    found = keeper.look("start", [])
    assert not found.problems and found.drift_check == 300
    assert mask(host.root.top, 25) == "0,6"
    assert host.root.read("/sys/class/net/eth7/queues/rx-0/rps_cpus") == "82"
    assert "nic:eth7/rps/rx-0" in caplog.text and "(start)" in caplog.text
    said = len(caplog.records)
    assert not keeper.look("drift", []).changes and len(caplog.records) == said
    seen = state(host)
    assert seen["passes"] == {"start": 1, "event": 0, "drift": 1, "once": 0}
    assert seen["changes_total"] == len(found.changes) and seen["drifts_total"] == 0
    assert seen["interrupts"] == found.interrupts and found.interrupts["managed"] == 3


def test_what_drifted_without_an_event_is_counted_as_such(host: Nics) -> None:
    trees.write(host.root.path(_steer_pass.COLLECTOR) / "other.prom", "x 1")
    keeper = Keeper(host.root, host)
    keeper.look("start", [])
    trees.write(host.root.path("/proc/irq/25/smp_affinity_list"), "0-11")
    assert len(keeper.look("drift", []).changes) == 1
    trees.write(host.root.path("/proc/irq/25/smp_affinity_list"), "0-11")
    keeper.look("event", ["add net eno1"])
    metrics = host.root.read(_steer_pass.METRICS)
    assert "organism_steer_drifts_total 1\n" in metrics
    assert 'organism_steer_passes_total{cause="event"} 1\n' in metrics
    assert 'organism_steer_interrupts{state="managed"} 3\n' in metrics
    assert state(host)["events"] == ["add net eno1"]


def test_without_a_collector_there_are_no_metrics(host: Nics) -> None:
    Keeper(host.root, host).look("start", [])
    assert not host.root.exists(_steer_pass.COLLECTOR)


def test_who_does_not_stay_leaves_no_metrics_and_who_ends_takes_its_reports_along(host: Nics) -> None:
    host.root.path(_steer_pass.COLLECTOR).mkdir(parents=True)
    Keeper(host.root, host).look("once", [])
    assert not host.root.exists(_steer_pass.METRICS) and state(host)["cause"] == "once"
    Keeper(host.root, host).look("start", [])
    assert host.root.exists(_steer_pass.METRICS)
    _steer_pass.remove_reports(host.root)
    assert not host.root.exists(_steer_pass.METRICS) and not host.root.exists(_steer_pass.STATE)


def test_a_port_that_went_away_keeps_nothing_else_from_being_held(host: Nics, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    section = _steer_config.load(host.root)["nic"]
    section["wishes"]["packets"]["interfaces"] = ["eth7", "enp9s0"]
    _steer_config.write_section(host.root, "nic", section)
    irq = _steer_config.load(host.root)["irq"]
    irq["wish"]["devices"] = {"nvme9": "io"}
    _steer_config.write_section(host.root, "irq", irq)
    keeper = Keeper(host.root, host)
    found = keeper.look("start", [])
    assert ["enp9s0" in problem for problem in found.problems] == [True]
    assert mask(host.root.top, 25) == "0,6"
    assert host.root.read("/sys/class/net/eth7/queues/rx-0/rps_cpus") == "82"
    keeper.look("drift", [])
    assert caplog.text.count("no network interface 'enp9s0'") == 1  # a problem that lasts is said once
    section["wishes"]["packets"]["interfaces"] = ["eth7"]
    _steer_config.write_section(host.root, "nic", section)
    keeper.look("event", ["link enp9s0 gone"])
    assert "all is well again" in caplog.text


def test_one_part_that_fails_does_not_stop_the_other(host: Nics) -> None:
    trees.write(host.root.path("/var/lib/organism/earlier/nic_steering-packets.json"), "{")
    found = Keeper(host.root, host).look("start", [])
    assert "nic_steering-packets.json" in found.problems[0] and len(found.problems) == 1
    assert mask(host.root.top, 25) == "0,6"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', '{"format": 1, "irq": 3}', '{"format": 1, "irq": {}}'])
def test_settings_that_cannot_be_used_are_a_problem_and_change_nothing(host: Nics, text: str) -> None:
    trees.write(host.root.path(_steer_config.PATH), text)
    found = Keeper(host.root, host).look("start", [])
    assert "/etc/organism/steer.json" in found.problems[0] and not found.changes


def test_what_the_keeper_moved_goes_back_with_the_module_s_record(host: Nics) -> None:
    Keeper(host.root, host).look("start", [])
    _steer_config.write_section(host.root, "irq", None)
    _steer_config.write_section(host.root, "nic", None)
    assert not host.root.exists(_steer_config.PATH)
    _irq_apply.restore(host.root)
    _nic_apply.restore(host, "packets", {})
    assert mask(host.root.top, 25) == "0-11"
    assert not Keeper(host.root, host).look("event", []).changes
    assert not host.root.listdir("/var/lib/organism/earlier")


# What the kernel announces --------------------------------------------------------------------------------------------


def link_message(kind: int, name: str, flags: int) -> bytes:
    raw = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(raw), 3) + raw
    attribute += b"\0" * (-len(attribute) % 4)
    mtu = struct.pack("=HHI", 8, 4, 1500)
    body = struct.pack("=BxHiII", 0, 1, 2, flags, 0) + mtu + attribute
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_links_are_told_by_name_and_state() -> None:
    data = link_message(16, "eno1", 0x41) + link_message(16, "eno10", 0x1) + link_message(17, "tap100i0", 0)
    assert _netlink.link_lines(data) == ["link eno1 up", "link eno10 down", "link tap100i0 gone"]
    assert _netlink.link_lines(data[:-3]) == ["link eno1 up", "link eno10 down"]
    assert _netlink.link_lines(b"\0" * 64) == []


def test_of_devices_those_are_told_that_bring_interrupts_or_queues() -> None:
    event = (
        b"add@/devices/pci0/net/eno1/queues/rx-1\0ACTION=add\0DEVPATH=/devices/x/eno1/queues/rx-1\0SUBSYSTEM=queues\0"
    )
    assert _netlink.uevent_lines(event) == ["add queues rx-1"]
    assert _netlink.uevent_lines(event.replace(b"queues\0", b"block\0")) == []
    assert _netlink.uevent_lines(b"libudev\0\xfe\xed") == []


class Channel:
    """Datagrams as they come, then nothing."""

    def __init__(self, *answers: tuple[bytes, tuple[int, int]] | OSError) -> None:
        self.answers = list(answers)

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.answers:
            raise BlockingIOError
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def test_what_overflowed_is_told_as_missed_and_what_a_user_sent_is_not() -> None:
    message = link_message(16, "eno1", 0x41)
    channel = Channel((message, (4711, 1)), OSError(errno.ENOBUFS, "full"), (message, (0, 1)))
    heard = _netlink.drain(channel, links=True)  # type: ignore[arg-type]  # a stand-in for the socket
    assert heard == [_netlink.MISSED, "link eno1 up"]
    with pytest.raises(OSError, match="broken"):
        _netlink.drain(Channel(OSError(errno.EBADF, "broken")), links=True)  # type: ignore[arg-type]  # as above


def test_the_sockets_open_without_rights() -> None:
    if not hasattr(socket, "AF_NETLINK"):
        pytest.skip("no netlink here")
    with _netlink.link_socket() as links, _netlink.uevent_socket() as devices:
        assert links.getsockname()[1] == devices.getsockname()[1] == 1
