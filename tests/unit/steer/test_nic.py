# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports: what is wanted, what a driver lacks, in which order it is set, and how it goes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unit.steer.nics import Driver, TrafficControl
from unit.steer.trees import ONLINE, default_route, interface, port, write

from organism.core import _nic_apply
from organism.core._ethtool import Channels
from organism.core._nic import Nics, describe
from organism.core._nic_plan import NicPlanError, NicWish
from organism.core._root import Root

IO = (1, 7)
STEERING = NicWish(("auto",), IO, rps=True, xps=True, flow_entries=4096)
LOWLAT = {"adaptive_rx": 0, "adaptive_tx": 0, "rx_usecs": 0, "tx_usecs": 0}
HARDWARE = NicWish(("auto",), IO, channels=-1, coalesce=LOWLAT, offloads={"gro": False}, qdisc="fq")
BOTH = {"steering": STEERING, "nic": HARDWARE}


class Host:
    def __init__(self, top: Path, now: int = 4, limit: int = 8) -> None:
        self.top = top
        write(top / "sys/devices/system/cpu/online", ONLINE)
        port(top, "eno1", rx=now, tx=now)
        interface(top, "vmbr0", "eno1")
        default_route(top, ("vmbr0", 0))
        coalescing = {"adaptive_rx": 1, "adaptive_tx": 0, "rx_usecs": 50, "tx_usecs": 8, "rx_frames": 0, "tx_frames": 0}
        self.driver = Driver(top, Channels(0, 0, limit, 0, 0, now), coalescing)
        self.tc = TrafficControl(top, "eno1")
        self.nics = Nics(Root(top), self.driver, self.tc)

    def queue(self, queue: str, file: str) -> str:
        return (self.top / f"sys/class/net/eno1/queues/{queue}/{file}").read_text().strip()

    def records(self) -> list[str]:
        return sorted(path.name for path in (self.top / "var/lib/organism/earlier").glob("*"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def reasons(outcome: _nic_apply.Outcome) -> dict[str, str]:
    return {entry.what: entry.reason for entry in outcome.unsupported}


def test_all_is_set_in_an_order_that_drivers_take_and_only_once(host: Host) -> None:
    foretold = _nic_apply.steer(host.nics, BOTH, check=True)
    assert not host.driver.writes and not host.tc.calls and not host.records()
    done = _nic_apply.steer(host.nics, BOTH)
    assert done.difference == foretold.difference and done.difference.changed
    assert host.driver.writes == ["channels", "adaptive_rx", "rx_usecs", "tx_usecs", "gro"]
    assert host.driver.now is not None and host.driver.now.combined == 2
    assert host.queue("rx-1", "rps_cpus") == host.queue("tx-0", "xps_cpus") == "82"
    assert host.queue("rx-0", "rps_flow_cnt") == "4096"
    assert (host.tc.kind, host.tc.children) == ("mq", ["fq", "fq"])
    assert all(row["ok"] for row in done.settings) and not done.unsupported
    writes, calls = list(host.driver.writes), list(host.tc.calls)
    assert not _nic_apply.steer(host.nics, BOTH).difference
    assert (host.driver.writes, host.tc.calls) == (writes, calls)


def test_each_wish_goes_back_by_itself(host: Host) -> None:
    write(host.top / "sys/class/net/eno1/queues/rx-3/rps_cpus", "00f")  # lost with the channels, and back with them
    _nic_apply.steer(host.nics, BOTH)
    assert host.records() == ["nic_steering-steering.json", "nic_steering.json"]
    foretold = _nic_apply.restore(host.nics, "nic", {"steering": STEERING}, check=True)
    assert host.driver.now is not None and host.driver.now.combined == 2
    back = _nic_apply.restore(host.nics, "nic", {"steering": STEERING})
    assert back.difference == foretold.difference and not back.kept
    assert host.driver.now.combined == 4
    assert host.driver.coalescing is not None
    assert (host.driver.coalescing["adaptive_rx"], host.driver.coalescing["rx_usecs"]) == (1, 50)
    assert host.driver.offloads["gro"] and host.tc.children == ["pfifo_fast"] * 4
    assert host.queue("rx-1", "rps_cpus") == "82"  # the other wish still holds
    assert host.queue("rx-3", "rps_cpus") in ("f", "00f")
    _nic_apply.restore(host.nics, "steering", {})
    assert [host.queue(f"rx-{n}", "rps_cpus").strip("0") for n in range(4)] == ["", "", "", "f"]
    assert host.queue("rx-0", "rps_flow_cnt") == "0"
    assert host.records() == []
    assert not _nic_apply.restore(host.nics, "steering", {}).difference


def test_a_shrunken_wish_gives_back_what_it_no_longer_names(host: Host) -> None:
    _nic_apply.steer(host.nics, {"nic": HARDWARE})
    _nic_apply.steer(host.nics, {"nic": NicWish(("auto",), IO, qdisc="fq")})
    assert host.driver.now is not None and host.driver.now.combined == 4
    assert host.driver.offloads["gro"] and host.tc.children == ["fq"] * 4
    kept = json.loads((host.top / "var/lib/organism/earlier/nic_steering.json").read_text())["kept"]
    assert set(kept) == {"nic:eno1/qdisc"}


def test_somebody_else_s_value_stays_and_is_named(host: Host) -> None:
    _nic_apply.steer(host.nics, {"steering": STEERING})
    write(host.top / "sys/class/net/eno1/queues/rx-0/rps_cpus", "004")
    assert _nic_apply.restore(host.nics, "steering", {}).kept == {"nic:eno1/rps/rx-0": "2"}
    assert host.queue("rx-0", "rps_cpus") == "004"


def test_isolated_cpus_are_left_out_of_rps_and_named_but_transmit_may_use_them(host: Host) -> None:
    write(host.top / "sys/devices/system/cpu/isolated", "2-5,7-11")
    write(host.top / "sys/devices/system/cpu/nohz_full", "(null)")
    done = _nic_apply.steer(host.nics, {"steering": STEERING})
    assert host.queue("rx-0", "rps_cpus") == "2" and host.queue("tx-0", "xps_cpus") == "82"
    assert "CPU 7 is isolated" in reasons(done)["rps"]


def test_a_zone_that_is_wholly_isolated_has_no_rps_and_says_so(host: Host) -> None:
    write(host.top / "sys/devices/system/cpu/nohz_full", "1-11")
    done = _nic_apply.steer(host.nics, {"steering": STEERING})
    assert host.queue("rx-0", "rps_cpus") == "000"
    assert "nothing is left" in reasons(done)["rps"]


def test_a_plain_port_says_what_it_lacks(tmp_path: Path) -> None:
    host = Host(tmp_path, now=1)
    host.driver.now, host.driver.coalescing = None, None
    done = _nic_apply.steer(host.nics, BOTH)
    assert "fixed number of queues" in reasons(done)["channels"]
    assert "one transmit queue" in reasons(done)["xps"]
    assert "virtio_net does not coalesce" in reasons(done)["coalesce"]
    assert host.tc.kind == "fq"
    assert not _nic_apply.steer(host.nics, BOTH).difference
    _nic_apply.restore(host.nics, "nic", {})
    assert host.tc.kind == "pfifo_fast"


def test_fewer_channels_than_wanted_are_named(tmp_path: Path) -> None:
    host = Host(tmp_path, now=1, limit=1)
    assert "at most 1 channels, 2 were wanted" in reasons(_nic_apply.steer(host.nics, {"nic": HARDWARE}))["channels"]


def test_more_channels_bring_queues_that_the_other_wish_steers_at_once(tmp_path: Path) -> None:
    host = Host(tmp_path, now=1)
    _nic_apply.steer(host.nics, {"steering": STEERING})
    foretold = _nic_apply.steer(host.nics, BOTH, check=True)
    done = _nic_apply.steer(host.nics, BOTH)
    assert done.difference == foretold.difference
    assert host.queue("rx-1", "rps_cpus") == host.queue("tx-1", "xps_cpus") == "82"
    _nic_apply.restore(host.nics, "nic", {"steering": STEERING})
    _nic_apply.restore(host.nics, "steering", {})
    assert host.queue("rx-0", "rps_cpus").strip("0") == ""


def test_separate_receive_and_transmit_channels(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.driver.now = Channels(4, 1, 0, 4, 1, 0)
    _nic_apply.steer(host.nics, {"nic": NicWish(("eno1",), IO, channels=-1)})
    assert host.driver.now == Channels(4, 1, 0, 2, 1, 0)


def test_what_the_driver_refuses_is_reported_and_no_change(host: Host) -> None:
    host.driver.refuses = {"tx_usecs"}
    wish = NicWish(("eno1",), IO, coalesce=LOWLAT, offloads={"lro": True})
    done = _nic_apply.steer(host.nics, {"nic": wish})
    assert {"coalesce/tx_usecs", "offload/lro"} == set(reasons(done))
    assert "tx_usecs" not in done.difference.message
    assert not _nic_apply.steer(host.nics, {"nic": wish}).difference
    kept = json.loads((host.top / "var/lib/organism/earlier/nic_steering.json").read_text())["kept"]
    assert set(kept) == {"nic:eno1/coalesce/adaptive_rx", "nic:eno1/coalesce/rx_usecs"}


def test_a_kernel_without_fq_is_named(host: Host) -> None:
    host.tc.known = ()
    done = _nic_apply.steer(host.nics, {"nic": NicWish(("eno1",), IO, qdisc="fq")})
    assert "kind is unknown" in reasons(done)["qdisc"]


def test_somebody_s_shaper_is_left_alone(host: Host) -> None:
    host.tc.kind, host.tc.handle = "htb", "1:"
    done = _nic_apply.steer(host.nics, {"nic": NicWish(("eno1",), IO, qdisc="fq")})
    assert "somebody has set up 'htb'" in reasons(done)["qdisc"] and not host.tc.calls


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (NicWish(("auto",), ()), "I/O zone has no CPUs"),
        (NicWish(("auto",), (1, 12)), "CPU 12 is not online"),
        (NicWish(("auto",), IO, flow_entries=4000), "power of two"),
        (NicWish(("auto",), IO, coalesce={"rx-usecs": 1}), "no such setting: rx-usecs"),
        (NicWish(("eno3",), IO), "no network interface 'eno3'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changed(host: Host, wish: NicWish, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _nic_apply.steer(host.nics, {"nic": wish})
    assert not host.driver.writes and not host.records()


def test_two_wishes_that_disagree_are_refused(host: Host) -> None:
    other = NicWish(("eno1",), IO, offloads={"gro": True})
    with pytest.raises(NicPlanError, match="offload/gro is"):
        _nic_apply.steer(host.nics, {"nic": HARDWARE, "other": other})


def test_a_driver_that_takes_a_value_and_keeps_another_is_a_failure(host: Host) -> None:
    host.driver.set_offload = lambda *_: None  # type: ignore[method-assign]  # the deaf driver of this test
    with pytest.raises(_nic_apply.NicError, match="offload/gro = False set, True read back"):
        _nic_apply.steer(host.nics, {"nic": NicWish(("eno1",), IO, offloads={"gro": False})})


def test_a_way_back_that_the_driver_does_not_go_is_a_failure_and_not_forgotten(host: Host) -> None:
    _nic_apply.steer(host.nics, {"nic": NicWish(("eno1",), IO, offloads={"gro": False, "tso": False})})
    host.driver.fixed_offloads.add("gro")
    with pytest.raises(_nic_apply.NicError, match="offload/gro = True"):
        _nic_apply.restore(host.nics, "nic", {})
    assert host.records() == ["nic_steering.json"]
    host.driver.fixed_offloads.clear()
    _nic_apply.restore(host.nics, "nic", {})
    assert host.driver.offloads["gro"] and not host.records()


def test_another_wish_s_port_that_went_away_does_not_stand_in_the_way(host: Host) -> None:
    gone = NicWish(("eno3",), IO, rps=True)
    done = _nic_apply.steer(host.nics, {"gone": gone, "steering": STEERING}, lenient={"gone"})
    assert reasons(done).keys() == {"interface"} and host.queue("rx-0", "rps_cpus") == "82"
    with pytest.raises(ValueError, match="eno3"):
        _nic_apply.steer(host.nics, {"gone": gone, "steering": STEERING}, lenient={"steering"})


def test_the_wish_survives_its_file() -> None:
    assert NicWish.from_dict(json.loads(json.dumps(HARDWARE.as_dict()))) == HARDWARE


def test_disciplines_as_tc_tells_them() -> None:
    child = {"kind": "fq", "handle": "0:"}
    assert describe([]) == describe([{"kind": "noqueue", "handle": "0:", "root": True}]) == ""
    assert describe([{"kind": "mq", "handle": "0:", "root": True}, {**child, "parent": ":1"}]) == "mq:fq"
    mixed = [
        {**child, "parent": "10:1"},
        {"kind": "clsact", "parent": "ffff:fff1"},
        {**child, "kind": "x", "parent": "1:1"},
    ]
    assert describe([{"kind": "mq", "handle": "10:", "root": True}, *mixed]) == "mq:fq"
