# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM created, adopted, changed twice, predicted; races, refusals and half-made VMs."""

from __future__ import annotations

from typing import Any

import pytest
from unit.pve_vm.fake import FakePve, Guest

from organism.core import _pve_vm, _pve_vm_plan
from organism.core._pve_client import PveError, PveForbidden, PveNotFound, PveRefused, PveStaleDigest
from organism.core._pve_vm import Clone, Gpus, Outcome, Request
from organism.core._pve_vm_plan import WishRefused

POOL: dict[str, Any] = {
    "machine": "q35",
    "bios": "ovmf",
    "cores": 4,
    "memory": 16384,
    "balloon": 0,
    "scsihw": "virtio-scsi-single",
    "net0": {"model": "virtio", "bridge": "vmbr0", "queues": 4},
    "scsi0": {"iothread": 1, "aio": "io_uring", "size": "64G"},
}
NEW: dict[str, Any] = {
    "efidisk0": {"file": "tank:1", "efitype": "4m"},
    "scsi0": {"file": "tank:0", "import-from": "local:import/debian.qcow2"},
}
FOREIGN = "virtio=BC:24:11:AA:BB:CC,bridge=vmbr0,queues=4,rate=10"


def request(wishes: dict[str, Any] | None = None, **more: Any) -> Request:
    create = _pve_vm_plan.read_wishes(more.pop("create", {}))
    return Request(vmid=more.pop("vmid", 200), wishes=_pve_vm_plan.read_wishes(wishes or {}), create=create, **more)


def converge(pve: FakePve, wanted: Request, *, check: bool = False) -> Outcome:
    return _pve_vm.converge(pve, wanted, check=check)


@pytest.fixture
def pve() -> FakePve:
    return FakePve()


@pytest.fixture
def adopted(pve: FakePve) -> FakePve:
    pve.guests[200] = Guest(
        {
            "name": "old",
            "cores": 4,
            "memory": "8192",
            "balloon": 0,
            "machine": "pc-q35-9.0",
            "net0": FOREIGN,
            "scsihw": "virtio-scsi-single",
            "scsi0": "tank:vm-200-disk-7,size=64G,iothread=1,aio=io_uring,backup=0",
            "hostpci0": "0000:05:00.0",
            "usb0": "host=1-2",
        }
    )
    pve.pci = [{"id": "0000:05:00.0"}]
    return pve


def test_a_vm_is_made_whole_and_then_left_alone(pve: FakePve) -> None:
    wanted = request(POOL, name="gpu-pool", create=NEW)
    predicted = converge(pve, wanted, check=True)
    assert predicted.created
    assert pve.writes == []
    first = converge(pve, wanted)
    assert first.created
    assert first.difference.as_diff() == predicted.difference.as_diff()
    config = pve.guests[200].config
    assert config["scsi0"] == "tank:vm-200-scsi0,iothread=1,aio=io_uring,size=64G"
    assert config["efidisk0"] == "tank:vm-200-efidisk0,efitype=4m,size=1G"
    assert config["name"] == "gpu-pool"
    mac, sent = config["net0"], len(pve.writes)
    for check in (True, False):
        again = converge(pve, wanted, check=check)
        assert not again.difference.changed
        assert not again.created
    assert len(pve.writes) == sent
    assert pve.guests[200].config["net0"] == mac


def test_an_adopted_vm_keeps_what_is_not_named(adopted: FakePve) -> None:
    before = dict(adopted.guests[200].config)
    done = converge(adopted, request(POOL | {"bios": "seabios"}, create=NEW))
    after = adopted.guests[200].config
    assert {key for key in after if after[key] != before.get(key)} == {"memory"}
    assert done.live == ["memory"]
    assert not converge(adopted, request(POOL | {"bios": "seabios"}, create=NEW)).difference.changed


def test_a_vm_found_by_name_needs_no_id(adopted: FakePve) -> None:
    assert converge(adopted, request({"cores": 2}, vmid=None, name="old")).vm.vmid == 200
    adopted.guests[201] = Guest({"name": "old"})
    with pytest.raises(PveRefused, match="several VMs are named old: 200 on pve1, 201 on pve1; say vmid"):
        converge(adopted, request({"cores": 2}, vmid=None, name="old"))


def test_a_new_vm_without_id_gets_the_next_one(pve: FakePve) -> None:
    assert converge(pve, request({"cores": 2}, vmid=None, name="new")).vm.vmid == 100


def test_what_waits_for_a_cold_start_is_told_and_predicted(adopted: FakePve) -> None:
    adopted.guests[200].running = True
    wanted = request({"memory": 4096, "onboot": 1, "cores": 2}, name="new")
    predicted = converge(adopted, wanted, check=True)
    done = converge(adopted, wanted)
    assert (done.live, done.waiting) == (["name", "onboot"], ["cores", "memory"])
    assert (predicted.live, predicted.waiting) == (done.live, done.waiting)
    again = converge(adopted, wanted)
    assert not again.difference.changed
    assert again.cold_start == ["cores", "memory"]


def test_a_concurrent_edit_is_planned_anew(adopted: FakePve) -> None:
    def other(pve: FakePve) -> None:
        pve.guests[200].config["net0"] = "virtio=BC:24:11:00:00:99,bridge=vmbr0,mtu=9000"

    adopted.before_write = other
    converge(adopted, request({"net0": {"queues": 2}}))
    assert adopted.guests[200].config["net0"] == "virtio=BC:24:11:00:00:99,bridge=vmbr0,mtu=9000,queues=2"


def test_edits_that_never_stop_are_reported(adopted: FakePve) -> None:
    count = 0

    def other(pve: FakePve) -> None:
        nonlocal count
        count += 1
        pve.guests[200].config["description"] = f"edit {count}"
        pve.before_write = other

    adopted.before_write = other
    with pytest.raises(PveStaleDigest, match=r"VM 200 \(old\): somebody else changed its configuration 4 times"):
        converge(adopted, request({"cores": 2}))
    assert adopted.guests[200].config["cores"] == 4


def test_a_digest_found_stale_by_the_task_counts_too(adopted: FakePve) -> None:
    adopted.fails["POST /nodes/pve1/qemu/200/config"] = "x"
    with pytest.raises(PveError):
        converge(adopted, request({"scsi1": "tank:8"}))
    adopted.fails["task qmconfig"] = "checksum mismatch (file change by other user?)"
    converge(adopted, request({"scsi1": "tank:8"}))
    assert adopted.guests[200].config["scsi1"].startswith("tank:vm-200-scsi1")


@pytest.mark.parametrize("wishes", [{"affinity": "1,7"}, {"hostpci0": {"host": "0000:06:00"}}, {"usb0": None}])
def test_a_token_is_refused_root_only_keys_before_anything_is_sent(adopted: FakePve, wishes: dict[str, Any]) -> None:
    adopted.backend, adopted.is_root = "https-token", False
    adopted.pci = [{"id": "0000:05:00.0"}, {"id": "0000:06:00.0"}]
    with pytest.raises(PveForbidden) as caught:
        converge(adopted, request({"cores": 2, **wishes}))
    option = next(iter(wishes))
    assert caught.value.root_only == (option,)
    for part in (option, "use backend local on the node as root", "ticket of root@pam", "Nothing was changed"):
        assert part in str(caught.value)
    assert adopted.writes == []


def test_a_root_only_key_that_does_not_change_is_no_obstacle(adopted: FakePve) -> None:
    adopted.guests[200].config["affinity"] = "1,7"
    adopted.backend, adopted.is_root = "https-token", False
    converge(adopted, request({"affinity": "7,1", "cores": 2, "hostpci0": {"host": "05:00.0"}}))
    assert adopted.guests[200].config["cores"] == 2


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"hugepages": "2"}, "hugepages need numa: 1"),
        ({"cores": 64}, "64 vCPUs, and node pve1 has 12 CPUs"),
        ({"numa0": "cpus=0-3,memory=4096"}, "numa0 has no effect without numa: 1"),
        ({"numa": 1, "numa0": "cpus=0-3,memory=4096"}, "the NUMA nodes have 4096 MiB together, and memory is 8192"),
        ({"numa": 1, "numa0": "cpus=0-3,memory=8192,hostnodes=0"}, "numa0: hostnodes needs policy"),
        ({"hostpci1": {"mapping": "nope"}}, "there is no PCI mapping nope; create it with pve_pci_mapping"),
        ({"hostpci1": {"host": "0000:44:00"}}, "node pve1 has no PCI device 0000:44:00"),
        ({"hostpci1": {"host": "05:00"}}, "hostpci1 and hostpci0 both assign 0000:05:00"),
        ({"machine": "pc", "hostpci0": {"pcie": 1}}, "hostpci0: pcie=1 needs machine: q35"),
        (
            {"memory": 65536},
            "memory 65536 MiB is taken whole at the start (hostpci, hugepages), and node pve1 has 32768",
        ),
        ({"balloon": 9000}, "balloon 9000 is more than memory 8192"),
        ({"net0": {"bridge": "vmbr9"}}, "net0: node pve1 has no bridge vmbr9"),
        ({"net0": {"queues": 8}}, "net0: 8 queues for 4 vCPUs"),
        ({"scsihw": "virtio-scsi-pci"}, "scsi0: iothread has no effect without scsihw: virtio-scsi-single"),
        ({"scsi0": {"aio": "native", "cache": "writeback"}}, "scsi0: aio=native does not go with cache=writeback"),
        ({"bios": "ovmf"}, "bios: ovmf without efidisk0"),
        ({"vga": "serial0"}, "vga: serial0 needs serial0: socket"),
    ],
)
def test_start_time_mistakes_are_refused_before_anything_is_sent(
    adopted: FakePve, wishes: dict[str, Any], told: str
) -> None:
    with pytest.raises(WishRefused) as caught:
        converge(adopted, request(wishes))
    assert told in str(caught.value)
    assert "Nothing was changed" in str(caught.value)
    assert adopted.writes == []


def test_a_mistake_that_was_there_before_is_a_warning(adopted: FakePve) -> None:
    adopted.guests[200].config["hugepages"] = "1024"
    done = converge(adopted, request({"onboot": 1}))
    assert done.warnings == ["VM 200 (old) will not start: hugepages need numa: 1"]
    assert adopted.guests[200].config["onboot"] == 1


def test_a_mapping_that_no_longer_fits_the_hardware_is_told_with_proxmox_s_own_words(adopted: FakePve) -> None:
    adopted.maps["gpu-01"] = {"map": ["node=pve1,path=0000:01:00,id=1002:67df"]}
    adopted.checks["gpu-01"] = [{"severity": "error", "message": "missing expected property 'iommugroup'\n"}]
    with pytest.raises(WishRefused, match="PCI mapping gpu-01: missing expected property 'iommugroup'"):
        converge(adopted, request({"hostpci1": {"mapping": "gpu-01"}}))


def test_gpus_are_attached_beside_what_is_there_and_again_the_same(adopted: FakePve) -> None:
    for number in (1, 2, 3):
        adopted.maps[f"gpu-0{number}"] = {"map": [f"node=pve1,path=0000:0{number}:00,id=1002:67df"]}
    gpus = Gpus(("gpu-01", "gpu-02"), {"pcie": "1"}, "gpu-")
    converge(adopted, request(gpus=gpus))
    config = adopted.guests[200].config
    assert (config["hostpci1"], config["hostpci2"]) == ("mapping=gpu-01,pcie=1", "mapping=gpu-02,pcie=1")
    assert config["hostpci0"] == "0000:05:00.0"
    assert not converge(adopted, request(gpus=gpus)).difference.changed
    converge(adopted, request(gpus=Gpus(("gpu-03", "gpu-02"), {"pcie": "1"}, "gpu-")))
    assert (config["hostpci1"], config["hostpci2"]) == ("mapping=gpu-03,pcie=1", "mapping=gpu-02,pcie=1")


def test_a_clone_gets_a_mac_of_its_own_and_the_wishes(pve: FakePve) -> None:
    pve.guests[9000] = Guest({"name": "debian", "net0": FOREIGN, "template": 1, "cores": 1, "scsi0": "tank:b,size=2G"})
    wanted = request({"cores": 4, "scsi0": {"size": "8G"}}, name="pool", clone=Clone(name="debian", storage="tank"))
    predicted = converge(pve, wanted, check=True)
    assert predicted.created and pve.writes == []
    done = converge(pve, wanted)
    assert done.created
    config = pve.guests[200].config
    assert (config["cores"], config["name"], config["scsi0"]) == (4, "pool", "tank:b,size=8G")
    assert "BC:24:11:AA:BB:CC" not in config["net0"]
    assert not converge(pve, wanted).difference.changed


def test_a_clone_that_cannot_be_finished_is_removed_again(pve: FakePve) -> None:
    pve.guests[9000] = Guest({"name": "debian", "scsi0": "tank:b,size=2G"})
    pve.fails["task resize"] = "out of space"
    with pytest.raises(PveError, match=r"out of space\. VM 200 \(pool\), which was half made, is removed again"):
        converge(pve, request({"scsi0": {"size": "8G"}}, name="pool", clone=Clone(vmid=9000)))
    assert set(pve.guests) == {9000}


def test_a_missing_template_is_named(pve: FakePve) -> None:
    with pytest.raises(PveNotFound, match="there is no VM named debian"):
        converge(pve, request({}, clone=Clone(name="debian")))


def test_a_container_s_id_and_another_node_are_refused(pve: FakePve) -> None:
    pve.guests[200] = Guest({"name": "ct"}, type="lxc")
    with pytest.raises(PveRefused, match="200 is a container on node pve1"):
        converge(pve, request({"cores": 1}))
    pve.guests[200] = Guest({"name": "vm"}, node="pve2")
    with pytest.raises(PveRefused, match="VM 200 is on node pve2, not on pve1"):
        converge(pve, request({"cores": 1}, node="pve1"))


def test_removal_asks_for_a_stopped_unprotected_vm_of_ours(adopted: FakePve) -> None:
    def remove(tag: str = "", *, check: bool = False) -> Outcome:
        return _pve_vm.remove(adopted, 200, None, None, guard_tag=tag, timeout=1, check=check)

    with pytest.raises(PveRefused, match="lacks the tag organism"):
        remove("organism")
    adopted.guests[200].running = True
    with pytest.raises(PveRefused, match="runs: stop it first"):
        remove()
    adopted.guests[200].running = False
    adopted.guests[200].config["protection"] = 1
    with pytest.raises(PveRefused, match="is protected"):
        remove()
    adopted.guests[200].config["protection"] = 0
    assert remove(check=True).difference.changed
    assert 200 in adopted.guests
    assert remove().difference.changed
    assert not remove().difference.changed


def test_what_holds_for_ours_is_not_forced_on_an_adopted_vm(adopted: FakePve) -> None:
    ours = _pve_vm_plan.read_wishes({"cores": 8, "net0": {"model": "virtio", "bridge": "vmbr0"}})
    wanted = request({"onboot": 1}, owned=ours, owned_tag="organism")
    converge(adopted, wanted)
    assert adopted.guests[200].config["cores"] == 4
    assert "tags" not in adopted.guests[200].config
    made = request({"onboot": 1, "tags": "gpu"}, vmid=300, owned=ours, owned_tag="organism")
    converge(adopted, made)
    assert adopted.guests[300].config["cores"] == 8
    assert adopted.guests[300].config["tags"] == "gpu;organism"
    adopted.guests[300].config["cores"] = 2
    assert converge(adopted, made).difference.message == 'change cores: "2" -> "8"'.replace('"', "")
    assert not converge(adopted, made).difference.changed


def test_a_stranger_with_our_id_is_refused(adopted: FakePve) -> None:
    wanted = request({"cores": 2}, owned_tag="organism", expect_name="gpu-pool")
    with pytest.raises(PveRefused, match=r"VM 200 \(old\) is there already, under another name than gpu-pool"):
        converge(adopted, wanted)
    assert adopted.writes == []
    adopted.guests[200].config["tags"] = "organism"
    assert converge(adopted, wanted).difference.changed
    adopted.guests[200].config |= {"tags": "", "name": "gpu-pool", "cores": 4}
    assert converge(adopted, wanted).difference.changed


def test_a_vm_that_need_not_be_there_is_not_made(pve: FakePve) -> None:
    assert not converge(pve, request({"cores": 2}, only_existing=True)).difference.changed
    assert pve.guests == {}


def test_a_password_is_sent_once_and_never_shown(pve: FakePve) -> None:
    done = converge(pve, request({"cores": 2}, secrets={"cipassword": "s3cret"}))
    assert pve.writes[0][2]["cipassword"] == "s3cret"
    assert "s3cret" not in str(done.difference)
    pve.guests[200].config["cipassword"] = "**********"
    assert not converge(pve, request({"cores": 2}, secrets={"cipassword": "s3cret"})).difference.changed
