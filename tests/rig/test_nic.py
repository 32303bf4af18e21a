# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A multiqueue port on a real kernel, behind a bridge: queues, masks and disciplines by ethtool, tc and cat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rig.driver import Rig
from tests.rig.steering import heard, play, until


def _port(rig: Rig) -> str:
    return rig.must("ls /sys/class/net/vmbr0/brif | head -1").strip()


def _look(rig: Rig, port: str) -> dict[str, str]:
    """Everything that this capability touches, by other tools."""
    script = f"""cd /sys/class/net/{port}/queues
for f in rx-*/rps_cpus rx-*/rps_flow_cnt tx-*/xps_cpus; do echo "$f=$(cat $f 2>&1)"; done
echo "combined=$(ethtool -l {port} | grep Combined | tail -1 | tr -dc 0-9)"
echo "qdisc=$(tc qdisc show dev {port} | cut -d' ' -f2 | sort | uniq -c | tr -s ' ' | tr '\\n' ' ')"
echo "flows=$(sysctl -n net.core.rps_sock_flow_entries)"
ethtool -k {port} | grep -E '^(generic-receive|generic-segmentation|tcp-segmentation)' | sed 's/: /=/'"""
    return dict(line.split("=", 1) for line in rig.must(script).splitlines())


def test_a_bridge_s_port_is_steered_held_and_restored(rig: Rig, tmp_path: Path) -> None:
    port = _port(rig)
    rig.must(f"ethtool -L {port} combined 4")
    before = _look(rig, port)
    wish = {"nic_steering_interfaces": ["vmbr0"], "nic_steering_offloads": {"gro": False}}

    foretold, _result = play(rig, tmp_path, "nic_steering", "--check", **wish)
    assert _look(rig, port) == before
    changed, result = play(rig, tmp_path, "nic_steering", **wish)
    assert changed == foretold > 0
    assert [entry["name"] for entry in result["ports"]] == [port]
    now = _look(rig, port)
    assert now["combined"] == "2"
    for queue in (0, 1):
        assert int(now[f"rx-{queue}/rps_cpus"], 16) == int(now[f"tx-{queue}/xps_cpus"], 16) == 0b1100
        assert now[f"rx-{queue}/rps_flow_cnt"] == "4096"
    assert "rx-2/rps_cpus" not in now
    assert (now["flows"], now["qdisc"].split()) == ("32768", ["2", "fq", "1", "mq"])
    assert now["generic-receive-offload"].startswith("off")

    assert play(rig, tmp_path, "nic_steering", **wish)[0] == 0

    # a link that goes and comes back, then somebody who asks for four queues: the keeper hears of both
    rig.must(f"ip link set {port} down; ip link set {port} up; ethtool -L {port} combined 4")
    until(rig, f"ethtool -l {port} | grep Combined | tail -1 | grep -qw 2")
    until(rig, f"grep -q c /sys/class/net/{port}/queues/rx-1/rps_cpus")
    state = heard(rig)
    assert state["passes"]["event"] >= 1 and state["passes"]["drift"] == 0

    back, gone = play(rig, tmp_path, "nic_steering", nic_steering_state="absent")
    assert back > 0 and gone["kept_by_others"] == {}
    assert _look(rig, port) == before
    assert rig.ssh("systemctl cat organism-steer").returncode != 0  # nobody else needs it
    assert play(rig, tmp_path, "nic_steering", nic_steering_state="absent")[0] == 0


def test_a_coalescing_that_the_driver_lacks_is_told(rig: Rig, tmp_path: Path) -> None:
    port = _port(rig)
    wish = {"nic_steering_interfaces": ["vmbr0"], "nic_steering_parts": ["hardware"], "nic_steering_qdisc": ""}
    coalesce = {"nic_steering_coalesce": {"rx_usecs": 33}}
    _changed, result = play(rig, tmp_path, "nic_steering", **wish, **coalesce)
    read_back = rig.must(f"ethtool -c {port} | grep -w rx-usecs: | tr -dc 0-9")
    told = [entry["what"] for entry in result["unsupported"]]
    assert ("coalesce/rx_usecs" in told) != (read_back == "33")
    assert play(rig, tmp_path, "nic_steering", **wish, **coalesce)[0] == 0
    play(rig, tmp_path, "nic_steering", nic_steering_state="absent")


@pytest.mark.whole
def test_isolated_cpus_are_left_out_and_a_reboot_changes_nothing(cold_rig: Rig, tmp_path: Path) -> None:
    cold_rig.restart(append="console=ttyS0 panic=-1 tsc=reliable isolcpus=domain,3-5")
    port = _port(cold_rig)
    queue = f"/sys/class/net/{port}/queues/rx-0/rps_cpus"
    # the kernel's own rule, by hand
    assert cold_rig.ssh(f"echo 38 > {queue}").returncode != 0
    wish = {"nic_steering_interfaces": ["auto", "vmbr0"]}
    _changed, result = play(cold_rig, tmp_path, "nic_steering", **wish)
    assert int(cold_rig.must(["cat", queue]), 16) == 0b100
    cold_rig.must("systemctl is-active organism-steer")
    cold_rig.restart(append="console=ttyS0 panic=-1 tsc=reliable isolcpus=domain,3-5")
    assert int(cold_rig.must(["cat", queue]), 16) == 0b100
    assert play(cold_rig, tmp_path, "nic_steering", **wish)[0] == 0
    reasons = json.loads(cold_rig.must("cat /run/organism/steer.json"))["unsupported"]
    assert any(entry["what"] == "rps" and "CPU 3 is isolated" in entry["reason"] for entry in reasons)
    play(cold_rig, tmp_path, "nic_steering", nic_steering_state="absent")
    assert result["ports"]
    cold_rig.restart()
