# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad inputs against a simulated node: each is refused with words for an operator, and nothing of the node changes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pvesim.harness import Sim

from organism.core import _pve_find, _pve_mapping, _pve_power, _pve_storage, _pve_vm, _pve_vm_plan
from organism.core._pve_client import (
    Pve,
    PveAuthFailed,
    PveError,
    PveForbidden,
    PveNotFound,
    PveRefused,
    PveTimeout,
    PveUnreachable,
)
from organism.core._pve_mapping import Device, MappingRefused, Wish
from organism.core._pve_vm import Request
from organism.core._pve_vm_plan import WishRefused
from service.pve.support import PASSWORD, by_ticket, https, local

_ids = itertools.count(500)
Q35 = {"machine": "q35", "balloon": 0, "memory": 512}


def request(vmid: int, wishes: dict[str, Any]) -> Request:
    return Request(vmid=vmid, wishes=_pve_vm_plan.read_wishes(wishes), task_timeout=60)


def power(pve: Pve, vmid: int, state: str, start: float = 30) -> _pve_power.Outcome:
    vm = _pve_find.existing_vm(pve, vmid, None, None)
    return _pve_power.converge(pve, vm, state, _pve_power.Limits(shutdown=10, stop=10, start=start), check=False)


def state(sim: Sim) -> dict[str, Any]:
    """All that a request could have changed."""
    files = {
        str(path.relative_to(sim.top)): path.read_bytes()
        for folder in ("etc/pve", "var/lib/vz")
        for path in sorted((sim.top / folder).rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    return {**files, "running": sim.control("machines"), "devices": sim.control("reservations")}


@contextmanager
def unchanged(sim: Sim) -> Iterator[None]:
    before = state(sim)
    yield
    assert state(sim) == before


@pytest.fixture
def vm(sim: Sim) -> int:
    """A VM that is there."""
    vmid = next(_ids)
    _pve_vm.converge(local(sim), request(vmid, {**Q35, "cores": 1}), check=False)
    return vmid


def test_an_unknown_pci_address(sim: Sim, pve: Pve, vm: int) -> None:
    with unchanged(sim):
        with pytest.raises(MappingRefused, match="there is no PCI device 0000:77:00; displays are 0000:01:00.0"):
            _pve_mapping.converge(pve, [Wish("ghost", (Device("0000:77:00", "pve1"),))], check_mode=False)
        with pytest.raises(WishRefused, match="there is no PCI mapping ghost"):
            _pve_vm.converge(pve, request(vm, {"hostpci0": {"mapping": "ghost"}, "cores": 2}), check=False)
        raw = request(vm, {"hostpci0": {"host": "0000:77:00"}, "cores": 2})
        with pytest.raises((WishRefused, PveForbidden), match="has no PCI device 0000:77:00|root@pam"):
            _pve_vm.converge(pve, raw, check=False)


def test_a_mapping_that_does_not_match_the_hardware(sim: Sim, pve: Pve, vm: int) -> None:
    name = f"swapped-{vm}"
    _pve_mapping.converge(pve, [Wish(name, (Device("0000:0b:00", "pve1"),))], check_mode=False)
    attached = next(_ids)
    _pve_vm.converge(pve, request(attached, {**Q35, "hostpci0": {"mapping": name}}), check=False)
    devices = sim.control("devices")
    other = [{**each, "device": "73bf"} if each["address"] == "0000:0b:00.0" else each for each in devices]
    sim.control("set-devices", devices=other)
    try:
        with unchanged(sim):
            with pytest.raises(WishRefused, match=f"PCI mapping {name}"):
                _pve_vm.converge(pve, request(vm, {"hostpci0": {"mapping": name}, "cores": 2}), check=False)
            with pytest.raises(PveError, match=name):
                power(pve, attached, "started")
    finally:
        sim.control("set-devices", devices=devices)


def test_more_memory_than_the_host_has(sim: Sim, pve: Pve, vm: int) -> None:
    name = f"large-{vm}"
    _pve_mapping.converge(pve, [Wish(name, (Device("0000:0a:00", "pve1"),))], check_mode=False)
    with unchanged(sim):
        wishes = {"memory": 65536, "hostpci0": {"mapping": name}}
        for vmid in (vm, 9999):
            with pytest.raises(WishRefused, match="memory 65536 MiB is taken whole.*node pve1 has 32768 MiB"):
                _pve_vm.converge(pve, request(vmid, {**Q35, **wishes}), check=False)


def test_a_storage_for_snippets_that_is_not_there(sim: Sim, pve: Pve) -> None:
    with unchanged(sim):
        with pytest.raises(PveError, match="nowhere") as caught:
            _pve_storage.allow(pve, "nowhere", ["snippets"], check=False)
        assert isinstance(caught.value, PveNotFound)
        with pytest.raises(PveRefused, match=r"storage fast .* has no folder for snippets"):
            _pve_storage.allow(pve, "fast", ["snippets"], check=False)


@pytest.mark.parametrize("act", ["make", "change", "map", "power"])
def test_a_wrong_token_and_a_wrong_password(sim: Sim, vm: int, act: str) -> None:
    wrong = [
        https(sim, api_user="root@pam", api_token_id="nobody", api_token_secret="hunter2"),
        https(sim, api_user="root@pam", api_password="hunter2"),
    ]
    acts: dict[str, Callable[[Pve], object]] = {
        "make": lambda pve: _pve_vm.converge(pve, request(9999, Q35), check=False),
        "change": lambda pve: _pve_vm.converge(pve, request(vm, {"cores": 2}), check=False),
        "map": lambda pve: _pve_mapping.converge(
            pve, [Wish("card", (Device("0000:01:00", "pve1"),))], check_mode=False
        ),
        "power": lambda pve: power(pve, vm, "started"),
    }
    with unchanged(sim):
        for pve in wrong:
            with pytest.raises(PveAuthFailed, match="check user, realm") as caught:
                acts[act](pve)
            assert "hunter2" not in str(caught.value)


def test_a_ticket_that_expired_while_the_password_was_changed(sim: Sim, vm: int) -> None:
    sim.control("user", name="night@pve", password="before")
    sim.control("token", user="night@pve", token_id=f"t{vm}", acl={"/": "Administrator"})
    pve = https(sim, api_user="night@pve", api_password="before")
    assert pve.get("/version")
    sim.control("user", name="night@pve", password="after")
    sim.control("age-tickets", seconds=7300)
    with unchanged(sim), pytest.raises(PveAuthFailed, match="does not accept the password of night@pve") as caught:
        _pve_vm.converge(pve, request(vm, {"cores": 2}), check=False)
    assert "before" not in str(caught.value)
    fresh = https(sim, api_user="night@pve", api_password="after")
    assert _pve_vm.converge(fresh, request(vm, {"cores": 2}), check=False).difference.changed


def test_an_api_that_is_down_before_anything_is_sent(sim: Sim, vm: int) -> None:
    pve = by_ticket(sim)
    assert pve.get("/version")
    sim.control("api-down")
    try:
        with unchanged(sim), pytest.raises(PveUnreachable, match="cannot be reached"):
            _pve_vm.converge(pve, request(vm, {"cores": 2}), check=False)
    finally:
        sim.control("api-up")


def test_an_api_that_goes_down_in_the_middle_of_a_task(sim: Sim, vm: int) -> None:
    """The task goes on without us; what is told is that its end is unknown, and repeating changes nothing twice."""
    release = sim.top / f"release-{vm}"
    hook = sim.hook(
        f"#!/bin/sh\n[ $2 != pre-start ] || while [ ! -e {release} ]; do sleep 0.1; done\n", f"slow-{vm}.sh"
    )
    sim.qm("set", vm, "--hookscript", hook)
    pve, before = by_ticket(sim), state(sim)
    down = threading.Timer(1.0, lambda: sim.control("api-down"))
    down.start()
    try:
        with pytest.raises((PveTimeout, PveUnreachable), match="unknown|cannot be reached"):
            power(pve, vm, "started", start=3)
        down.join()
        assert state(sim) == before, "nothing but the task itself, which still waits"
    finally:
        down.join()
        release.touch()
        sim.control("api-up")
    again = by_ticket(sim)
    assert power(again, vm, "started").steps in ([], ["start"])
    assert not power(again, vm, "started").difference.changed
    assert power(again, vm, "stopped").difference.changed


def test_the_password_of_the_tests_is_right(sim: Sim) -> None:
    """The refusals above are not those of a node that lets nobody in."""
    assert https(sim, api_user="root@pam", api_password=PASSWORD).get("/version")
