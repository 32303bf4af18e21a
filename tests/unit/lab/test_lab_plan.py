# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's decisions: nodes, network, apt sources, control groups, what a half-made or grown lab becomes."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import cgroups, net, nodes, play, tree
from lab.config import Settings, State, load_state, plan_nodes, save_state, settings
from lab.errors import LabError, UsageError
from lab.lifecycle import Wish, plan

REPO = Path(__file__).resolve().parents[3]
SUBNET = "10.99.0.0/24"


def state(bus: int = 1, pool: int = 1) -> State:
    return State("orglab0", SUBNET, 4, plan_nodes(SUBNET, bus, pool))


def test_nodes_keep_their_address_when_others_are_added() -> None:
    small = {node.name: node for node in plan_nodes(SUBNET, 1, 1)}
    large = {node.name: node for node in plan_nodes(SUBNET, 5, 9)}
    assert small.items() <= large.items()
    assert len({node.address for node in large.values()}) == 14
    assert [name for name, node in large.items() if "conductor" in node.groups] == ["bus1"]


@pytest.mark.parametrize(("bus", "pool"), [(2, 1), (0, 1), (7, 1), (1, 0), (1, 10)])
def test_sizes_that_make_no_sense_are_refused(bus: int, pool: int) -> None:
    with pytest.raises(UsageError):
        plan_nodes(SUBNET, bus, pool)


def test_a_lab_grows_but_neither_shrinks_nor_moves() -> None:
    small, large = state(), state(3, 2)
    assert plan(Wish(bus=3, pool=2), small, "orglab0", SUBNET) == large
    assert plan(Wish(), large, "orglab0", SUBNET) == large
    for wish in (Wish(pool=1), Wish(bus=1), Wish(subnet="10.98.0.0/24")):
        with pytest.raises(UsageError, match="grow"):
            plan(wish, large, "orglab0", SUBNET)
    with pytest.raises(UsageError, match="simulated"):
        plan(Wish(gpus=0), None, "orglab0", SUBNET)


def used(*networks: str) -> list[tuple[ipaddress.IPv4Network, str]]:
    return [(ipaddress.IPv4Network(network), "eth0") for network in networks]


def test_the_first_free_network_is_chosen_and_a_clash_is_refused_with_a_way_out() -> None:
    assert net.choose_subnet(None, used("192.168.1.0/24")) == "10.99.0.0/24"
    assert net.choose_subnet(None, used("10.96.0.0/12")) == "10.213.0.0/24"
    assert net.choose_subnet("10.5.0.0/24", used()) == "10.5.0.0/24"
    with pytest.raises(UsageError, match=r"clashes with 10\.0\.0\.0/8 on eth0") as caught:
        net.choose_subnet("10.5.0.0/24", used("10.0.0.0/8"))
    assert "--subnet" in caught.value.hint
    with pytest.raises(UsageError, match="every network"):
        net.choose_subnet(None, used("10.0.0.0/8"))
    for bad in ("10.5.0.1/24", "nonsense", "10.0.0.0/29"):
        with pytest.raises(UsageError):
            net.choose_subnet(bad, used())


DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main contrib

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: trixie
Components: main
"""


def test_the_hosts_debian_archive_is_found_in_both_styles() -> None:
    wanted = ("http://mirror.example/debian", "http://mirror.example/security")
    assert tree.debian_uris([("debian.sources", DEB822)]) == wanted
    one_line = (
        "# deb http://no.example/debian bookworm main\n"
        "deb-src http://no.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n"
        "deb http://mirror.example/security bookworm-security main\n"
    )
    assert tree.debian_uris([("sources.list", one_line)]) == wanted


def test_archives_of_others_are_not_taken_for_debians() -> None:
    foreign = [
        ("sources.list", "deb http://ubuntu.example/ubuntu noble main\ndeb cdrom:[x] bookworm main\n"),
        ("node.list", "deb http://node.example/node_20.x nodistro main\n"),
    ]
    assert tree.debian_uris(foreign) == ("", "")
    assert tree.sources_list("", "") == ""
    assert tree.sources_list("http://m/debian", "").splitlines() == [
        "deb http://m/debian trixie main",
        "deb http://m/debian trixie-updates main",
    ]


MOUNTINFO = """\
20 1 0:5 / /proc rw - proc proc rw
30 1 0:30 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
32 30 0:32 / /sys/fs/cgroup/systemd rw shared:3 - cgroup cgroup rw,xattr,name=systemd
33 30 0:33 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw
"""


def test_a_container_gets_its_group_below_our_own_in_both_hierarchies() -> None:
    assert cgroups.hierarchies(MOUNTINFO, "9:name=systemd:/\n4:cpu:/x\n0::/\n") == [
        Path("/sys/fs/cgroup/systemd"),
        Path("/sys/fs/cgroup/unified"),
    ]
    inside = "33 30 0:33 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert cgroups.hierarchies(inside, "0::/docker/abc/own\n") == [Path("/sys/fs/cgroup/own")]
    assert cgroups.hierarchies(MOUNTINFO.splitlines()[2], "4:cpu:/x\n0::/\n") == []


def test_every_node_knows_all_others_by_name() -> None:
    lines = nodes.hosts_file(state(3, 2)).splitlines()
    for name in ("bus1", "bus2", "bus3", "pool1", "pool2", "controller"):
        assert sum(name in line.split() for line in lines) == 1


def test_the_state_survives_a_round_trip_and_damage_is_told(tmp_path: Path) -> None:
    where = Settings("orglab0", tmp_path)
    where.folder.mkdir(parents=True)
    assert load_state(where) is None
    save_state(where, state(3, 2))
    assert load_state(where) == state(3, 2)
    where.state_file.write_text('{"name": "orglab0"}')
    with pytest.raises(LabError, match="damaged") as caught:
        load_state(where)
    assert "clean" in caught.value.hint


def test_settings_refuse_what_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORGANISM_CACHE", "/somewhere/with space")
    with pytest.raises(UsageError, match="white space"):
        settings()
    monkeypatch.setenv("ORGANISM_CACHE", "/somewhere")
    for name in ("Upper", "../x", "", "a" * 15):
        monkeypatch.setenv("ORGANISM_LAB_NAME", name)
        with pytest.raises(UsageError, match="interface name"):
            settings()


def test_a_socket_path_that_would_be_too_long_moves_to_a_short_folder() -> None:
    near = Settings("orglab0", Path("/srv/cache"))
    far = Settings("orglab0", Path("/srv/" + "x" * 80))
    assert near.control_path == Path("/srv/cache/lab/ssh/%C")
    for where in (near, far):
        assert len(str(where.control_path)) - len("%C") + 40 + 17 < 108


def test_two_labs_share_the_tree_and_nothing_else() -> None:
    one, two = Settings("orglab0", Path("/c")), Settings("orglab1", Path("/c"))
    assert one.tree == two.tree
    assert one.folder != two.folder
    assert one.machine("bus1") != two.machine("bus1")
    # the same name in another checkout: what it ends by control group is its own
    assert one.group("bus1") != Settings("orglab0", Path("/d")).group("bus1")


RECAP = """\
TASK [nats : write the configuration] ***
changed: [bus1]
ok: [pool1]

TASK [delegated] ***
changed: [pool1 -> bus1(10.99.0.11)]

PLAY RECAP *********************************************************************
bus1                       : ok=12   changed=3    unreachable=0    failed=0    skipped=2    rescued=0    ignored=0
pool1                      : ok=9    changed=0    unreachable=0    failed=1    skipped=0    rescued=0    ignored=0
"""


def test_ansibles_output_is_read() -> None:
    assert play.recap(RECAP)["bus1"]["changed"] == 3
    assert play.recap(RECAP)["pool1"]["failed"] == 1
    assert play.changes(RECAP) == {"nats : write the configuration": ["bus1"], "delegated": ["pool1"]}
    assert play.recap("nothing") == {}


def test_the_inventory_script_needs_no_lab_and_only_the_standard_library(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "ORGANISM_CACHE": str(tmp_path)}
    script = [sys.executable, "-I", str(REPO / "inventories/lab/hosts.py"), "--list"]
    listed = json.loads(subprocess.run(script, env=environment, capture_output=True, check=True, text=True).stdout)
    assert listed["bus"]["hosts"] == listed["conductor"]["hosts"] == ["bus1"]
    assert listed["gpu_pool"]["hosts"] == ["pool1"]
    assert listed["pve"]["hosts"] == listed["cortex"]["hosts"] == []
    where = Settings("orglab0", tmp_path)
    where.folder.mkdir(parents=True)
    save_state(where, state(3, 2))
    listed = json.loads(subprocess.run(script, env=environment, capture_output=True, check=True, text=True).stdout)
    assert listed["bus"]["hosts"] == ["bus1", "bus2", "bus3"]
    assert listed["_meta"]["hostvars"]["pool2"] == {"ansible_host": "10.99.0.22", "organism_gpu_simulated": 4}
