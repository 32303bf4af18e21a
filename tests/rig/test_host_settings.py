# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module host_settings on a real kernel and systemd: what it sets is seen by other tools, and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig

REPO = Path(__file__).resolve().parents[2]
NAME = "99-organism-proof.conf"
LATENCY = "/sys/devices/system/cpu/cpu{}/power/pm_qos_resume_latency_us"
THP = "/sys/kernel/mm/transparent_hugepage/enabled"
UNIT = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
# what taking back must restore: all of /etc with owners and modes, and the values and units that the tests touch
SNAPSHOT = f"""
find /etc -printf '%p %y %m %u:%g %l\\n' | sort
find /etc -type f -not -path '/etc/ssl/*' -exec sha256sum {{}} + | sort -k2
sysctl vm.swappiness vm.dirty_ratio vm.dirty_bytes net.ipv4.tcp_rmem net.core.somaxconn
grep . {THP} /sys/kernel/mm/ksm/run {LATENCY.format("*")}
systemctl show --property=Id,UnitFileState,ActiveState irqbalance.service fstrim.timer
ls /sys/module | grep -c '^dummy$'
find /var/lib -path '*/organism/earlier/*'
"""

Module = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def module(rig: Rig) -> Module:
    """Runs a module of the collection in the rig as Ansible does; its result, a failure too."""

    def run(name: str, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
        words = ["-i", str(REPO / "inventories/rig"), "pve", "-m", f"organism.proxmox.{name}"]
        words += ["-a", json.dumps(arguments), "--diff", *(["--check"] if check else [])]
        environment = {
            **os.environ,
            "ORGANISM_CACHE": str(rig.where.cache),
            "ORGANISM_RIG_NAME": rig.where.name,
            "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(rig.where.cache / "collections"),
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ansible"), *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=REPO,
            check=False,
            timeout=300,
        )
        assert "{" in done.stdout, done.stdout + done.stderr
        told = json.loads(done.stdout[done.stdout.index("{") :])
        (result,) = told["plays"][0]["tasks"][0]["hosts"].values()
        return dict(result)

    return run


@pytest.fixture
def earlier(rig: Rig, module: Module) -> Any:
    """The host before; afterwards the capability is taken back and the host must be the same again."""
    before = rig.must(SNAPSHOT)
    yield before
    module("host_settings", capability="proof", state="absent")
    assert rig.must(SNAPSHOT).splitlines() == before.splitlines()


WISH: dict[str, Any] = {
    "capability": "proof",
    "sysctl": {"vm.swappiness": 11, "net.ipv4.tcp_rmem": "4096 87380 6291456", "net.core.somaxconn": "4096"},
    "sysfs": {LATENCY.format("[2-3]"): 2, THP: "madvise"},
    "sysfs_optional": {"/sys/devices/system/cpu/intel_pstate/no_turbo": 1},
    "files": [{"path": "/etc/systemd/system/organism-proof.service", "content": UNIT}],
    "modules": ["dummy"],
    "units": [
        {"name": "irqbalance.service", "enabled": "masked", "active": False},
        {"name": "organism-proof.service", "enabled": True, "active": True, "expected": True},
        {"name": "nowhere.service", "enabled": False, "optional": True},
    ],
}


@pytest.mark.fast
def test_a_check_foretells_the_run_and_other_tools_see_it(rig: Rig, module: Module, earlier: str) -> None:
    foretold = module("host_settings", check=True, **WISH)
    assert rig.must(SNAPSHOT) == earlier
    done = module("host_settings", **WISH)
    assert (done["changed"], done["diff"]) == (True, foretold["diff"])
    assert all(row["ok"] for row in done["settings"])
    assert rig.must("sysctl -n vm.swappiness net.ipv4.tcp_rmem").split() == ["11", "4096", "87380", "6291456"]
    assert rig.must(f"cat {LATENCY.format('[1-4]')}").split() == ["0", "2", "2", "0"]
    assert "[madvise]" in rig.must(f"cat {THP}")
    assert rig.must("lsmod | grep -cw ^dummy").strip() == "1"
    show = "systemctl show --property=UnitFileState,ActiveState"
    assert rig.must(f"{show} irqbalance.service").split() == ["ActiveState=inactive", "UnitFileState=masked"]
    assert rig.must(f"{show} organism-proof.service").split() == ["ActiveState=active", "UnitFileState=enabled"]
    assert {row["path"] for row in done["unsupported"]} == {
        "/sys/devices/system/cpu/intel_pstate/no_turbo",
        "nowhere.service",
    }
    again = module("host_settings", **WISH)
    assert (again["changed"], again["done"]) == (False, [])


def test_the_boot_files_set_the_same_again(rig: Rig, module: Module, earlier: str) -> None:
    """What systemd does with them at boot, on values that somebody has changed meanwhile."""
    module("host_settings", **WISH)
    rig.must(f"sysctl -q vm.swappiness=60 && echo 0 > {LATENCY.format(2)} && echo always > {THP}")
    changed = module("host_settings", check=True, **WISH)
    assert set(changed["boot_differs"]) == {"/proc/sys/vm/swappiness", LATENCY.format(2), THP}
    rig.must("systemctl restart systemd-sysctl.service && systemd-tmpfiles --create --prefix=/sys")
    assert not module("host_settings", check=True, **WISH)["changed"]
    assert rig.must(f"systemd-analyze cat-config sysctl.d | grep -A9 {NAME}").count("vm.swappiness = 11") == 1


def test_fewer_settings_take_the_others_back(rig: Rig, module: Module, earlier: str) -> None:
    module("host_settings", **WISH)
    module("host_settings", capability="proof", sysctl={"vm.swappiness": 11})
    assert rig.must("sysctl -n vm.swappiness").strip() == "11"
    left = rig.must("find /etc -name '*organism*'").split()
    assert left == [f"/etc/sysctl.d/{NAME}"]
    assert rig.must("systemctl is-enabled irqbalance.service").strip() == "enabled"


@pytest.mark.fast
def test_what_others_set_meanwhile_stays_and_is_named(rig: Rig, module: Module) -> None:
    module("host_settings", capability="proof", sysctl={"vm.swappiness": 11, "net.core.somaxconn": 5000})
    rig.must("sysctl -q vm.swappiness=33")
    foretold = module("host_settings", check=True, capability="proof", state="absent")
    done = module("host_settings", capability="proof", state="absent")
    assert done["diff"] == foretold["diff"]
    assert [(kept["key"], kept["now"]) for kept in done["kept_by_others"]] == [("/proc/sys/vm/swappiness", "33")]
    assert rig.must("sysctl -n vm.swappiness net.core.somaxconn").split() == ["33", "4096"]
    rig.must("sysctl -q vm.swappiness=60")
    assert not module("host_settings", capability="proof", state="absent")["changed"]


def test_the_half_of_a_pair_that_the_kernel_zeroes_comes_back(rig: Rig, module: Module, earlier: str) -> None:
    rig.must("sysctl -q vm.dirty_bytes=268435456")
    module("host_settings", capability="proof", sysctl={"vm.dirty_ratio": 15})
    assert rig.must("sysctl -n vm.dirty_ratio vm.dirty_bytes").split() == ["15", "0"]
    assert not module("host_settings", capability="proof", sysctl={"vm.dirty_ratio": 15})["changed"]
    module("host_settings", capability="proof", state="absent")
    assert rig.must("sysctl -n vm.dirty_ratio vm.dirty_bytes").split() == ["0", "268435456"]
    rig.must("sysctl -q vm.dirty_ratio=20")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sysctl": {"vm.swapiness": 1}}, "vm.swapiness (/proc/sys/vm/swapiness) does not exist"),
        ({"sysctl": {"kernel.ostype": "x"}}, "kernel.ostype (/proc/sys/kernel/ostype) is read-only"),
        ({"sysctl": {"vm.compact_memory": 1}}, "is write-only"),
        ({"sysfs": {"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size": 1}}, "hpage_pmd_size is read-only"),
        ({"sysfs": {"/sys/devices/system/cpu/cpu99*/online": 1}}, "matches nothing"),
        ({"sysfs": {THP: "sometimes"}}, "offers always madvise never, and not sometimes"),
        ({"sysfs": {"/etc/hostname": "x"}}, "is not a path below /sys"),
        ({"units": [{"name": "smartd.servise", "enabled": True}]}, "unit smartd.servise does not exist"),
        ({"units": [{"name": "dbus.socket", "enabled": False}]}, "is static and cannot be disabled"),
        ({"modules": ["no-such-module"]}, "kernel module no-such-module does not exist"),
    ],
)
def test_bad_wishes_are_refused_before_anything_changed(
    rig: Rig, module: Module, earlier: str, arguments: dict[str, Any], reason: str
) -> None:
    good = {"vm.swappiness": 11}
    asked = {"capability": "proof", **arguments, "sysctl": {**good, **arguments.get("sysctl", {})}}
    refused = module("host_settings", **asked)
    assert refused["failed"]
    assert "nothing was changed" in refused["msg"]
    assert reason in refused["msg"]
    assert rig.must(SNAPSHOT) == earlier


@pytest.mark.fast
def test_a_value_that_the_kernel_refuses_fails_and_says_what_was_done(rig: Rig, module: Module, earlier: str) -> None:
    wish = {"capability": "proof", "sysctl": {"net.core.somaxconn": 5000, "vm.swappiness": 1000}}
    failed = module("host_settings", **wish)
    assert "/proc/sys/vm/swappiness: the kernel refused '1000' (EINVAL" in failed["msg"]
    assert failed["done"] == ["/proc/sys/net/core/somaxconn 4096 -> 5000"]
    assert not rig.must("find /etc -name '*organism*'")  # no boot file with a value that the kernel refuses


@pytest.mark.fast
def test_a_value_that_the_kernel_alters_fails_with_both_and_is_put_back(rig: Rig, module: Module, earlier: str) -> None:
    disk = rig.must("basename $(ls -d /sys/block/*/queue | grep -v 'loop\\|zram' | head -1 | xargs dirname)").strip()
    path = f"/sys/block/{disk}/queue/read_ahead_kb"
    before = rig.must(f"cat {path}").strip()
    failed = module("host_settings", capability="proof", sysfs={path: 5})  # the kernel counts in pages
    assert f"{path}: wrote '5', and the kernel made it '4'; '{before}' is back" in failed["msg"]
    assert rig.must(f"cat {path}").strip() == before
