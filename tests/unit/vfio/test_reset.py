# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reset probe against a VM of the test's own, whose cards break in ways that real ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from organism.core import _pve_find, _vfio_reset
from organism.core._pve_client import PveNotFound, PveRefused, PveTaskFailed, TaskResult
from organism.core._pve_power import Clock
from organism.core._vfio_reset import Node, Report, Wish

from .host import Host, write

CARDS = ("0000:04:00.0", "0000:05:00.0")
ALIVE = b"\x02\x10\xdf\x67" + bytes(60)


class Vm:
    """Proxmox VE with one VM of two cards, and the node's side of them. ``after_stop``: stop number to what happens."""

    backend = "local"
    is_root = True

    def __init__(self, host: Host) -> None:
        self.host = host
        self.running = False
        self.starts = self.stops = 0
        self.waited = 0.0
        self.log: list[str] = ["vfio-pci 0000:04:00.0: not ready 1023ms after bus reset; waiting"]  # of long before
        self.after_stop: dict[int, Callable[[], None]] = {}
        self.start_fails: dict[int, str] = {}
        self.inside = ["01:00.0 0300: 1002:67df (rev e7)", "02:00.0 0300: 1002:67df (rev e7)"]
        self.config: dict[str, Any] = {
            "machine": "q35",
            "hostpci0": "mapping=gpu0,pcie=1",
            "hostpci1": "0000:05:00,pcie=1",
        }
        self.map = ["node=pve1,path=0000:04:00,id=1002:67df"]
        for card in CARDS:
            host.root.path(f"/sys/bus/pci/devices/{card}/config").write_bytes(ALIVE)
            write(host.root, f"/sys/bus/pci/devices/{card}/current_link_width", "16")
        host.root.path("/etc/pve").mkdir(parents=True)
        host.root.path("/etc/pve/local").symlink_to("nodes/pve1")

    def get(self, path: str, **_params: Any) -> Any:
        answers: dict[str, Any] = {
            "/cluster/resources": [
                {"type": "qemu", "vmid": 200, "node": "pve1", "name": "gpu-pool", "status": self.word}
            ],
            "/nodes": [{"node": "pve1", "status": "online", "maxcpu": 12}],
            "/cluster/mapping/pci": [{"id": "gpu0", "map": self.map, "checks": []}],
            "/nodes/pve1/hardware/pci": [{"id": card} for card in CARDS],
            "/nodes/pve1/qemu/200/config": self.config,
            "/nodes/pve1/qemu/200/pending": [],
            "/nodes/pve1/qemu/200/status/current": {"status": self.word},
            "/nodes/pve1/qemu/200/agent/exec-status": {"exited": 1, "exitcode": 0, "out-data": "\n".join(self.inside)},
        }
        if path not in answers:
            raise PveNotFound(path)
        return answers[path]

    @property
    def word(self) -> str:
        return "running" if self.running else "stopped"

    def post(self, path: str, **_params: Any) -> Any:
        verb = path.rsplit("/", 1)[1]
        if verb == "exec":
            return {"pid": 7}
        if verb == "start":
            self.starts += 1
            if self.starts in self.start_fails:
                raise PveTaskFailed(self.start_fails[self.starts])
            self.running = True
            self.host.have({"address": "04:00"}, {"address": "05:00"}, bind="now")
        elif verb in ("shutdown", "stop"):
            self.running = False
            self.stops += 1
            self.after_stop.get(self.stops, lambda: None)()
        return None

    def put(self, path: str, **_params: Any) -> Any:
        raise AssertionError(path)

    delete = put

    def wait(self, upid: str, timeout: float) -> TaskResult:
        raise AssertionError((upid, timeout))

    # --- the test's side ----------------------------------------------------------------------------------------------

    def breaks(self, card: str, config: bytes = b"\xff" * 64) -> None:
        self.host.root.path(f"/sys/bus/pci/devices/{card}/config").write_bytes(config)

    def sleep(self, seconds: float) -> None:
        self.waited += seconds

    def probe(self, **wish: Any) -> Report:
        made = Wish(**wish)
        node = Node(self.host.root, lambda _argv: "\n".join(self.log))
        report = _vfio_reset.prepare(self, _pve_find.existing_vm(self, 200, None, None), node, made)
        return _vfio_reset.probe(self, report, node, made, Clock(lambda: self.waited, self.sleep))


@pytest.fixture
def vm(host: Callable[[str], Host]) -> Vm:
    return Vm(host("pool_host"))


def test_ten_cycles_of_two_good_cards(vm: Vm) -> None:
    report = vm.probe(agent=True, run=5)
    assert report.good and report.done == 10 and (vm.starts, vm.stops, vm.running) == (10, 10, False)
    assert [(card.address, card.passed, card.reset) for card in report.cards] == [
        (CARDS[0], 10, ("bus",)),
        (CARDS[1], 10, ("bus",)),
    ]
    assert vm.waited == 50
    assert report.lines()[0] == "ok    0000:04:00.0  10 of 10  reset bus"


def test_a_card_that_does_not_come_back_is_named_with_its_cycle(vm: Vm) -> None:
    vm.after_stop[4] = lambda: vm.breaks(CARDS[1])
    report = vm.probe(run=0)
    assert not report.good and report.done == 4
    assert [card.passed for card in report.cards] == [4, 3]
    assert report.cards[1].failed == {4: ["does not answer after the stop (its configuration space is all ones)"]}
    assert any(line.startswith("FAIL  0000:05:00.0  3 of 10") for line in report.lines())


def test_what_the_kernel_says_counts_from_the_start_of_the_cycle(vm: Vm) -> None:
    line = "vfio-pci 0000:05:00.0: not ready 65535ms after bus reset; giving up"
    vm.after_stop[2] = lambda: vm.log.append(line)
    report = vm.probe(run=0, cycles=3, go_on=True)
    assert report.done == 3
    assert report.cards[0].good and report.cards[1].failed == {2: [line]}
    assert report.cards[1].passed == 2


def test_a_link_that_lost_lanes(vm: Vm) -> None:
    width = f"/sys/bus/pci/devices/{CARDS[0]}/current_link_width"
    vm.after_stop[1] = lambda: write(vm.host.root, width, "8")
    report = vm.probe(run=0)
    assert report.cards[0].failed == {1: ["its link has 8 lanes after the stop, 16 before"]}


def test_a_start_that_fails_is_laid_to_the_card_that_it_names(vm: Vm) -> None:
    vm.start_fails[3] = "task qmstart failed: error writing '1' to '/sys/bus/pci/devices/0000:05:00.0/reset'"
    report = vm.probe(run=0)
    assert report.cards[0].good and "did not start" in report.cards[1].failed[3][0] and not report.troubles
    vm.start_fails = {4: "task qmstart failed: out of memory"}
    vm.starts = 3
    report = vm.probe(run=0)
    assert report.troubles == {1: "task qmstart failed: out of memory"} and not report.good
    assert [card.passed for card in report.cards] == [0, 0] and "FAIL  cycle 1: task qmstart" in report.lines()[-1]


def test_a_guest_that_misses_a_card(vm: Vm) -> None:
    vm.inside = vm.inside[:1]
    report = vm.probe(run=0, agent=True)
    assert report.cards[0].failed == {1: ["the guest sees 1 of 2 cards 1002:67df"]}


def test_a_running_vm_is_left_alone_or_put_back(vm: Vm) -> None:
    vm.running = True
    with pytest.raises(PveRefused, match="runs, and the probe would stop it 10 times"):
        vm.probe()
    assert vm.running and vm.stops == 0
    report = vm.probe(interrupt=True, run=0, cycles=2)
    assert report.good and vm.running and (vm.starts, vm.stops) == (3, 3)


def test_what_cannot_be_judged_is_refused(vm: Vm) -> None:
    vm.map = [*vm.map, "node=pve1,path=0000:06:00,id=1002:67df"]
    with pytest.raises(PveRefused, match="hostpci0 is mapping gpu0, which names 2 devices"):
        vm.probe()
    vm.config = {"memory": 1024}
    with pytest.raises(PveRefused, match="has no card on pve1"):
        vm.probe()
    vm.config = {"machine": "q35", "hostpci0": "0000:04:00"}
    vm.breaks(CARDS[0])
    with pytest.raises(PveRefused, match="does not answer even now"):
        vm.probe()
    with pytest.raises(PveRefused, match="cycles must be 1 or more"):
        vm.probe(cycles=0)
    local = vm.host.root.path("/etc/pve/local")
    local.unlink()
    local.symlink_to("nodes/pve2")
    with pytest.raises(PveRefused, match="run this on that node"):
        vm.probe()
    assert vm.starts == 0
