# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options that only root@pam itself may set: refused to everybody else before anything is sent, or sent by pvesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from pvesim.harness import Sim

from organism.core import _pve_vm, _pve_vm_plan
from organism.core._pve_client import Pve, PveError, PveForbidden, PveRefused, PveUnreachable
from organism.core._pve_local import LocalPve
from organism.core._pve_vm import Outcome, Request
from service.pve.support import https, local

_ids = itertools.count(300)
_tokens = itertools.count(1)

ROOT_ONLY: dict[str, Any] = {
    "affinity": "1,7",
    "amd-sev": {"type": "std"},
    "arch": "x86_64",
    "args": "-no-hpet",
    "hookscript": "local:snippets/organism-hook",
    "hugepages": "2",
    "intel-tdx": {"type": "tdx"},
    "ivshmem": {"size": "32"},
    "keephugepages": True,
    "parallel0": "/dev/parport0",
    "spice_enhancements": {"foldersharing": True},
    "vmgenid": "6f5b6e4b-0b8a-4f0e-9c3b-0d5a4f0e9c3b",
    "hostpci0": {"host": "0000:01:00"},
    "hostpci1": {"mapping": "gpu-01", "romfile": "card.rom"},
    "usb0": {"host": "1234:5678"},
    "serial1": "/dev/ttyS0",
}
WHO = ("token", "token of root@pam", "ticket")


def somebody(sim: Sim, kind: str) -> Pve:
    """Not root@pam, but with every privilege."""
    name = f"t{next(_tokens)}"
    if kind == "token of root@pam":
        secret = sim.control("token", user="root@pam", token_id=name, privsep=False)
        return https(sim, api_user="root@pam", api_token_id=name, api_token_secret=secret)
    sim.control("user", name="admin@pve", password="pw")
    secret = sim.control("token", user="admin@pve", token_id=name, acl={"/": "Administrator"})
    if kind == "ticket":
        return https(sim, api_user="admin@pve", api_password="pw")
    return https(sim, api_user="admin@pve", api_token_id=name, api_token_secret=secret)


def converge(pve: Pve, vmid: int, wishes: dict[str, Any], *, check: bool = False, root: Pve | None = None) -> Outcome:
    wanted = Request(vmid=vmid, wishes=_pve_vm_plan.read_wishes(wishes), task_timeout=60, root=root)
    return _pve_vm.converge(pve, wanted, check=check)


def config(sim: Sim, vmid: int) -> dict[str, str]:
    found = local(sim).get(f"/nodes/pve1/qemu/{vmid}/config")
    return {key: str(value) for key, value in found.items() if key != "digest"}


def written(sim: Sim) -> list[str]:
    """Requests over HTTPS that change something, logins left out."""
    log = sim.top / "var/log/syslog"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if "pveproxy" in line and '"GET ' not in line and "/access/ticket" not in line]


class Root:
    """pvesh, with what a test wants to see or do at each write."""

    backend, is_root = "local", True

    def __init__(self, sim: Sim, at_write: Callable[[str, dict[str, Any]], None]) -> None:
        self.pvesh, self.at_write = local(sim), at_write
        self.wait = self.pvesh.wait
        self.get, self.post, self.delete = self.pvesh.get, self.pvesh.post, self.pvesh.delete

    def put(self, path: str, **params: Any) -> Any:
        self.at_write(path, params)
        return self.pvesh.put(path, **params)


@pytest.fixture
def vmid() -> int:
    return next(_ids)


@pytest.mark.parametrize("who", WHO)
def test_each_is_refused_to_who_is_not_root_before_anything_is_sent(sim: Sim, vmid: int, who: str) -> None:
    converge(local(sim), vmid, {"cores": 1, "machine": "q35", "balloon": 0})
    pve = somebody(sim, who)
    before, sent = config(sim, vmid), written(sim)
    for option, value in ROOT_ONLY.items():
        with pytest.raises(PveForbidden) as caught:
            converge(pve, vmid, {option: value, "cores": 2})
        assert caught.value.root_only == (option,)
        ways = (
            "use backend local on the node as root",
            "ticket of root@pam",
            "root_only: local",
            "Nothing was changed",
        )
        assert all(part in str(caught.value) for part in (option, *ways)), str(caught.value)
        assert ("use a PCI mapping" in str(caught.value)) == option.startswith("hostpci")
        with pytest.raises(PveForbidden, match=option):
            converge(pve, 9999, {option: value})
    assert written(sim) == sent
    assert config(sim, vmid) == before
    converge(pve, vmid, {"cores": 2})
    assert len(written(sim)) == len(sent) + 1, "what is written would have been seen"


@pytest.mark.parametrize("who", WHO)
def test_the_node_refuses_them_too_when_they_are_sent_all_the_same(sim: Sim, vmid: int, who: str) -> None:
    converge(local(sim), vmid, {"cores": 1})
    pve = somebody(sim, who)
    texts = {"affinity": "1,7", "args": "-no-hpet", "hugepages": "2", "hostpci0": "0000:01:00"}
    for option, text in texts.items():
        with pytest.raises(PveForbidden, match="backend local on the node as root") as caught:
            pve.put(f"/nodes/pve1/qemu/{vmid}/config", **{option: text})
        assert option.rstrip("0") in " ".join(caught.value.root_only)


@pytest.mark.parametrize("who", WHO)
def test_they_go_by_pvesh_where_that_is_asked_for_and_no_others(sim: Sim, vmid: int, who: str) -> None:
    pve, calls = somebody(sim, who), list[tuple[str, list[str]]]()
    root = Root(sim, lambda path, params: calls.append((path, sorted(params))))
    wishes = {"machine": "q35", "balloon": 0, "cores": 2, "affinity": "1,7", "hostpci0": {"host": "0000:01:00"}}
    assert converge(pve, vmid, wishes, root=root, check=True).created
    assert calls == []
    assert converge(pve, vmid, wishes, root=root).created
    made = config(sim, vmid)
    assert (made["affinity"], made["hostpci0"], made["cores"]) == ("1,7", "0000:01:00", "2")
    path = f"/nodes/pve1/qemu/{vmid}/config"
    assert calls == [(path, ["affinity", "digest", "hostpci0"])]
    assert not converge(pve, vmid, wishes, root=root).difference.changed

    wishes |= {"cores": 3, "affinity": "2,8", "hostpci0": None}
    predicted = converge(pve, vmid, wishes, root=root, check=True)
    assert len(calls) == 1
    done = converge(pve, vmid, wishes, root=root)
    assert done.difference.as_diff() == predicted.difference.as_diff()
    assert calls[1:] == [(path, ["affinity", "delete", "digest"])]
    after = config(sim, vmid)
    assert (after["cores"], after["affinity"], after.get("hostpci0")) == ("3", "2,8", None)
    assert not converge(pve, vmid, wishes, root=root).difference.changed


def test_no_edit_that_comes_in_between_is_lost(sim: Sim, vmid: int) -> None:
    pve, others = somebody(sim, "token"), iter(["first", "second"])
    converge(local(sim), vmid, {"cores": 1})

    def be_faster(path: str, _params: dict[str, Any]) -> None:
        for word in others:
            local(sim).put(path, description=word)
            return

    done = converge(pve, vmid, {"cores": 2, "affinity": "1"}, root=Root(sim, be_faster))
    after = config(sim, vmid)
    assert (after["cores"], after["affinity"], after["description"].strip()) == ("2", "1", "second")
    assert {"cores", "affinity"} == {*done.live, *done.waiting}


def test_pvesh_of_another_cluster_or_none_changes_nothing_anywhere(sim: Sim, vmid: int) -> None:
    pve = somebody(sim, "token")
    converge(local(sim), vmid, {"cores": 1})
    before, sent = config(sim, vmid), written(sim)
    with Sim() as other:
        with pytest.raises(PveRefused, match="knows no such VM.*Nothing was changed"):
            converge(pve, vmid, {"cores": 2, "affinity": "1"}, root=local(other))
        converge(local(other), vmid, {"cores": 4})
        theirs = config(other, vmid)
        with pytest.raises(PveRefused, match="another configuration of that VM.*Nothing was changed"):
            converge(pve, vmid, {"cores": 2, "affinity": "1"}, root=local(other))
        assert config(other, vmid) == theirs
    with Sim(node="elsewhere") as other, pytest.raises(PveRefused, match="knows no node pve1"):
        converge(pve, 9999, {"affinity": "1"}, root=local(other))
    with pytest.raises(PveUnreachable, match="is not installed here"):
        converge(pve, vmid, {"cores": 2, "affinity": "1"}, root=LocalPve(program="/nonexistent/pvesh"))
    assert config(sim, vmid) == before
    assert written(sim) == sent


def test_a_new_vm_that_root_cannot_finish_is_removed(sim: Sim, vmid: int) -> None:
    def refuse(path: str, _params: dict[str, Any]) -> None:
        raise PveRefused(f"{path}: no")

    with pytest.raises(PveError, match="half made, is removed again"):
        converge(somebody(sim, "token"), vmid, {"cores": 1, "affinity": "1"}, root=Root(sim, refuse))
    assert all(int(each["vmid"]) != vmid for each in local(sim).get("/cluster/resources", type="vm"))
