# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Started, stopped, started cold: with deadlines, and refused where it cannot work."""

from __future__ import annotations

from typing import Any

import pytest
from unit.pve_vm.fake import ROUTES, FakePve, Guest

from organism.core import _pve_find, _pve_guest, _pve_power
from organism.core._pve_client import PveError, PveRefused, PveTaskFailed, PveTimeout
from organism.core._pve_power import Clock, Limits, Outcome


@pytest.fixture
def pve() -> FakePve:
    fake = FakePve()
    fake.guests[200] = Guest({"name": "pool", "cores": 2})
    return fake


def clock_of(pve: FakePve) -> Clock:
    def sleep(seconds: float) -> None:
        pve.clock += seconds

    return Clock(lambda: pve.clock, sleep)


def power(pve: FakePve, state: str, *, check: bool = False, **more: Any) -> Outcome:
    vm = _pve_find.existing_vm(pve, 200, None, None)
    limits = more.pop("limits", Limits())
    return _pve_power.converge(pve, vm, state, limits, check=check, clock=clock_of(pve), **more)


def test_a_start_and_a_stop_happen_once(pve: FakePve) -> None:
    for state, running, steps in (("started", True, ["start"]), ("stopped", False, ["shutdown"])):
        assert power(pve, state, check=True).steps == steps
        assert pve.guests[200].running is not running
        assert power(pve, state).steps == steps
        assert pve.guests[200].running is running
        assert not power(pve, state).difference.changed


def test_a_guest_that_ignores_the_shutdown_is_stopped_if_that_is_allowed(pve: FakePve) -> None:
    pve.guests[200].running = True
    pve.ignores_shutdown.add(200)
    with pytest.raises(PveTimeout, match=r"VM 200 \(pool\) did not shut down within 60 s .*allow force to stop it"):
        power(pve, "stopped", limits=Limits(force=False))
    assert pve.guests[200].running
    assert power(pve, "stopped").steps == ["shutdown", "stop"]
    assert not pve.guests[200].running


def test_a_request_that_ha_only_queues_is_watched_until_the_deadline(
    pve: FakePve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task says OK and the VM goes on for 20 s, or for ever."""
    pve.guests[200].running = True
    stops_at = 20.0

    def status(fake: FakePve, params: dict[str, Any], vmid: str) -> Any:
        fake.guests[200].running = fake.clock < stops_at
        return {"status": "running" if fake.guests[200].running else "stopped"}

    monkeypatch.setitem(ROUTES["GET"], r"/nodes/pve1/qemu/(\d+)/status/current", status)
    assert power(pve, "stopped").steps == ["shutdown"]
    assert pve.clock == 20
    pve.guests[200].running, pve.clock, stops_at = True, 0.0, 10_000.0
    with pytest.raises(PveTimeout, match="still runs after a stop: look for its lock and task"):
        power(pve, "stopped")


def test_a_cold_start_brings_waiting_options_into_force_and_only_then(pve: FakePve) -> None:
    guest = pve.guests[200]
    guest.running, guest.pending = True, {"cores": 4}
    assert power(pve, "restarted", only_pending=True, check=True).steps == ["shutdown", "start"]
    done = power(pve, "restarted", only_pending=True)
    assert (done.difference.changed, done.cold_start) == (True, [])
    assert (guest.config["cores"], guest.running) == (4, True)
    assert not power(pve, "restarted", only_pending=True).difference.changed
    assert power(pve, "restarted").difference.changed


def test_a_failed_start_is_reported_with_the_task(pve: FakePve) -> None:
    pve.fails["task qmstart"] = "QEMU exited with code 1"
    with pytest.raises(PveTaskFailed, match="QEMU exited with code 1"):
        power(pve, "started")


def test_a_start_that_another_came_before_is_as_good(pve: FakePve, monkeypatch: pytest.MonkeyPatch) -> None:
    pve.fails["task qmstart"] = "VM 200 already running"

    def status(fake: FakePve, params: dict[str, Any], vmid: str) -> Any:
        return {"status": "running" if fake.writes else "stopped"}

    monkeypatch.setitem(ROUTES["GET"], r"/nodes/pve1/qemu/(\d+)/status/current", status)
    assert power(pve, "started").steps == ["start"]


def test_a_start_that_cannot_work_is_refused_first(pve: FakePve) -> None:
    pve.guests[200].config["hostpci0"] = "mapping=gone"
    with pytest.raises(PveRefused, match="there is no PCI mapping gone"):
        power(pve, "started")
    assert pve.writes == []


def test_a_template_is_refused(pve: FakePve) -> None:
    pve.guests[200].config["template"] = 1
    with pytest.raises(PveRefused, match="is a template"):
        power(pve, "started")


class TestConflicts:
    @pytest.fixture(autouse=True)
    def cards(self, pve: FakePve) -> None:
        for number in (1, 2):
            pve.maps[f"gpu-0{number}"] = {"map": [f"node=pve1,path=0000:0{number}:00,id=1002:67df"]}
        pve.maps["any"] = {"map": [*pve.maps["gpu-01"]["map"], *pve.maps["gpu-02"]["map"]]}
        pve.pci = [{"id": "0000:01:00.0"}]
        pve.guests[200].config["hostpci0"] = "mapping=gpu-01,pcie=0"
        pve.guests[201] = Guest({"name": "other", "hostpci3": "0000:01:00.0"}, running=True)

    def test_a_card_that_a_running_vm_has_is_named_with_its_owner(self, pve: FakePve) -> None:
        told = r"hostpci0: 0000:01:00 is held by VM 201 \(other\).*qm shutdown 201"
        with pytest.raises(PveRefused, match=told):
            power(pve, "started", check=True)
        pve.guests[201].running = False
        assert power(pve, "started").steps == ["start"]

    def test_a_free_alternative_is_enough(self, pve: FakePve) -> None:
        pve.guests[200].config["hostpci0"] = "mapping=any"
        assert power(pve, "started").steps == ["start"]

    def test_a_hook_may_stop_the_other_one_first(self, pve: FakePve) -> None:
        pve.guests[200].config["hookscript"] = "local:snippets/organism-hook"
        assert power(pve, "started").steps == ["start"]


class Agent:
    """An agent that answers the fourth ping, and a cloud-init that ends at the third look."""

    def __init__(self, exitcode: int = 0, said: str = "status: done") -> None:
        self.pings, self.looks, self.exitcode, self.said = 0, 0, exitcode, said

    def ping(self, fake: FakePve, params: dict[str, Any], vmid: str) -> Any:
        self.pings += 1
        if self.pings < 4:
            raise PveError("QEMU guest agent is not running")
        return {}

    def status(self, fake: FakePve, params: dict[str, Any], vmid: str) -> Any:
        self.looks += 1
        return {"exited": 0} if self.looks < 3 else {"exited": 1, "exitcode": self.exitcode, "out-data": self.said}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = r"/nodes/pve1/qemu/(\d+)/agent/"
        monkeypatch.setitem(ROUTES["POST"], f"{path}ping", self.ping)
        monkeypatch.setitem(ROUTES["POST"], f"{path}exec", lambda fake, params, vmid: {"pid": 7})
        monkeypatch.setitem(ROUTES["GET"], f"{path}exec-status", self.status)


def test_the_guest_is_waited_for(pve: FakePve, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, clock = _pve_find.existing_vm(pve, 200, None, None), clock_of(pve)
    Agent().install(monkeypatch)
    _pve_guest.wait_agent(pve, vm, 60, clock)
    assert pve.clock == 3
    assert _pve_guest.wait_cloud_init(pve, vm, 60, clock) == "status: done"
    Agent(1, "status: error\ndetail: no mirror").install(monkeypatch)
    with pytest.raises(PveTimeout, match="its guest agent does not answer .*qm terminal 200"):
        _pve_guest.wait_agent(pve, vm, pve.clock, clock)
    with pytest.raises(_pve_guest.GuestFailed, match="cloud-init failed inside .*no mirror"):
        _pve_guest.wait_cloud_init(pve, vm, 60, clock)
    Agent(2, "status: degraded").install(monkeypatch)
    assert _pve_guest.wait_cloud_init(pve, vm, 60, clock) == "status: degraded"
