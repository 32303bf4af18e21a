# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client by token, ticket and pvesh, against a simulated node: the same answers, the same refusals."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from pvesim.harness import Sim

from organism.core import _pve_strings
from organism.core._pve_client import (
    Pve,
    PveAuthFailed,
    PveError,
    PveExists,
    PveForbidden,
    PveLocked,
    PveNotFound,
    PveRefused,
    PveStaleDigest,
    PveTaskFailed,
    PveTimeout,
    PveUnreachable,
    connect,
)
from organism.core._pve_local import LocalPve
from service.pve.support import PASSWORD, by_ticket, by_token, https

QEMU = "/nodes/pve1/qemu"
_ids = itertools.count(100)


def new_vm(pve: Pve, **options: object) -> str:
    """A fresh VM's path."""
    vmid = next(_ids)
    pve.wait(pve.post(QEMU, vmid=vmid, name=f"vm{vmid}", **options), 30)
    return f"{QEMU}/{vmid}"


def test_a_vm_from_its_creation_to_its_end(pve: Pve) -> None:
    vm = new_vm(pve, memory=1024, cores=2, net0="virtio,bridge=vmbr0", scsi0="fast:4,iothread=1")
    config = pve.get(f"{vm}/config")
    assert config["cores"] in (2, "2")
    assert config["scsi0"].endswith("-disk-0,iothread=1,size=4G")
    mac = _pve_strings.parse_option("net0", config["net0"]).get("macaddr")
    assert mac is not None and mac.startswith("BC:24:11:")

    assert pve.wait(pve.post(f"{vm}/status/start"), 30).exitstatus == "OK"
    assert pve.get(f"{vm}/status/current")["status"] == "running"
    pve.wait(pve.post(f"{vm}/status/shutdown", timeout=20), 30)
    assert pve.get(f"{vm}/status/current")["status"] == "stopped"
    pve.wait(pve.delete(vm, purge=True), 30)
    with pytest.raises(PveNotFound, match="does not exist"):
        pve.get(f"{vm}/config")


def test_what_is_pending_is_told_from_what_is_live(pve: Pve) -> None:
    vm = new_vm(pve, memory=512)
    pve.wait(pve.post(f"{vm}/status/start"), 30)
    pve.put(f"{vm}/config", memory=1024, onboot=True, description="live at once")
    live, shown = pve.get(f"{vm}/config", current=True), pve.get(f"{vm}/config")
    assert (str(live["memory"]), str(shown["memory"])) == ("512", "1024")
    assert str(live["onboot"]) == "1"
    waiting = {item["key"]: item for item in pve.get(f"{vm}/pending")}
    assert str(waiting["memory"]["pending"]) == "1024"
    assert "pending" not in waiting["onboot"]
    pve.wait(pve.post(f"{vm}/status/stop"), 30)
    assert str(pve.get(f"{vm}/config", current=True)["memory"]) == "1024"


def test_a_digest_of_yesterday_is_refused(pve: Pve) -> None:
    vm = new_vm(pve)
    before = pve.get(f"{vm}/config")["digest"]
    pve.put(f"{vm}/config", digest=before, cores=2)
    with pytest.raises(PveStaleDigest, match="read it again") as caught:
        pve.put(f"{vm}/config", digest=before, cores=3)
    assert caught.value.status in (500, None)
    assert str(pve.get(f"{vm}/config")["cores"]) == "2"


@pytest.mark.usefixtures("checked_by_schema")
def test_wrong_parameters_are_named(pve: Pve) -> None:
    vm = new_vm(pve)
    with pytest.raises(PveRefused) as caught:
        pve.put(f"{vm}/config", cores=0, net0="virtio,queues=99", hostpci0="0000:01:00,all-functions=1", nonsense="1")
    assert set(caught.value.errors) >= {"cores", "net0", "hostpci0", "nonsense"}
    assert "minimum value of 1" in str(caught.value)


def test_a_failed_task_tells_the_end_of_its_log(pve: Pve, sim: Sim) -> None:
    hook = sim.hook("#!/bin/sh\n[ $2 = pre-start ] || exit 0\necho GPU 0000:01:00 is taken by VM 7\nexit 1\n", "no.sh")
    vm = new_vm(pve)
    sim.qm("set", vm.rpartition("/")[2], "--hookscript", hook)
    with pytest.raises(PveTaskFailed, match="GPU 0000:01:00 is taken by VM 7") as caught:
        pve.wait(pve.post(f"{vm}/status/start"), 30)
    assert "hookscript error" in caught.value.exitstatus and "exit code 1" in caught.value.exitstatus


def test_an_id_that_is_taken(pve: Pve) -> None:
    vm = new_vm(pve)
    with pytest.raises(PveExists, match="already exists on node 'pve1'"):
        pve.post(QEMU, vmid=vm.rpartition("/")[2])


def test_a_locked_vm(pve: Pve, sim: Sim) -> None:
    vm = new_vm(pve)
    sim.control("lock", vmid=int(vm.rpartition("/")[2]), lock="backup")
    with pytest.raises(PveLocked, match=r"VM is locked \(backup\)"):
        pve.put(f"{vm}/config", cores=2)


def test_mappings_carry_arrays(pve: Pve) -> None:
    name = f"gpu{next(_ids)}"
    maps = [
        f"node=pve1,path=0000:{bus}:00,id=1002:67df,subsystem-id=1da2:e353,iommugroup={group}"
        for bus, group in (("01", 10), ("02", 11))
    ]
    pve.post("/cluster/mapping/pci", id=name, map=maps)
    assert pve.get(f"/cluster/mapping/pci/{name}")["map"] == maps
    found = {each["id"]: each for each in pve.get("/cluster/mapping/pci", **{"check-node": "pve1"})}
    assert found[name]["checks"] == []
    pve.put(f"/cluster/mapping/pci/{name}", map=["node=pve1,path=0000:01:00,id=1002:67df"])
    found = {each["id"]: each for each in pve.get("/cluster/mapping/pci", **{"check-node": "pve1"})}
    assert "missing expected property 'iommugroup'" in found[name]["checks"][0]["message"]
    pve.delete(f"/cluster/mapping/pci/{name}")
    with pytest.raises(PveNotFound, match=name):
        pve.get(f"/cluster/mapping/pci/{name}")


def test_waiting_ends_at_its_deadline(pve: Pve, sim: Sim) -> None:
    vm = new_vm(pve)
    pve.wait(pve.post(f"{vm}/status/start"), 30)
    sim.control("behave", vmid=int(vm.rpartition("/")[2]), ignores_power_button=True)
    if pve.backend == "local":
        # pvesh stays with the task; its own deadline ends it
        impatient = LocalPve(timeout=30, task_timeout=1, program=str(sim.bin / "pvesh"))
        with pytest.raises(PveTimeout, match="may still run"):
            impatient.post(f"{vm}/status/shutdown", timeout=5)
    else:
        upid = pve.post(f"{vm}/status/shutdown", timeout=5)
        with pytest.raises(PveTimeout, match="still runs"):
            pve.wait(upid, 0.3)
        with pytest.raises(PveTaskFailed, match="got timeout"):
            pve.wait(upid, 30)
    sim.qm("stop", vm.rpartition("/")[2], "--overrule-shutdown", "1")


# ---- who may what ----------------------------------------------------------------------------------------------------

ROOT_ONLY = {
    "affinity": "0-3",
    "args": "-no-hpet",
    "hugepages": "1024",
    "hostpci0": "0000:01:00,pcie=1",
    "serial1": "/dev/ttyS0",
}


@pytest.mark.parametrize("key", ROOT_ONLY)
def test_no_token_sets_what_is_roots_alone(sim: Sim, key: str) -> None:
    root, token = by_ticket(sim), by_token(sim, name=f"admin-{key}")
    secret = sim.control("token", user="root@pam", token_id=f"all-{key}", privsep=False)
    roots_own = https(sim, api_user="root@pam", api_token_id=f"all-{key}", api_token_secret=secret)
    vm = new_vm(root)
    for each in (token, roots_own):
        assert not each.is_root
        with pytest.raises(PveForbidden, match="backend local") as caught:
            each.put(f"{vm}/config", **{key: ROOT_ONLY[key]})
        assert caught.value.root_only == (key,)
    assert root.is_root
    root.put(f"{vm}/config", **{key: ROOT_ONLY[key]})
    assert key in root.get(f"{vm}/config")


def test_local_is_root(sim: Sim) -> None:
    root = LocalPve(program=str(sim.bin / "pvesh"))
    vm = new_vm(root)
    root.put(f"{vm}/config", **ROOT_ONLY)
    assert set(ROOT_ONLY) <= set(root.get(f"{vm}/config"))


def test_a_mapping_is_for_those_who_may_use_it(sim: Sim) -> None:
    root = by_ticket(sim)
    root.post("/cluster/mapping/pci", id="shared", map=["node=pve1,path=0000:03:00,id=1002:67df"])
    vm = new_vm(root, machine="q35")
    outsider = by_token(sim, name="outsider", role="PVEVMAdmin", path="/vms")
    with pytest.raises(PveForbidden, match=r"grant Mapping.Use on /mapping/pci/shared") as caught:
        outsider.put(f"{vm}/config", hostpci0="mapping=shared,pcie=1")
    assert (caught.value.privilege, caught.value.object) == ("Mapping.Use", "/mapping/pci/shared")
    user = by_token(sim, name="insider", role="Administrator", path="/")
    user.put(f"{vm}/config", hostpci0="mapping=shared,pcie=1")


def test_a_token_has_no_more_than_it_was_granted(sim: Sim) -> None:
    auditor = by_token(sim, name="auditor", role="PVEAuditor")
    vm = new_vm(by_ticket(sim))
    assert auditor.get(f"{vm}/config")["digest"]
    with pytest.raises(PveForbidden, match="VM.PowerMgmt") as caught:
        auditor.post(f"{vm}/status/start")
    assert caught.value.status == 403 and caught.value.privilege == "VM.PowerMgmt"


def test_logins_that_fail_tell_no_secret(sim: Sim) -> None:
    with pytest.raises(PveAuthFailed, match="root@pam") as caught:
        https(sim, api_user="root@pam", api_password="hunter2").get("/version")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(PveAuthFailed, match="token") as caught:
        https(sim, api_user="root@pam", api_token_id="nobody", api_token_secret="hunter2").get("/version")
    assert "hunter2" not in str(caught.value) and caught.value.status == 401


def test_an_expired_ticket_is_renewed_by_logging_in_again(sim: Sim) -> None:
    pve = by_ticket(sim)
    vm = new_vm(pve)
    sim.control("age-tickets", seconds=7300)
    pve.put(f"{vm}/config", cores=2)
    assert str(pve.get(f"{vm}/config")["cores"]) == "2"


# ---- nodes that do not answer ----------------------------------------------------------------------------------------


def test_a_certificate_that_nobody_vouches_for(sim: Sim) -> None:
    stranger = connect(
        {"api_host": "127.0.0.1", "api_port": sim.port, "api_user": "root@pam", "api_password": PASSWORD}
    )
    with pytest.raises(PveUnreachable, match=r"api_ca the node's /etc/pve/pve-root-ca.pem"):
        stranger.get("/version")
    unchecked = https(sim, api_user="root@pam", api_password=PASSWORD, api_ca=None, validate_certs=False)
    assert unchecked.get("/version")["release"] == "9.2"


def test_the_api_goes_away_in_the_middle_of_a_task(sim: Sim) -> None:
    pve = by_token(sim, name="patient")
    vm = new_vm(pve)
    vmid = int(vm.rpartition("/")[2])
    pve.wait(pve.post(f"{vm}/status/start"), 30)
    sim.control("behave", vmid=vmid, delay=1.5)
    upid = pve.post(f"{vm}/status/shutdown", timeout=20)
    sim.control("api-down")
    back = threading.Timer(0.7, lambda: sim.control("api-up"))
    back.start()
    try:
        with pytest.raises(PveUnreachable, match="cannot be reached"):
            pve.get("/version")
        assert pve.wait(upid, 30).exitstatus == "OK"
    finally:
        back.join()


def test_an_api_that_does_not_come_back(sim: Sim) -> None:
    pve = by_token(sim, name="impatient")
    vm = new_vm(pve)
    upid = pve.post(f"{vm}/status/start")
    pve.wait(upid, 30)
    sim.control("api-down")
    try:
        started = time.monotonic()
        with pytest.raises(PveTimeout, match="is unknown"):
            pve.wait(upid, 0.5)
        assert time.monotonic() - started < 20
    finally:
        sim.control("api-up")


def test_no_pvesh_here() -> None:
    with pytest.raises(PveUnreachable, match="backend local works on a Proxmox VE node"):
        LocalPve(program="/nonexistent/pvesh").get("/version")


def test_what_is_not_known_is_not_guessed(pve: Pve) -> None:
    with pytest.raises(PveError, match=r"not implemented|no 'get' handler|pvesim does not know"):
        pve.get("/no/such/path")
    with pytest.raises(PveError, match="pvesim does not know"):
        pve.post(f"{new_vm(pve)}/status/suspend")
    with pytest.raises(PveError, match="migrated to rules"):
        pve.get("/cluster/ha/groups")
