# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Four real QEMU processes on this machine: where their threads run, not only what their masks say."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from organism.core import _qemu, _qemu_pin, _qemu_records, _qmp
from organism.core._qemu import Target
from organism.core._qemu_pin import Hands, PinError
from organism.core._qemu_plan import PinRefusedError
from organism.core._qemu_records import Config, Wish
from organism.core._root import Root
from service.pin import machines
from service.pin.machines import Vm, node, tool, watch_cpus

CPUS = sorted(os.sched_getaffinity(0))

pytestmark = [
    pytest.mark.skipif(machines.QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs to tell one from the other"),
]

Start = Callable[..., Vm]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """vCPUs on the second CPU of this machine, everything else on the first."""
    return node(tmp_path, vcpu=[CPUS[1]], io=[CPUS[0]])


@pytest.fixture
def start(top: Path) -> Iterator[Start]:
    made: list[Vm] = []

    def begin(vmid: int, **options: object) -> Vm:
        made.append(Vm(top, vmid, **options))  # type: ignore[arg-type]  # passed on as they are
        return made[-1].start()

    yield begin
    for vm in made:
        vm.stop()


def wish(vmid: int, ratio: float | None = None) -> Wish:
    return Wish(_qemu.pve(vmid), ratio)


def pin(top: Path, vmid: int, ratio: float | None = None, *, dry: bool = False) -> _qemu_pin.Result:
    hands = Hands(Root(top))
    return _qemu_pin.pin(hands, wish(vmid, ratio), _qemu_records.zones(hands.root), dry=dry)


def test_four_busy_machines_stay_where_they_were_put(tmp_path: Path, start: Start, top: Path) -> None:
    """vCPUs of all four on the two CPUs of this machine by turns, declared as oversubscribed; measured over time."""
    (top / "etc/organism/cpu_plan.json").write_text(
        json.dumps({"format": 1, "host": CPUS[:2], "vcpu": CPUS[:2], "io": CPUS[:2]})
    )
    vms = [start(vmid, vcpus=2, spin=True) for vmid in (101, 102, 103, 104)]
    results = [pin(top, vm.vmid, 4.0) for vm in vms]
    placed = sorted(cpu for result in results for cpu in result.vcpus.values())
    assert placed == [CPUS[0]] * 4 + [CPUS[1]] * 4, "the load is even"

    vcpus = {
        each.thread.tid: (vm.pid, int(each.wanted))
        for vm, result in zip(vms, results, strict=True)
        for each in result.pins
        if each.thread.role == _qemu.VCPU
    }
    assert len(vcpus) == 8
    guests_run(vcpus)
    ran: set[int] = set()
    deadline = time.monotonic() + machines.HANG_GUARD
    while ran != vcpus.keys():  # on a machine that has other work, a thread's turn may be seconds away
        assert time.monotonic() < deadline, f"{vcpus.keys() - ran} did not run at all: the guest does not spin"
        for tid, (cpus, ticks) in watch_cpus([(pid, tid) for tid, (pid, _cpu) in vcpus.items()], 2.0).items():
            assert cpus == {vcpus[tid][1]}, f"thread {tid} ran elsewhere"
            if ticks > 0:
                ran.add(tid)


def guests_run(vcpus: dict[int, tuple[int, int]]) -> None:
    """Waits until each guest has started all its processors: a halted one uses no time."""
    deadline = time.monotonic() + machines.HANG_GUARD
    while time.monotonic() < deadline:
        before = {tid: int(machines.stat_fields(pid, tid)[11]) for tid, (pid, _cpu) in vcpus.items()}
        time.sleep(0.5)
        if all(int(machines.stat_fields(pid, tid)[11]) > before[tid] for tid, (pid, _cpu) in vcpus.items()):
            return
    pytest.fail("not all processors of the guests spin")


def test_every_thread_has_its_zone(start: Start, top: Path) -> None:
    vm = start(101, vcpus=1)
    result = pin(top, 101)
    roles = {each.thread.role: each for each in result.pins}
    assert roles["vcpu"].now == str(CPUS[1])
    # the name that Proxmox VE gives its I/O threads is too long for Linux: only the monitor tells this one
    assert roles["iothread"].thread.name == "iothread-virtioscsi0"
    assert {each.now for each in result.pins if each.thread.role != "vcpu"} == {str(CPUS[0])}
    vcpu = roles["vcpu"].thread.tid
    assert vm.masks() == {tid: {CPUS[1]} if tid == vcpu else {CPUS[0]} for tid in vm.masks()}
    assert not pin(top, 101).difference, "a second run changes something"


def test_check_predicts_exactly_what_the_run_changes(start: Start, top: Path) -> None:
    vm = start(101, vcpus=1)
    before = vm.masks()
    predicted = pin(top, 101, dry=True)
    assert vm.masks() == before
    assert not (top / "run/organism").exists()
    assert [str(c) for c in predicted.difference.changes] == [str(c) for c in pin(top, 101).difference.changes]


def test_absent_gives_the_earlier_masks_back_and_spares_what_others_have_set(start: Start, top: Path) -> None:
    vm = start(101, vcpus=1)
    iothread = next(each.thread.tid for each in pin(top, 101, dry=True).pins if each.thread.role == "iothread")
    os.sched_setaffinity(iothread, {CPUS[1]})  # a mask of its own before
    before = vm.masks()
    pin(top, 101)
    hands = Hands(Root(top))
    assert _qemu_pin.release(hands, "101", dry=True).difference
    released = _qemu_pin.release(hands, "101")
    assert vm.masks() == before
    assert not released.others
    assert not _qemu_pin.release(hands, "101").difference, "a second run changes something"

    pin(top, 101)
    os.sched_setaffinity(vm.pid, set(CPUS[:2]))
    before[vm.pid] = set(CPUS[:2])
    moved = _qemu_pin.release(hands, "101")
    assert vm.masks() == before
    assert not moved.others, "it is as it was before, whoever did that"


def test_more_vcpus_than_cpus_are_refused_before_anything_changes(start: Start, top: Path) -> None:
    vm = start(101, vcpus=2)
    before = vm.masks()
    with pytest.raises(PinRefusedError, match=r"VM 101 has 2 vCPUs.*has 1 of 1 CPUs left.*declare oversubscribe: 2 "):
        pin(top, 101)
    assert vm.masks() == before
    assert pin(top, 101, 2.0).vcpus == {0: CPUS[1], 1: CPUS[1]}


def test_a_second_machine_does_not_get_the_cpus_of_the_first(start: Start, top: Path) -> None:
    first = start(101, vcpus=1)
    start(102, vcpus=1)
    pin(top, 101)
    with pytest.raises(PinRefusedError, match=rf"VM 101 holds {CPUS[1]}"):
        pin(top, 102)
    first.stop()
    assert pin(top, 102).vcpus == {0: CPUS[1]}, "the CPUs of a VM that has ended are free"


def install_hook(top: Path, vmids: list[int]) -> None:
    """The entry of pinning, with the command of this checkout."""
    wishes = tuple(wish(vmid) for vmid in vmids)
    (top / "etc/organism/qemu_pin.json").write_text(Config(wishes).text())
    entry = top / "etc/organism/hook.d/post-start/50-pin"
    entry.parent.mkdir(parents=True)
    entry.write_text(f'#!/bin/sh\nexec {shlex.join(machines.command(top, "pin", "pin", "--from-hook"))} "$1"\n')
    entry.chmod(0o755)


def test_a_restarted_machine_is_pinned_when_the_hook_returns(start: Start, top: Path) -> None:
    """As Proxmox VE calls it. From the start on that took 0.19 s on two cores (2026-11-22); no test is timed."""
    install_hook(top, [101])
    vm = start(101, vcpus=1)
    assert tool(top, "hook", "101", "post-start").returncode == 0
    for _try in range(3):
        vm.stop()
        began = time.monotonic()
        vm.start()
        done = tool(top, "hook", "101", "post-start")
        print(f"{time.monotonic() - began:.2f} s from the start to the hook's return")
        assert done.returncode == 0, done.stdout
        assert "50-pin: VM 101: vCPU:CPU" in done.stdout
        assert pin(top, 101, dry=True).difference.changed is False


def test_the_hook_leaves_other_machines_alone(start: Start, top: Path) -> None:
    install_hook(top, [101])
    vm = start(102, vcpus=1)
    before = vm.masks()
    done = tool(top, "hook", "102", "post-start")
    assert (done.returncode, vm.masks()) == (0, before)
    assert "left alone" in done.stdout


def test_a_monitor_that_another_client_holds(start: Start, top: Path) -> None:
    vm = start(101, vcpus=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(vm.qmp))
        other.recv(100)  # the greeting: this one is served now
        with pytest.raises(_qmp.QmpBusyError, match=r"another client has held the monitor for 0.3 s"):
            _qmp.exchange(str(vm.qmp), ["query-cpus-fast"], deadline_s=0.3)
        threading.Timer(0.3, other.shutdown, [socket.SHUT_RDWR]).start()
        assert len(_qmp.exchange(str(vm.qmp), ["query-cpus-fast"]).replies[0]) == 1, "it waits within its deadline"
    assert _qmp.exchange(str(vm.qmp), ["query-cpus-fast"]).peer == vm.pid
    with pytest.raises(_qmp.QmpError, match="query-nothing is refused"):
        _qmp.exchange(str(vm.qmp), ["query-nothing"])
    vm.stop()
    with pytest.raises(_qmp.QmpError, match="nobody listens"):
        _qmp.exchange(str(vm.qmp), ["query-cpus-fast"])


def test_a_pid_that_another_process_got_is_no_machine(start: Start, top: Path) -> None:
    vm = start(101, vcpus=1)
    other = start(102, vcpus=1)
    pin(top, 101)
    mine = _qemu_records.load_record(Root(top), "101")
    vm.stop()
    vm.pidfile.write_text(str(os.getpid()))
    assert _qemu.find(Root(top), _qemu.pve(101)) is None, "a living process, and no QEMU"
    vm.pidfile.write_text(str(other.pid))
    assert _qemu.find(Root(top), _qemu.pve(101)) is None, "a QEMU, and another one"
    assert mine is not None
    reused = _qemu_records.Record("101", other.pid, mine.start, mine.vcpus, mine.io, {other.pid: "0"}, None)
    _qemu_records.save(Root(top), reused)
    before = other.masks()
    _qemu_pin.release(Hands(Root(top)), "101")
    assert other.masks() == before, "the record is of a process that had the number before"


def test_the_monitor_of_another_process_is_noticed(start: Start, top: Path) -> None:
    first, second = start(101, vcpus=1), start(102, vcpus=1)
    crossed = Target("crossed", str(first.pidfile).removeprefix(str(top)), str(second.qmp).removeprefix(str(top)))
    machine = _qemu.find(Root(top), crossed)
    assert machine is not None
    with pytest.raises(_qemu.QemuError, match=f"belongs to process {second.pid}"):
        _qemu.threads(Root(top), machine)


def test_threads_that_come_and_go_meanwhile(start: Start, top: Path) -> None:
    start(101, vcpus=1)
    root = Root(top)
    gone: list[int] = []

    def get(tid: int) -> set[int]:
        if tid in gone:
            raise ProcessLookupError
        return os.sched_getaffinity(tid)

    def vanish(tid: int, cpus: object) -> None:
        gone.append(tid)
        raise ProcessLookupError

    zones = _qemu_records.zones(root)
    result = _qemu_pin.pin(Hands(root, get=get, set=vanish), wish(101), zones)
    assert {each.now for each in result.pins} == {None}, "what has ended needs no CPU"

    asked = _qemu.ask(str(top / "run/qemu-server/101.qmp"))
    short = _qmp.Answer((asked.replies[0], []), asked.peer)
    late = _qemu_pin.pin(Hands(root, ask=lambda _path: short), wish(101), zones)
    assert len(late.pins) == len(list(Path(f"/proc/{late.pid}/task").iterdir()))
    assert {each.now for each in late.pins if each.thread.role != "vcpu"} == {str(CPUS[0])}


def test_a_mask_that_the_kernel_does_not_take_is_a_failure_with_the_thread_named(start: Start, top: Path) -> None:
    start(101, vcpus=1)

    def refuse(tid: int, cpus: object) -> None:
        raise OSError(22, "Invalid argument")

    hands = Hands(Root(top), set=refuse)
    with pytest.raises(PinError, match=r"vCPU 0 \(thread \d+\) has .* and not .*Invalid argument"):
        _qemu_pin.pin(hands, wish(101), _qemu_records.zones(Root(top)))


def test_status_and_watch_find_correct_and_tell_drift(start: Start, top: Path) -> None:
    install_hook(top, [101, 102])
    for folder in ("var/lib/prometheus/node-exporter", "run/organism/events"):
        (top / folder).mkdir(parents=True)
    vm = start(101, vcpus=1)
    assert tool(top, "pin", "watch", "--once").returncode == 0
    assert json.loads(next((top / "run/organism/events").iterdir()).read_text())["event"] == "pin.late"
    assert tool(top, "pin", "status").returncode == 0
    vcpu = next(each.thread.tid for each in pin(top, 101).pins if each.thread.role == "vcpu")
    os.sched_setaffinity(vcpu, set(CPUS[:2]))

    status = tool(top, "pin", "status", "--json")
    assert status.returncode == 1
    assert json.loads(status.stdout)["vms"][0]["drifted"] == [f"vCPU 0 (thread {vcpu})"]
    watched = tool(top, "pin", "watch", "--once")
    assert watched.returncode == 0
    assert "VM 101: 1 threads had drifted and were put back" in watched.stderr
    assert os.sched_getaffinity(vcpu) == {CPUS[1]}
    events = [json.loads(path.read_text()) for path in sorted((top / "run/organism/events").iterdir())]
    assert (events[-1]["event"], events[-1]["vm"], len(events[-1]["threads"])) == ("pin.drift", "101", 1)
    metrics = (top / "var/lib/prometheus/node-exporter/organism_pin.prom").read_text()
    assert 'organism_pin_drift_threads{vm="101"} 1' in metrics
    assert 'organism_pin_vcpus{vm="101"} 1' in metrics
    assert tool(top, "pin", "watch", "--once").stderr == ""
    vm.stop()
    assert tool(top, "pin", "status").returncode == 0, "a VM that does not run is no fault"


def test_any_qemu_by_its_files(start: Start, top: Path) -> None:
    vm = start(103, vcpus=1)
    before = vm.masks()
    words = ("--pidfile", "/run/qemu-server/103.pid", "--qmp", "/run/qemu-server/103.qmp")
    done = tool(top, "pin", "pin", "builder", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vcpus"] == {"0": CPUS[1]}
    assert tool(top, "pin", "unpin", "builder").returncode == 0
    assert vm.masks() == before


def test_the_override_of_extreme_conf_is_honoured(start: Start, top: Path) -> None:
    start(101, vcpus=1)
    (top / "etc/organism/extreme.conf").write_text(f"# mine\nVCPU_CPUS={CPUS[0]}\nIO_CPUS='{CPUS[1]}'\n")
    assert pin(top, 101).vcpus == {0: CPUS[0]}
    (top / "etc/organism/extreme.conf").write_text("VCPU_CPUS=0\nOTHER=1\n")
    assert "extreme.conf:2" in tool(top, "pin", "pin", "101").stderr


def test_watch_ends_at_once_when_told(top: Path) -> None:
    process = subprocess.Popen(machines.command(top, "pin", "watch", "--interval", "1000"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + machines.HANG_GUARD
    while time.monotonic() < deadline:  # its handlers are there when it waits for their pipe
        if Path(f"/proc/{process.pid}/wchan").exists() and "S" in machines.stat_fields(process.pid, process.pid)[0]:
            caught = next(
                line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line
            )
            if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(machines.HANG_GUARD) == 0
