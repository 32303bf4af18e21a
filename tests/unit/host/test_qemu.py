# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU as /proc and the monitor show it, on trees of both kinds of vhost; zones, settings, records, drop-ins."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from organism.core import _cpu_list, _owned_files, _qemu, _qemu_host, _qemu_records, _qemu_scope
from organism.core._cpu_plan import CpuPlan
from organism.core._earlier import EarlierState
from organism.core._host_files import FileWish
from organism.core._qemu_pin import Hands
from organism.core._qemu_plan import PinRefusedError
from organism.core._qemu_records import Config, Record, Wish
from organism.core._qmp import Answer
from organism.core._root import Root

NO_SETAFFINITY = 0x04000000


class Tree:
    """A machine of 12 CPUs that is made up: processes, files, and a monitor that answers."""

    def __init__(self, top: Path) -> None:
        self.top, self.root = top, Root(top)
        self.masks: dict[int, set[int]] = {}
        self.write("sys/devices/system/cpu/online", "0-11")
        for cpu in range(12):
            siblings = f"{cpu % 6},{cpu % 6 + 6}"
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        self.write("etc/organism/cpu_plan.json", CpuPlan((0, 6), (2, 3, 4, 5, 8, 9, 10, 11), (1, 7)).text())

    def write(self, path: str, text: str) -> None:
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, folder: str, tid: int, comm: str, *, parent: int = 1, flags: int = 0, start: int = 77) -> None:
        self.write(f"{folder}/stat", f"{tid} ({comm}) S {parent} 0 0 0 0 {flags} {'0 ' * 12}{start} 0 0\n")
        self.write(f"{folder}/comm", f"{comm}\n")
        self.masks[tid] = set(range(12))

    def vm(self, vmid: int, pid: int, *, vcpus: int = 2, vhost: str = "task") -> None:
        """As on Proxmox VE: the process is called kvm, and so is the I/O thread."""
        self.write(f"run/qemu-server/{vmid}.pid", f"{pid}\n")
        self.write(f"proc/{pid}/cgroup", f"0::/qemu.slice/{vmid}.scope\n")
        self.write(f"proc/{pid}/cmdline", f"/usr/bin/kvm\0-id\0{vmid}\0")
        (self.top / f"proc/{pid}/exe").symlink_to("/usr/bin/qemu-system-x86_64")
        self.process(f"proc/{pid}", pid, "kvm")
        self.process(f"proc/{pid}/task/{pid}", pid, "kvm")
        for number in range(vcpus):
            self.process(f"proc/{pid}/task/{pid + 1 + number}", pid + 1 + number, f"CPU {number}/KVM")
        self.process(f"proc/{pid}/task/{pid + 20}", pid + 20, "kvm")
        self.process(f"proc/{pid}/task/{pid + 21}", pid + 21, "call_rcu")
        self.process(f"proc/{pid}/task/{pid + 22}", pid + 22, f"iou-wrk-{pid}", flags=NO_SETAFFINITY)
        if vhost == "task":
            self.process(f"proc/{pid}/task/{pid + 30}", pid + 30, f"vhost-{pid}")
        else:
            self.process(f"proc/{pid + 30}", pid + 30, f"vhost-{pid}", parent=2)
            self.process(f"proc/{pid + 31}", pid + 31, f"vhost-{pid}", parent=900)  # a program that only looks so

    def ask(self, path: str) -> Answer:
        """The monitor of the VM whose socket this is."""
        pid = int(Path(path).with_suffix(".pid").read_text())
        tids = [int(each.name) for each in (self.top / f"proc/{pid}/task").iterdir()]
        vcpus = sorted(tid for tid in tids if pid < tid < pid + 20)
        cpus: list[dict[str, Any]] = [
            {"cpu-index": n, "thread-id": tid, "props": {"socket-id": 0, "core-id": n, "thread-id": 0}}
            for n, tid in enumerate(vcpus)
        ]
        return Answer((cpus, [{"id": "iothread-virtioscsi0", "thread-id": pid + 20}]), pid)

    def hands(self) -> Hands:
        def set_mask(tid: int, cpus: Any) -> None:
            self.masks[tid] = set(cpus)

        def run(argv: list[str], **_options: object) -> str:
            raise AssertionError(argv)

        return Hands(self.root, lambda tid: self.masks[tid], set_mask, self.ask, run)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("vhost", ["task", "kthread"])
def test_threads_by_the_monitor_and_not_by_their_names(tree: Tree, vhost: str) -> None:
    tree.vm(100, 4000, vhost=vhost)
    machine = _qemu.find(tree.root, _qemu.pve(100))
    assert machine is not None
    roles = {thread.tid: thread.role for thread in _qemu.threads(tree.root, machine, tree.ask)}
    assert roles == {
        4000: "main",
        4001: "vcpu",
        4002: "vcpu",
        4020: "iothread",
        4021: "emulator",
        4022: "fixed",
        4030: "vhost",
    }


def test_a_single_thread_for_all_vcpus_is_one() -> None:
    cpus = [{"cpu-index": n, "thread-id": 5} for n in (1, 0)]
    assert [(t.tid, t.index, t.core) for t in _qemu._of_monitor(cpus, []).values()] == [(5, 0, None)]


def test_who_is_the_vm(tree: Tree) -> None:
    tree.vm(100, 4000)
    target = _qemu.pve(100)
    assert _qemu.find(tree.root, target) == _qemu.Machine(target, 4000, 77)
    tree.write("proc/4000/cgroup", "0::/qemu.slice/1000.scope\n")
    assert _qemu.find(tree.root, target) is not None, "an older kernel's tree: its words say -id 100"
    tree.write("proc/4000/cmdline", "/usr/bin/kvm\0-id\0" + "101\0")
    assert _qemu.find(tree.root, target) is None
    tree.write("run/qemu-server/100.pid", "x\n")
    with pytest.raises(_qemu.QemuError, match="100.pid holds no process id"):
        _qemu.find(tree.root, target)


def test_a_host_is_pinned_foretold_and_taken_back(tree: Tree) -> None:
    """Two VMs in one call: what check mode says is what the run does, CPUs of the second one included."""
    tree.vm(100, 4000)
    tree.vm(101, 5000, vhost="kthread")
    before = {tid: set(mask) for tid, mask in tree.masks.items()}
    config = Config(_qemu_host.wishes_from([{"vmid": 100}, {"vmid": 101}, {"vmid": 102}]))
    foretold = _qemu_host.present(tree.hands(), config, dry=True)
    assert tree.masks == before and not tree.root.exists("/var/lib/organism") and not tree.root.exists("/run/organism")
    done = _qemu_host.present(tree.hands(), config)
    assert done.difference.message == foretold.difference.message
    assert [r.vcpus for r in done.results] == [{0: 2, 1: 3}, {0: 4, 1: 5}, {}]
    assert done.results[2].notes == ("it does not run, and will be pinned at its start",)
    assert tree.masks[5001] == {4} and tree.masks[5030] == {1, 7} and tree.masks[5031] == set(range(12))
    assert tree.masks[4022] == set(range(12)), "the kernel's own are left alone"
    for vmid in (100, 101, 102):
        text = tree.root.read(f"/etc/systemd/system/{vmid}.scope.d/50-organism.conf")
        assert text.endswith("[Scope]\nAllowedCPUs=1-5,7-11")
    assert tree.root.path(_qemu_host.ENTRY).stat().st_mode & 0o777 == 0o755
    assert not _qemu_host.present(tree.hands(), config).difference

    fewer = Config(_qemu_host.wishes_from([{"vmid": 100}]))
    assert _qemu_host.present(tree.hands(), fewer).difference
    assert tree.masks[5001] == set(range(12)), "a VM that is no longer named is released"
    assert not tree.root.exists("/etc/systemd/system/101.scope.d")
    assert not _qemu_host.present(tree.hands(), fewer).difference

    gone = _qemu_host.absent(tree.hands(), dry=True)
    assert _qemu_host.absent(tree.hands()).difference.message == gone.difference.message
    assert tree.masks == before
    left = {str(path.relative_to(tree.top)) for path in (tree.top / "etc").rglob("*") if path.is_file()}
    assert left == {"etc/organism/cpu_plan.json"}
    assert not tree.root.exists("/etc/systemd") and not tree.root.exists("/etc/organism/hook.d")
    assert not tree.root.exists("/run/organism/pins")
    assert not _qemu_host.absent(tree.hands()).difference


def test_all_is_refused_before_anything_changes(tree: Tree) -> None:
    tree.vm(100, 4000)
    tree.vm(101, 5000, vcpus=7)
    before = {tid: set(mask) for tid, mask in tree.masks.items()}
    config = Config(_qemu_host.wishes_from([{"vmid": 100}, {"vmid": 101}]))
    with pytest.raises(PinRefusedError, match="VM 101 has 7 vCPUs"):
        _qemu_host.present(tree.hands(), config)
    assert tree.masks == before
    assert not tree.root.exists(_qemu_records.CONFIG)


def test_without_a_plan_check_mode_says_what_it_can(tree: Tree) -> None:
    plan = tree.root.path("/etc/organism/cpu_plan.json")
    stored = CpuPlan((0, 6), (2, 8), (1, 7))
    plan.unlink()
    config = Config(_qemu_host.wishes_from([{"vmid": 100}]))
    with pytest.raises(PinRefusedError, match="run level 1"):
        _qemu_host.present(tree.hands(), config)
    assert _qemu_host.present(tree.hands(), config, dry=True).zones is None
    foretold = _qemu_host.present(tree.hands(), config, foretold=stored, dry=True)
    assert any("AllowedCPUs=1-2,7-8" in str(change.after) for change in foretold.difference.changes)


@pytest.mark.parametrize(
    ("vms", "why"),
    [
        ([{"vmid": 99}], "99 is no VMID"),
        ([{"vmid": 100}, {"vmid": 100}], "named twice"),
        ([{"vmid": 100, "oversubscribe": 0.5}], "1 or more, not 0.5"),
        ([{"name": "../x", "pidfile": "/a", "qmp": "/b"}], "is no name"),
        ([{"name": "100", "pidfile": "/a", "qmp": "/b"}], "is a VMID's"),
        ([{"name": "x"}], "names no VM"),
    ],
)
def test_what_names_no_vm_is_refused(vms: list[dict[str, Any]], why: str) -> None:
    with pytest.raises((PinRefusedError, _qemu.QemuError), match=why):
        _qemu_host.wishes_from(vms)


@pytest.mark.parametrize(
    ("vcpu", "io", "why"),
    [
        ("2-12", "1", r"not online: 12; online are 0-11"),
        ("2-5", "5,7", "VCPU and IO overlap in CPUs 5"),
        ("0,2", "1", "VCPU and HOST overlap in CPUs 0"),
        ("5-2", "1", "reversed"),
        ("a", "1", "no CPU number"),
    ],
)
def test_zones_that_cannot_be_are_refused(tree: Tree, vcpu: str, io: str, why: str) -> None:
    with pytest.raises(PinRefusedError, match=why):
        _qemu_records.zones(tree.root, vcpu, io)


def test_whose_zones_count(tree: Tree) -> None:
    zones = _qemu_records.zones(tree.root)
    assert (zones.vcpu, zones.io, zones.source) == ((2, 3, 4, 5, 8, 9, 10, 11), (1, 7), "/etc/organism/cpu_plan.json")
    assert (2, 8) in zones.cores
    tree.write("etc/organism/extreme.conf", "# x\nHOST_CPUS=0,6\nVCPU_CPUS='3,9'\nIO_CPUS=\n")
    zones = _qemu_records.zones(tree.root)
    assert (zones.vcpu, zones.io) == ((3, 9), (1, 7))
    assert _qemu_records.zones(tree.root, "4,10").vcpu == (4, 10)


def test_settings_and_records_survive_writing_and_reading(tree: Tree) -> None:
    wishes = (Wish(_qemu.pve(100), 1.5), Wish(_qemu.Target("x", "/run/x.pid", "/run/x.qmp")))
    config = Config(wishes, True, "2-5", "1", False)
    tree.write("etc/organism/qemu_pin.json", config.text())
    assert _qemu_records.load_config(tree.root) == config
    record = Record("100", 4000, 77, {0: 2}, (1, 7), {4000: "0-11"}, "")
    _qemu_records.save(tree.root, record)
    assert _qemu_records.load_record(tree.root, "100") == record
    tree.write("run/organism/pins/100.json", "{")
    assert _qemu_records.records(tree.root) == {}
    for text in ("{", json.dumps({"format": 9}), json.dumps({"format": 1})):
        tree.write("etc/organism/qemu_pin.json", text)
        with pytest.raises(_qemu.QemuError, match="qemu_pin.json"):
            _qemu_records.load_config(tree.root)


def test_only_a_record_of_a_living_process_holds_cpus(tree: Tree) -> None:
    tree.vm(100, 4000)
    _qemu_records.save(tree.root, Record("100", 4000, 77, {0: 2}))
    _qemu_records.save(tree.root, Record("101", 4000, 78, {0: 3}))
    _qemu_records.save(tree.root, Record("102", 6000, 77, {0: 4}))
    assert _qemu_records.holders(tree.root, "103") == {"VM 100": [2]}
    assert _qemu_records.holders(tree.root, "100") == {}


def test_the_folder_of_records_goes_with_the_last_one(tree: Tree) -> None:
    _qemu_records.clear(tree.root)
    tree.vm(100, 4000)
    _qemu_records.save(tree.root, Record("100", 4000, 77, {0: 2}))
    _qemu_records.clear(tree.root)
    assert _qemu_records.load_record(tree.root, "100") is not None
    waited = []

    def wait() -> None:
        with _qemu_records.locked(tree.root):
            waited.append((tree.top / "run/organism/pins/.lock").exists())

    waiter = threading.Thread(target=wait)
    with _qemu_records.locked(tree.root):
        waiter.start()
        _qemu_records.drop(tree.root, "100")
        _qemu_records.remove(tree.top / "run/organism/pins")  # as `clear` does, under the lock
    waiter.join(60)
    assert waited == [True], "who waited holds the lock that others will ask for"
    _qemu_records.clear(tree.root)
    assert not tree.root.exists("/run/organism/pins")


def test_the_control_group_is_limited_live_and_for_the_next_start(tree: Tree) -> None:
    tree.vm(100, 4000)
    tree.write("run/systemd/system/x", "")
    tree.write("sys/fs/cgroup/qemu.slice/100.scope/cpuset.cpus", "0-11\n")
    calls: list[str] = []
    hands = tree.hands()

    def run(argv: list[str], **_options: object) -> str:
        calls.append(" ".join(argv))
        if argv[1] == "set-property":
            tree.write("sys/fs/cgroup/qemu.slice/100.scope/cpuset.cpus", argv[-1].partition("=")[2] + "\n")
        return ""

    hands = Hands(hands.root, hands.get, hands.set, hands.ask, run)
    config = Config(_qemu_host.wishes_from([{"vmid": 100}]))
    _qemu_host.present(hands, config)
    assert calls == ["systemctl daemon-reload", "systemctl set-property --runtime 100.scope AllowedCPUs=1-5,7-11"]
    assert not _qemu_host.present(hands, config).difference
    calls.clear()
    _qemu_host.absent(hands)
    assert calls == ["systemctl daemon-reload", "systemctl set-property --runtime 100.scope AllowedCPUs=0-11"]
    assert _qemu_scope.current(tree.root, 101) is None


def with_systemd(tree: Tree, *vms: tuple[int, int]) -> Hands:
    """Hands whose systemctl does as systemd: once drop-ins are loaded, limiting one scope limits all that have one."""
    tree.write("run/systemd/system/x", "")
    tree.write("sys/fs/cgroup/qemu.slice/cpuset.cpus.effective", "0-11\n")
    hands = tree.hands()
    loaded: dict[int, str] = {}

    def run(argv: list[str], **_options: object) -> str:
        if argv[1] == "daemon-reload":
            loaded.clear()
            loaded.update({vmid: _qemu_scope.at_start(tree.root, vmid) or "" for vmid, _pid in vms})
        else:
            loaded[int(argv[-2].removesuffix(".scope"))] = argv[-1].partition("=")[2]
            for vmid, pid in vms:
                tree.write(f"sys/fs/cgroup/qemu.slice/{vmid}.scope/cpuset.cpus", loaded[vmid] + "\n")
                for tid in (pid, pid + 1, pid + 2):
                    tree.masks[tid] &= set(_cpu_list.parse(loaded[vmid] or "0-11"))
        return ""

    for vmid, _pid in vms:
        tree.write(f"sys/fs/cgroup/qemu.slice/{vmid}.scope/cpuset.cpus", "\n")
    return Hands(hands.root, hands.get, hands.set, hands.ask, run)


def test_what_a_vm_had_is_known_before_the_first_is_limited(tree: Tree) -> None:
    """Limiting VM 100's control group limits that of VM 101 too: that is not what it had before."""
    tree.vm(100, 4000)
    tree.vm(101, 5000)
    before = {tid: set(mask) for tid, mask in tree.masks.items()}
    hands = with_systemd(tree, (100, 4000), (101, 5000))
    config = Config(_qemu_host.wishes_from([{"vmid": 100}, {"vmid": 101}]))
    foretold = _qemu_host.present(hands, config, dry=True)
    done = _qemu_host.present(hands, config)
    for said, did in zip(foretold.results, done.results, strict=True):
        assert [(pin.before, pin.wanted) for pin in did.pins] == [(pin.before, pin.wanted) for pin in said.pins]
        assert did.scope == said.scope == ("", "1-5,7-11") and not did.known
    record = _qemu_records.load_record(tree.root, "101")
    assert record is not None and record.earlier[5000] == "0-11" and record.scope == ""
    assert not _qemu_host.present(hands, config).difference
    _qemu_host.absent(hands)
    assert tree.masks == before
    assert [_qemu_scope.current(tree.root, vmid) for vmid in (100, 101)] == ["", ""]


def test_a_vm_that_started_under_our_limit_is_released_without_any(tree: Tree) -> None:
    tree.vm(100, 4000)
    hands = with_systemd(tree, (100, 4000))
    config = Config(_qemu_host.wishes_from([{"vmid": 100}]))
    _qemu_host.present(hands, config)
    tree.process("proc/4000", 4000, "kvm", start=99)  # started anew: all it has seen is our drop-in
    for tid in tree.masks:
        tree.masks[tid] = set(_cpu_list.parse("1-5,7-11"))
    tree.masks[4020] = {3}
    assert not _qemu_host.present(hands, config).results[0].known
    record = _qemu_records.load_record(tree.root, "100")
    assert record is not None and record.scope == "" and record.earlier[4001] == "0-11" and record.earlier[4020] == "3"
    _qemu_host.absent(hands)
    assert _qemu_scope.current(tree.root, 100) == ""
    assert tree.masks[4001] == set(range(12)) and tree.masks[4020] == {3}


def test_a_vm_gets_the_cpus_of_one_that_leaves_in_the_same_run(tree: Tree) -> None:
    tree.vm(100, 4000, vcpus=8)
    tree.vm(101, 5000, vcpus=8)
    _qemu_host.present(tree.hands(), Config(_qemu_host.wishes_from([{"vmid": 100}])))
    other = Config(_qemu_host.wishes_from([{"vmid": 101}]))
    foretold = _qemu_host.present(tree.hands(), other, dry=True)
    assert _qemu_host.present(tree.hands(), other).difference.message == foretold.difference.message
    assert tree.masks[4001] == set(range(12)) and tree.masks[5001] == {2}


def test_advice_on_the_option_that_only_root_may_set(tree: Tree) -> None:
    tree.write("etc/pve/qemu-server/100.conf", "cores: 2\naffinity: 2-9\n\n[snap]\naffinity: 1-5,7-11\n")
    tree.write("etc/pve/qemu-server/101.conf", "affinity: 1,2,3-5,7-11\n")
    config = Config(_qemu_host.wishes_from([{"vmid": 100}]), every=True)
    assert _qemu_host.affinity_advice(tree.root, config, _qemu_records.zones(tree.root)) == [
        {"vmid": 100, "now": "2-9", "recommended": "1-5,7-11", "command": "qm set 100 --affinity 1-5,7-11"}
    ]


def test_files_of_others_come_back_and_their_later_changes_stay(tmp_path: Path) -> None:
    root = Root(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/a").write_text("mine")
    earlier = EarlierState("x", root)

    def bring(*wishes: FileWish) -> _owned_files.FilePlan:
        plan = _owned_files.plan(root, earlier, wishes)
        _owned_files.apply(root, earlier, plan)
        return plan

    bring(FileWish("/etc/a", "ours"), FileWish("/etc/b.d/c", "ours"))
    (tmp_path / "etc/b.d/c").write_text("edited")
    last = bring()
    assert (tmp_path / "etc/a").read_text() == "mine"
    assert (tmp_path / "etc/b.d/c").read_text() == "edited"
    assert list(last.others) == ["/etc/b.d/c"]
    assert not earlier.kept
