# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The simulated node's VMs: hooks in their phases, locks, devices, backups, and ends of every kind."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from pvesim.harness import HANG_S, Sim
from pvesim.process import QEMU

from organism.core import _guard_devices, _qemu
from organism.core._root import Root

_ids = itertools.count(100)

RECORDER = """#!/bin/sh
echo "$1 $2 ${PVE_MIGRATED_FROM:-}" >> %s
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sim]:
    """A node whose locks are given up after a second."""
    if os.geteuid() != 0:
        pytest.skip("qm answers root alone: run as root")
    with Sim(lock_timeout=1) as made:
        yield made


def new_vm(sim: Sim, *words: object) -> int:
    vmid = next(_ids)
    sim.qm("create", vmid, *words)
    return vmid


def recorded(sim: Sim, vmid: int) -> list[str]:
    """The phases that a VM's hook has seen."""
    lines = (sim.top / "phases").read_text().splitlines() if (sim.top / "phases").exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == str(vmid)]


def with_recorder(sim: Sim, *words: object) -> int:
    return new_vm(sim, "--hookscript", sim.hook(RECORDER % (sim.top / "phases"), "recorder.sh"), *words)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that has no event of its own here."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def test_phases_of_a_start_and_a_shutdown(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.qm("start", vmid)
    sim.qm("shutdown", vmid, "--timeout", 20)
    assert recorded(sim, vmid) == ["pre-start", "post-start", "pre-stop", "post-stop"]


def test_a_guest_that_switches_itself_off_has_no_pre_stop(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.qm("start", vmid)
    assert sim.control("guest-poweroff", vmid=vmid)
    until(lambda: "post-stop" in recorded(sim, vmid), "post-stop after a power-off by the guest")
    assert recorded(sim, vmid) == ["pre-start", "post-start", "post-stop"]


def test_a_crash_has_its_post_stop_and_gives_devices_back(sim: Sim) -> None:
    vmid = with_recorder(sim, "--machine", "q35", "--hostpci0", "0000:05:00,pcie=1")
    sim.qm("start", vmid)
    assert "0000:05:00.0" in sim.control("reservations")
    sim.control("crash", vmid=vmid)
    until(lambda: "post-stop" in recorded(sim, vmid), "post-stop after a crash")
    assert "0000:05:00.0" not in sim.control("reservations")


def test_a_reboot_starts_it_again_and_applies_what_was_pending(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.qm("start", vmid)
    before = sim.control("machines")[str(vmid)]
    sim.qm("set", vmid, "--memory", 1024)
    sim.qm("reboot", vmid)
    until(lambda: sim.control("machines").get(str(vmid), before) != before, "the second run")
    until(lambda: recorded(sim, vmid).count("post-start") == 2, "the hooks of the second start")
    assert recorded(sim, vmid).count("post-stop") == 1
    assert "memory: 1024" in (sim.top / f"etc/pve/qemu-server/{vmid}.conf").read_text().partition("[PENDING]")[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [("echo not now; exit 3", "exit code 3"), ("kill -9 $$", "got signal 9"), ("exec /nonexistent", "exit code 127")],
)
def test_pre_start_refuses(sim: Sim, body: str, said: str) -> None:
    vmid = new_vm(
        sim, "--hookscript", sim.hook(f"#!/bin/sh\n[ $2 = pre-start ] || exit 0\n{body}\n", f"r{next(_ids)}.sh")
    )
    done = sim.qm("start", vmid, check=False)
    assert done.returncode == 255
    assert f"hookscript error for {vmid} on pre-start" in done.stderr and said in done.stderr
    assert str(vmid) not in sim.control("machines")


@pytest.mark.parametrize("phase", ["post-start", "pre-stop", "post-stop"])
def test_other_phases_only_warn(sim: Sim, phase: str) -> None:
    vmid = new_vm(sim, "--hookscript", sim.hook(f"#!/bin/sh\n[ $2 != {phase} ]\n", f"w-{phase}.sh"))
    told = sim.qm("start", vmid).stdout + sim.qm("shutdown", vmid).stdout
    assert f"hookscript error for {vmid} on {phase}" in told


def test_a_hook_that_vanished_refuses_the_start(sim: Sim) -> None:
    vmid = new_vm(sim, "--hookscript", sim.hook("#!/bin/sh\n", "vanishing.sh"))
    (sim.snippets / "vanishing.sh").unlink()
    done = sim.qm("start", vmid, check=False)
    assert done.returncode == 255 and "script 'local:snippets/vanishing.sh' does not exist" in done.stderr
    done = sim.qm("set", vmid, "--hookscript", "local:snippets/other.sh", check=False)
    assert done.returncode == 255 and "hookscript: script 'local:snippets/other.sh' does not exist" in done.stderr


def test_a_hook_may_stop_another_vm(sim: Sim) -> None:
    other = new_vm(sim, "--machine", "q35", "--hostpci0", "0000:06:00,pcie=1")
    sim.qm("start", other)
    hook = sim.hook(f"#!/bin/sh\n[ $2 = pre-start ] || exit 0\nqm shutdown {other} --timeout 20\n", "switch.sh")
    vmid = new_vm(sim, "--machine", "q35", "--hostpci0", "0000:06:00,pcie=1", "--hookscript", hook)
    sim.qm("start", vmid)
    assert set(sim.control("machines")) >= {str(vmid)} and str(other) not in sim.control("machines")


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_hooks_that_stop_each_other_wait_for_each_others_lock(short: Sim) -> None:
    one, two = new_vm(short), new_vm(short)
    for vmid, other in ((one, two), (two, one)):
        # it waits until both have their locks, so that each surely waits for the other
        text = (
            f"#!/bin/sh\n[ $2 = pre-start ] || exit 0\ntouch {short.top}/at.{vmid}\n"
            f"while [ ! -e {short.top}/at.{other} ]; do sleep 0.05; done\nexec qm stop {other}\n"
        )
        short.qm("set", vmid, "--hookscript", short.hook(text, f"symmetric{vmid}.sh"))
    started = [
        subprocess.Popen([short.bin / "qm", "start", str(vmid)], stderr=subprocess.PIPE, text=True)
        for vmid in (one, two)
    ]
    told = [each.communicate(timeout=HANG_S)[1] for each in started]
    # the first to give up lets the other one go on
    assert {each.returncode for each in started} <= {0, 255} and 255 in {each.returncode for each in started}
    assert "hookscript error" in "".join(told)
    assert len(short.control("machines")) <= 1


def test_a_vms_lock_is_given_up_after_a_while(short: Sim) -> None:
    vmid = new_vm(short)
    with (short.top / f"var/lock/qemu-server/lock-{vmid}.conf").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = short.qm("set", vmid, "--cores", 2, check=False)
        assert done.returncode == 255
        assert done.stderr == f"can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - got timeout\n"
    short.qm("set", vmid, "--cores", 2)


def test_two_starts_at_once_make_one_vm(sim: Sim) -> None:
    vmid = new_vm(sim)
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(sim.qm("start", vmid, check=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert sorted(each.returncode for each in results) == [0, 255, 255, 255]
    assert {each.stderr for each in results if each.returncode} == {f"VM {vmid} already running\n"}


# ---- devices and mistakes --------------------------------------------------------------------------------------------


def test_a_device_has_one_vm(sim: Sim) -> None:
    one, two = (new_vm(sim, "--machine", "q35", "--hostpci0", "0000:07:00,pcie=1") for _ in range(2))
    sim.qm("start", one)
    done = sim.qm("start", two, check=False)
    assert done.stderr == f"PCI device '0000:07:00.0' already in use by VMID '{one}'\n"
    sim.qm("stop", one)
    sim.qm("start", two)


def test_alternatives_of_a_mapping_are_taken_in_order(sim: Sim) -> None:
    maps = [
        word
        for bus, group in (("08", 17), ("09", 18))
        for word in ("--map", f"node=pve1,path=0000:{bus}:00,id=1002:67df,subsystem-id=1da2:e353,iommugroup={group}")
    ]
    sim.run("pvesh", "create", "/cluster/mapping/pci", "--id", "either", *maps)
    vms = [new_vm(sim, "--machine", "q35", "--hostpci0", "mapping=either,pcie=1") for _ in range(3)]
    assert [sim.qm("start", vmid, check=False).returncode for vmid in vms] == [0, 0, 255]
    taken = sim.control("reservations")
    assert (taken["0000:08:00.1"]["vmid"], taken["0000:09:00.0"]["vmid"]) == (vms[0], vms[1])
    assert "could not find a free device for 'hostpci0'" in sim.qm("start", vms[2], check=False).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cores", "64"], "MAX 12 vcpus allowed per VM on this node"),
        (["--hugepages", "2"], "numa needs to be enabled to use hugepages"),
        (["--numa", "1", "--numa0", "cpus=0,memory=256"], "total memory for NUMA nodes must be equal"),
        (["--numa", "1", "--numa0", "cpus=0,memory=512,hostnodes=0"], "you need to define a policy for hostnode 0"),
        (["--hostpci0", "0000:0a:00,pcie=1"], "q35 machine model is not enabled"),
        (["--hostpci0", "0000:aa:00"], "no PCI device found for '0000:aa:00'"),
        (["--hostpci0", "mapping=nobody"], "PCI device mapping not found for 'nobody'"),
        (["--hostpci0", "0000:0a:00", "--hostpci1", "0000:0a:00.1"], "device '0000:0a:00.1' assigned more than once"),
        (["--affinity", "40-47"], "start failed: QEMU exited with code 1"),
    ],
)
def test_mistakes_that_only_the_start_finds(sim: Sim, options: list[str], said: str) -> None:
    vmid = new_vm(sim, *options)  # Proxmox VE takes them without a word
    done = sim.qm("start", vmid, check=False)
    assert done.returncode == 255 and said in done.stderr


def test_changed_hardware_makes_a_mapping_invalid(sim: Sim) -> None:
    mapped = "node=pve1,path=0000:0b:00,id=1002:67df,subsystem-id=1da2:e353,iommugroup=20"
    sim.run("pvesh", "create", "/cluster/mapping/pci", "--id", "moved", "--map", mapped)
    vmid = new_vm(sim, "--machine", "q35", "--hostpci0", "mapping=moved")
    before = sim.control("devices")
    sim.control("set-devices", devices=[{**each, "group": (each["group"] or 0) + 5} for each in before])
    try:
        done = sim.qm("start", vmid, check=False)
    finally:
        sim.control("set-devices", devices=before)
    assert (
        "PCI device mapping invalid (hardware probably changed): 'iommugroup' does not match for 'moved'" in done.stderr
    )
    sim.qm("start", vmid)


# ---- backups ---------------------------------------------------------------------------------------------------------


def backup(sim: Sim, vmid: int, mode: str) -> str:
    return sim.run(
        "pvesh", "create", "/nodes/pve1/vzdump", "--vmid", vmid, "--mode", mode, "--output-format", "json"
    ).stdout


def test_a_backup_of_a_stopped_vm_runs_its_hooks(sim: Sim) -> None:
    vmid = with_recorder(sim)
    assert "starting kvm to execute backup task" in backup(sim, vmid, "stop")
    assert recorded(sim, vmid) == ["pre-start", "post-start", "pre-stop", "post-stop"]
    assert "lock" not in (sim.top / f"etc/pve/qemu-server/{vmid}.conf").read_text()


def test_a_backup_in_mode_stop_runs_the_vm_again(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.qm("start", vmid)
    before = sim.control("machines")[str(vmid)]
    backup(sim, vmid, "stop")
    assert recorded(sim, vmid) == ["pre-start", "post-start", "pre-stop", "post-stop", "pre-start", "post-start"]
    assert sim.control("machines")[str(vmid)] != before
    assert "status: running" in sim.qm("status", vmid).stdout


def test_a_snapshot_leaves_a_running_vm_alone(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.qm("start", vmid)
    backup(sim, vmid, "snapshot")
    assert recorded(sim, vmid) == ["pre-start", "post-start"]


# ---- real ones -------------------------------------------------------------------------------------------------------


def test_our_own_reader_finds_the_process(sim: Sim) -> None:
    vmid = new_vm(sim, "--machine", "q35", "--hostpci0", "0000:0c:00,pcie=1")
    sim.qm("start", vmid)
    pid = sim.control("machines")[str(vmid)]
    assert int((sim.top / f"run/qemu-server/{vmid}.pid").read_text()) == pid
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert list(_guard_devices.addresses_in(words)) == ["0000:0c:00.0", "0000:0c:00.1"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: str(vmid) not in sim.control("machines"), "the end of a killed process")


def test_qemu_obeys_the_power_button() -> None:
    if os.geteuid() != 0 or shutil.which(QEMU) is None:
        pytest.skip(f"needs root and {QEMU}")
    with Sim(qemu=True) as sim:
        for machine in ("q35", "pc"):
            vmid = new_vm(sim, "--machine", machine, "--cores", 2)
            sim.qm("start", vmid)
            until(partial(_says_ready, sim.top / f"run/qemu-server/{vmid}.console"), "the guest")
            target = _qemu.pve(vmid)
            found = _qemu.find(_Tree(sim.top), target)
            assert found is not None and found.pid == sim.control("machines")[str(vmid)]
            sim.qm("shutdown", vmid, "--timeout", 30)
            assert "status: stopped" in sim.qm("status", vmid).stdout


def _says_ready(console: Path) -> bool:
    return console.exists() and console.read_bytes() == b"R"


class _Tree(Root):
    """The node's files, and this machine's processes."""

    def path(self, path: str) -> Path:
        return Path(path) if path.startswith("/proc/") else super().path(path)


# ---- other nodes, other masters --------------------------------------------------------------------------------------


def test_a_vm_that_comes_from_another_node_tells_its_hooks(sim: Sim) -> None:
    hook = sim.hook(f'#!/bin/sh\necho "$1 $2 from=$PVE_MIGRATED_FROM" >> {sim.top}/moved\n', "moved.sh")
    vmid = next(_ids)
    assert sim.control("migrate-in", vmid=vmid, source="pve2", config={"name": "guest", "hookscript": hook}) == "OK"
    sim.control("migrate-out", vmid=vmid)
    assert (sim.top / "moved").read_text().split("\n")[:-1] == [
        f"{vmid} pre-start from=pve2",
        f"{vmid} post-start from=pve2",
    ]
    assert str(vmid) not in sim.control("machines")
    assert str(vmid) not in [line.split()[0] for line in sim.qm("list").stdout.splitlines()]  # the last column: PIDs


def test_under_ha_a_start_is_only_a_request(sim: Sim) -> None:
    vmid = with_recorder(sim)
    sim.control("set-ha", vmid=vmid, state="stopped")
    assert f"Requesting HA start for VM {vmid}" in sim.qm("start", vmid).stdout
    until(lambda: str(vmid) in sim.control("machines"), "the resource manager's start")
    assert f"vm: {vmid}\n\tstate started\n" in (sim.top / "etc/pve/ha/resources.cfg").read_text()
    sim.control("crash", vmid=vmid)
    until(lambda: recorded(sim, vmid).count("post-start") == 2, "what shall run is started again")
    assert f"Requesting HA stop for VM {vmid}" in sim.qm("shutdown", vmid, "--timeout", 20).stdout
    until(lambda: recorded(sim, vmid)[-2:] == ["pre-stop", "post-stop"], "the resource manager's shutdown")
    assert str(vmid) not in sim.control("machines")
    sim.control("set-ha", vmid=vmid, state=None)


def test_under_ha_a_start_that_is_refused_twice_ends_in_error(sim: Sim) -> None:
    hook = sim.hook(f"#!/bin/sh\n[ $2 = pre-start ] || exit 0\necho x >> {sim.top}/refused\nexit 1\n", "never.sh")
    vmid = new_vm(sim, "--hookscript", hook)
    sim.control("set-ha", vmid=vmid, state="started")
    until(lambda: sim.control("ha")[str(vmid)] == "error", "the resource manager gives up")
    assert (sim.top / "refused").read_text() == "x\nx\n"
    sim.control("set-ha", vmid=vmid, state=None)
