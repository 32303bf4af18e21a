# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab itself: it boots, is repeatable, repairs itself, keeps its nodes apart, and leaves the host as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import host, nodes
from lab.driver import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab("orgtest1")
    lab.must("clean")
    yield lab
    lab.must("clean")


def output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def sysctls() -> dict[str, str]:
    """The host's settings that something run as root could have changed, read straight from /proc/sys."""
    found = {}
    for area in ("kernel", "vm", "net/ipv4", "net/ipv6", "net/core", "net/bridge", "fs"):
        for path in Path("/proc/sys", area).rglob("*"):
            # Counters, and the per-interface settings of an interface that comes and goes.
            moving = (
                "random/",
                "/quota/",
                "-nr",
                "pty/nr",
                "-state",
                "ns_last_pid",
                "tainted",
                "/conf/org",
                "/neigh/org",
                "/mptcp/",
            )
            if path.is_file() and os.access(path, os.R_OK) and not any(word in str(path) for word in moving):
                try:
                    found[str(path)] = path.read_text(encoding="utf-8", errors="replace")
                except OSError:
                    found[str(path)] = "unreadable"
    return found


def traces() -> dict[str, list[str]]:
    """What the host shows of labs, seen with other tools than the lab's own."""
    return {
        "mounts": sorted(line.split(maxsplit=1)[0] for line in output("findmnt", "-rn", "-o", "TARGET").splitlines()),
        "links": sorted(link["ifname"] for link in json.loads(output("ip", "-json", "link"))),
        "routes": sorted(output("ip", "route").splitlines()),
        "network namespaces": sorted(output("lsns", "-rn", "-t", "net", "-o", "NS").split()),
        "control groups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("**/orgtest*")),
        "processes": sorted(line for line in output("ps", "-eo", "args=").splitlines() if "orgtest1" in line),
        "files": sorted(
            path.name for path in Path("/tmp").glob("orgtest*")
        ),  # where ssh sockets go when paths are long
    }


def test_the_host_is_left_as_it_was(lab: Lab) -> None:
    before, settings_before = traces(), sysctls()
    lab.must("up")
    during = traces()
    assert sysctls() == settings_before
    assert during["links"] != before["links"]
    assert "nothing of the lab is left" in lab.must("clean")
    # what a test before this one left may end meanwhile; nothing may have come
    after = traces()
    assert {kind: sorted(set(after[kind]) - set(before[kind])) for kind in after} == {kind: [] for kind in after}
    assert sysctls() == settings_before
    assert not lab.where.folder.exists()


def test_up_is_repeatable_and_down_keeps_the_nodes_content(lab: Lab) -> None:
    lab.must("up")
    pids = {record["name"]: record["pid"] for record in lab.status()}
    assert set(pids) == {"bus1", "pool1"}
    assert "nothing to do" in lab.must("up")
    assert {record["name"]: record["pid"] for record in lab.status()} == pids
    lab.sh("bus1", "echo kept >/root/mark")
    lab.must("down")
    assert [record["state"] for record in lab.status()] == ["stopped", "stopped"]
    lab.must("up")
    assert lab.sh("bus1", "cat /root/mark") == "kept\n"


def test_a_half_made_lab_is_completed(lab: Lab) -> None:
    lab.must("up")
    survivor = nodes.running(lab.where)["pool1"].leader
    supervisor = nodes.running(lab.where)["bus1"].supervisor
    watch = host.Watch(supervisor)
    watch.signal(signal.SIGKILL)
    assert watch.ended(timeout=30)
    watch.close()
    lab.must("up")
    assert lab.sh("bus1", "hostname") == "bus1\n"
    assert nodes.running(lab.where)["pool1"].leader == survivor
    output("ip", "link", "delete", "orgtest1")
    lab.must("up")
    assert lab.sh("bus1", "hostname") == "bus1\n"


def test_a_lab_grows_in_place_and_all_nodes_learn_the_new_name(lab: Lab) -> None:
    lab.must("up")
    assert lab.run("up", "--bus", "2").returncode == 2
    lab.must("up", "--pool", "2")
    assert lab.sh("bus1", "getent hosts pool2").split()[1] == "pool2"
    assert lab.sh("pool2", "getent hosts bus1").split()[1] == "bus1"
    refused = lab.run("up", "--pool", "1")
    assert refused.returncode == 2
    assert "grow, not shrink" in refused.stdout


def test_nodes_are_apart_and_closed_in(lab: Lab) -> None:
    lab.must("up")
    for node in ("bus1", "pool1"):
        assert lab.sh(node, "systemctl is-system-running").strip() == "running"
        assert "default" not in lab.sh(node, "ip route")
        # the host's kernel settings are not the node's to write
        assert lab.run("ssh", node, "sysctl -w vm.swappiness=60").returncode != 0
    # a unit of the same name killed on one node lives on on the other: they share no control group
    pid = lab.sh("pool1", "systemctl show --property=MainPID --value chrony")
    lab.sh("bus1", "systemctl kill --signal=KILL chrony")
    assert lab.sh("pool1", "systemctl show --property=MainPID --value chrony") == pid


def test_a_foreign_interface_of_the_same_name_is_not_touched(lab: Lab) -> None:
    output("ip", "link", "add", "orgtest1", "type", "veth", "peer", "name", "orgtest1p")
    try:
        refused = lab.run("up")
        assert refused.returncode == 1
        assert "ORGANISM_LAB_NAME" in refused.stdout
        assert "orgtest1p" in output("ip", "link", "show", "orgtest1")
    finally:
        output("ip", "link", "delete", "orgtest1")


def test_a_network_in_use_is_refused_with_a_way_out(lab: Lab) -> None:
    used = json.loads(output("ip", "-json", "-4", "address"))
    address = next(entry["addr_info"][0] for entry in used if entry["addr_info"])
    refused = lab.run("up", "--subnet", f"{address['local'].rsplit('.', 1)[0]}.0/24")
    assert refused.returncode == 2
    assert "--subnet" in refused.stdout
