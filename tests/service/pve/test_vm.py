# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs, PCI mappings and power against a simulated node, by token, by ticket and by pvesh."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from pvesim.harness import Sim

from organism.core import _pve_find, _pve_mapping, _pve_power, _pve_storage, _pve_strings, _pve_vm, _pve_vm_plan
from organism.core._pve_client import Pve, PveError, PveForbidden, PveRefused
from organism.core._pve_mapping import Device, MappingRefused, Wish
from organism.core._pve_vm import Clone, Gpus, Outcome, Request
from organism.core._pve_vm_plan import WishRefused
from service.pve.support import https, local

_ids = itertools.count(300)

POOL: dict[str, Any] = {
    "machine": "q35",
    "bios": "ovmf",
    "ostype": "l26",
    "cpu": "host",
    "cores": 4,
    "memory": 2048,
    "balloon": 0,
    "agent": True,
    "serial0": "socket",
    "vga": "serial0",
    "scsihw": "virtio-scsi-single",
    "scsi0": {"cache": "none", "discard": True, "iothread": True, "aio": "io_uring", "size": "16G"},
    "net0": {"model": "virtio", "bridge": "vmbr0", "queues": 4},
    "onboot": True,
}
NEW: dict[str, Any] = {
    "efidisk0": {"file": "fast:1", "efitype": "4m", "pre-enrolled-keys": 0},
    "scsi0": {"file": "fast:8"},
    "ide2": "fast:cloudinit",
    "boot": ["scsi0"],
    "ciuser": "debian",
    "sshkeys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOrganism+Test/Key0 operator@example"],
    "ipconfig0": {"ip": "192.168.10.20/24", "gw": "192.168.10.1"},
}


def request(vmid: int, wishes: dict[str, Any], create: dict[str, Any] | None = None, **more: Any) -> Request:
    return Request(
        vmid=vmid,
        wishes=_pve_vm_plan.read_wishes(wishes),
        create=_pve_vm_plan.read_wishes(create or {}),
        task_timeout=60,
        **more,
    )


def converge(pve: Pve, wanted: Request, *, check: bool = False) -> Outcome:
    return _pve_vm.converge(pve, wanted, check=check)


def config(pve: Pve, vmid: int) -> dict[str, str]:
    found = pve.get(f"/nodes/pve1/qemu/{vmid}/config")
    return {key: str(value) for key, value in found.items() if key != "digest"}


def card(number: int) -> Wish:
    return Wish(f"gpu-{number:02}", (Device(f"0000:{number:02x}:00", "pve1"),))


def power(pve: Pve, vmid: int, state: str, **more: Any) -> _pve_power.Outcome:
    vm = _pve_find.existing_vm(pve, vmid, None, None)
    limits = _pve_power.Limits(shutdown=20, stop=20, start=30)
    return _pve_power.converge(pve, vm, state, limits, check=False, **more)


@pytest.fixture
def vmid() -> int:
    return next(_ids)


@pytest.fixture(scope="module")
def cards(sim: Sim) -> tuple[str, ...]:
    """Mappings of twelve cards; made once, found again by every test."""
    pve = local(sim)
    wishes = [card(number) for number in range(1, 13)]
    assert _pve_mapping.converge(pve, wishes, check_mode=False).problems == []
    return tuple(wish.name for wish in wishes)


def test_a_pool_vm_is_predicted_made_left_alone_and_started(pve: Pve, vmid: int, cards: tuple[str, ...]) -> None:
    wanted = request(vmid, POOL, NEW, name=f"pool{vmid}", gpus=Gpus(cards, {"pcie": "1"}, "gpu-"))
    predicted = converge(pve, wanted, check=True)
    assert predicted.created
    assert all(int(each["vmid"]) != vmid for each in pve.get("/cluster/resources", type="vm"))
    made = converge(pve, wanted)
    assert (made.created, made.difference.as_diff()) == (True, predicted.difference.as_diff())
    first = config(pve, vmid)
    assert [first[f"hostpci{n}"] for n in (0, 11)] == ["mapping=gpu-01,pcie=1", "mapping=gpu-12,pcie=1"]
    assert "size=16G" in first["scsi0"]
    for check in (True, False):
        again = converge(pve, wanted, check=check)
        assert again.difference.message == "nothing to change"
    assert config(pve, vmid) == first
    assert power(pve, vmid, "started").steps == ["start"]
    assert power(pve, vmid, "stopped").difference.changed
    pve.wait(pve.delete(f"/nodes/pve1/qemu/{vmid}", purge=True), 30)


def test_an_adopted_vm_keeps_mac_volumes_and_what_is_not_named(pve: Pve, vmid: int, cards: tuple[str, ...]) -> None:
    pve.wait(
        pve.post(
            "/nodes/pve1/qemu",
            vmid=vmid,
            name=f"old{vmid}",
            memory=1024,
            cores=2,
            balloon=0,
            machine="q35",
            scsihw="virtio-scsi-single",
            net0="virtio=BC:24:11:AA:BB:CC,bridge=vmbr0,firewall=1,rate=12",
            scsi0="fast:4,iothread=1,backup=0,ssd=1",
        ),
        60,
    )
    before = config(pve, vmid)
    wanted = request(
        vmid,
        {"net0": {"queues": 2}, "scsi0": {"discard": True, "size": "6G"}, "cores": 4, "balloon": 0},
        NEW,
        gpus=Gpus(cards[:2], {"pcie": "1"}, "gpu-"),
    )
    done = converge(pve, wanted)
    assert not done.created
    after = config(pve, vmid)
    net, disk = (_pve_strings.parse_option(option, after[option]) for option in ("net0", "scsi0"))
    was = _pve_strings.parse_option("scsi0", before["scsi0"])
    assert (net.get("macaddr"), net.get("rate"), net.get("queues")) == ("BC:24:11:AA:BB:CC", "12", "2")
    assert (disk.get("file"), disk.get("size"), disk.get("backup")) == (was.get("file"), "6G", "0")
    touched = {option for option in {*before, *after} if before.get(option) != after.get(option)}
    assert touched == {"net0", "scsi0", "cores", "hostpci0", "hostpci1"}
    assert not converge(pve, wanted).difference.changed
    smaller = request(vmid, {"scsi0": {"size": "2G"}})
    with pytest.raises(WishRefused, match="would shrink it"):
        converge(pve, smaller)
    assert config(pve, vmid) == after
    pve.wait(pve.delete(f"/nodes/pve1/qemu/{vmid}", purge=True), 30)


def test_what_waits_is_told_by_proxmox_and_comes_with_a_cold_start(pve: Pve, vmid: int) -> None:
    converge(pve, request(vmid, {"memory": 512, "net0": {"model": "virtio", "bridge": "vmbr0"}}))
    power(pve, vmid, "started")
    wanted = request(vmid, {"memory": 1024, "description": "new words", "cores": 2})
    predicted = converge(pve, wanted, check=True)
    done = converge(pve, wanted)
    assert (done.live, done.waiting) == (["description"], ["cores", "memory"])
    assert (predicted.live, predicted.waiting) == (done.live, done.waiting)
    assert not converge(pve, wanted).difference.changed
    assert power(pve, vmid, "restarted", only_pending=True).steps == ["shutdown", "start"]
    assert converge(pve, wanted).cold_start == []
    assert not power(pve, vmid, "restarted", only_pending=True).difference.changed
    power(pve, vmid, "stopped")


def test_edits_of_several_at_once_are_all_kept(pve: Pve, vmid: int) -> None:
    """Each adds a sub-option of its own to one string; a lost update would drop another's."""
    converge(pve, request(vmid, {"net0": {"model": "virtio", "bridge": "vmbr0"}}))
    mac = _pve_strings.parse_option("net0", config(pve, vmid)["net0"]).get("macaddr")
    failures: list[PveError] = []

    def edit(sub: str, value: int) -> None:
        try:
            converge(pve, request(vmid, {"net0": {sub: value}}))
        except PveError as error:
            failures.append(error)

    threads = [threading.Thread(target=edit, args=each) for each in (("mtu", 1400), ("tag", 7), ("rate", 9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    net = _pve_strings.parse_option("net0", config(pve, vmid)["net0"])
    assert [net.get(sub) for sub in ("mtu", "tag", "rate", "macaddr")] == ["1400", "7", "9", mac]


def test_root_only_keys_by_each_way(pve: Pve, vmid: int) -> None:
    converge(pve, request(vmid, {"cores": 1}))
    wanted = request(vmid, {"affinity": "1,7", "cores": 2})
    if pve.is_root:
        assert converge(pve, wanted).difference.changed
        assert config(pve, vmid)["affinity"] == "1,7"
        assert not converge(pve, request(vmid, {"affinity": "7,1"})).difference.changed
        return
    with pytest.raises(PveForbidden, match="affinity"):
        converge(pve, wanted)
    assert config(pve, vmid).get("cores", "1") == "1"


def test_a_token_with_use_of_a_mapping_attaches_it(sim: Sim, vmid: int, cards: tuple[str, ...]) -> None:
    """What root makes once, a token without root works with: Mapping.Use and the VM's own privileges."""
    roles = {"/vms": "PVEVMAdmin", "/mapping/pci": "PVEMappingUser"}
    sim.control("user", name="delegate@pve", password="x")
    secret = sim.control("token", user="delegate@pve", token_id="t", acl=roles)
    root, token = local(sim), https(sim, api_user="delegate@pve", api_token_id="t", api_token_secret=secret)
    converge(root, request(vmid, {"machine": "q35", "balloon": 0}))
    wanted = request(vmid, {}, gpus=Gpus(cards[:1], {"pcie": "1"}))
    assert converge(token, wanted).difference.changed
    assert config(root, vmid)["hostpci0"] == "mapping=gpu-01,pcie=1"


def test_a_mapping_that_no_longer_matches_is_refused_and_then_corrected(sim: Sim, pve: Pve, vmid: int) -> None:
    name = f"moved-{vmid}"
    wish = Wish(name, (Device("0000:0c:00", "pve1"),))
    _pve_mapping.converge(pve, [wish], check_mode=False)
    devices = sim.control("devices")
    try:
        changed = [{**each, "group": 77} if each["address"].startswith("0000:0c") else each for each in devices]
        sim.control("set-devices", devices=changed)
        wanted = request(vmid, {"machine": "q35", "balloon": 0, "hostpci0": {"mapping": name, "pcie": 1}})
        with pytest.raises(WishRefused, match=f"PCI mapping {name}: .*iommugroup"):
            converge(pve, wanted)
        assert _pve_mapping.converge(pve, [wish], check_mode=False).difference.changed
        assert converge(pve, wanted).created
        assert power(pve, vmid, "started").steps == ["start"]
        power(pve, vmid, "stopped")
        with pytest.raises(MappingRefused, match=f"mapping {name} is hostpci0 of VM {vmid}"):
            _pve_mapping.remove(pve, [name], force=False, check_mode=False)
    finally:
        sim.control("set-devices", devices=devices)


def test_two_running_vms_never_get_one_card(pve: Pve, vmid: int, cards: tuple[str, ...]) -> None:
    other = next(_ids)
    for each in (vmid, other):
        converge(
            pve,
            request(each, {"machine": "q35", "balloon": 0}, name=f"vm{each}", gpus=Gpus((cards[2],), {"pcie": "1"})),
        )
    power(pve, vmid, "started")
    try:
        with pytest.raises(PveRefused, match=rf"0000:03:00 is held by VM {vmid} \(vm{vmid}\).*qm shutdown {vmid}"):
            power(pve, other, "started")
    finally:
        power(pve, vmid, "stopped")
    assert power(pve, other, "started").steps == ["start"]
    power(pve, other, "stopped")


def test_a_guest_that_does_not_hear_is_stopped(sim: Sim, pve: Pve, vmid: int) -> None:
    converge(pve, request(vmid, {"cores": 1}))
    sim.control("behave", vmid=vmid, ignores_power_button=True)
    power(pve, vmid, "started")
    vm = _pve_find.existing_vm(pve, vmid, None, None)
    done = _pve_power.converge(pve, vm, "stopped", _pve_power.Limits(shutdown=1, stop=20), check=False)
    assert done.steps == ["shutdown", "stop"]
    assert not _pve_find.existing_vm(pve, vmid, None, None).running


def test_a_clone_of_a_template_gets_its_own_mac(pve: Pve, vmid: int) -> None:
    base = next(_ids)
    converge(
        pve,
        request(base, {"net0": {"model": "virtio", "bridge": "vmbr0"}}, {"scsi0": "fast:2"}, name=f"base{base}"),
    )
    wanted = request(vmid, {"cores": 2, "scsi0": {"size": "3G"}}, name=f"copy{vmid}", clone=Clone(vmid=base))
    assert converge(pve, wanted).created
    one, two = (_pve_strings.parse_option("net0", config(pve, each)["net0"]).get("macaddr") for each in (base, vmid))
    assert one != two
    assert "size=3G" in config(pve, vmid)["scsi0"]
    assert not converge(pve, wanted).difference.changed


def test_content_of_a_storage_is_added(pve: Pve) -> None:
    _pve_storage.allow(pve, "local", ["snippets"], check=False)
    done = _pve_storage.allow(pve, "local", ["snippets", "import"], check=False)
    assert done.path.endswith("/var/lib/vz")
    assert not _pve_storage.allow(pve, "local", ["import", "snippets"], check=False).difference.changed


def test_a_pool_becomes_a_storage_and_goes_again(pve: Pve, vmid: int) -> None:
    pool, kinds = f"fast/organism/{vmid}", ["images", "rootdir"]
    name = f"vmdata{vmid}"
    foretold = _pve_storage.offer(pve, name, pool, kinds, sparse=True, check=True)
    assert name not in [each["storage"] for each in pve.get("/storage")]
    done = _pve_storage.offer(pve, name, pool, kinds, sparse=True, check=False)
    assert done.difference == foretold.difference and done.difference.changed
    shown = pve.get(f"/storage/{name}")
    assert (shown["type"], shown["pool"], int(shown["sparse"])) == ("zfspool", pool, 1)
    assert set(shown["content"].split(",")) == set(kinds)
    assert not _pve_storage.offer(pve, name, pool, kinds, sparse=True, check=False).difference.changed
    thick = _pve_storage.offer(pve, name, pool, kinds, sparse=False, check=False)
    assert thick.difference.changed and not int(pve.get(f"/storage/{name}").get("sparse") or 0)

    converge(pve, request(vmid, {}, {"scsi0": f"{name}:1"}, name=f"tenant{vmid}"))
    with pytest.raises(PveRefused, match=f"it holds {name}:vm-{vmid}-disk-0; move or remove"):
        _pve_storage.withdraw(pve, "pve1", name, pool, check=False)
    pve.wait(pve.delete(f"/nodes/pve1/qemu/{vmid}"), 60)
    assert _pve_storage.withdraw(pve, "pve1", name, pool, check=True).difference.changed
    assert _pve_storage.withdraw(pve, "pve1", name, pool, check=False).difference.changed
    assert name not in [each["storage"] for each in pve.get("/storage")]
    assert not _pve_storage.withdraw(pve, "pve1", name, pool, check=False).difference.changed


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"hugepages": "1024"}, "hugepages need numa: 1"),
        ({"cores": 13}, "13 vCPUs, and node pve1 has 12 CPUs"),
        ({"machine": "q35", "balloon": 0, "hostpci0": {"mapping": "nobody"}}, "there is no PCI mapping nobody"),
        ({"machine": "q35", "balloon": 0, "hostpci0": {"host": "0000:77:00"}}, "has no PCI device 0000:77:00"),
        ({"balloon": 0, "hostpci0": {"mapping": "gpu-01", "pcie": 1}}, "pcie=1 needs machine: q35"),
        ({"net0": {"model": "virtio", "bridge": "vmbr7"}}, "node pve1 has no bridge vmbr7"),
    ],
)
def test_start_time_mistakes_make_no_vm(
    sim: Sim, vmid: int, cards: tuple[str, ...], wishes: dict[str, Any], told: str
) -> None:
    pve = local(sim)
    with pytest.raises(WishRefused, match=told):
        converge(pve, request(vmid, wishes))
    assert all(int(each["vmid"]) != vmid for each in pve.get("/cluster/resources", type="vm"))
