# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The catalog: read whole, refused with lines, and turned into hosts and groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.organism.proxmox.plugins.module_utils import _catalog, _catalog_vm, _pve_vm_plan
from ansible_collections.organism.proxmox.plugins.plugin_utils import lined_yaml

REPO = Path(__file__).resolve().parents[3]

EXAMPLE = """\
plugin: organism.proxmox.catalog
defaults: {node: pve1, storage: fast, network: lan}
networks:
  lan: {cidr: 192.168.0.0/24, gateway: 192.168.0.1, ip_from_vmid: true}
gpus:
  upper: {pci_address: "01:00", vendor_id: "0x1002", device_id: 67DF, model: RX 580}
vms:
  vm-llm:
    vmid: 140
    cpu_cores: 32
    memory_gb: 32
    disk_gb: 500
    gpus: [upper]
    groups: [gpu_pool]
    vars: {ansible_user: debian}
    auto_start: false
clusters:
  cloud:
    name: cloud-cluster
    control_plane: {ip: 192.168.0.10, cpu_cores: 4, memory_gb: 8, disk_gb: 100}
    worker_nodes:
      cpu:
        - {worker_type: cpu, vmid: 11}
      gpu:
        - worker_type: gpu
          auto_start: false
          pcie_passthrough:
            enabled: true
            devices:
              - {pci_address: "0000:01:00.0", device_type: gpu, vendor_id: "1002", device_id: "67df"}
  hpc:
    name: hpc-cluster
    controller: {memory_mib: 2048}
    compute_nodes:
      - {gpus: [upper]}
"""


def read(text: str) -> _catalog.Catalog:
    return _catalog.read(lined_yaml.load(text, "lab.catalog.yml"), "lab.catalog.yml")


@pytest.fixture(autouse=True)
def small_vmid() -> str:
    """The example's worker has a VMID below Proxmox VE's lowest, which a test of its own is about."""
    return EXAMPLE.replace("vmid: 11", "vmid: 111")


def test_the_example_becomes_vms_with_names_sizes_and_addresses(small_vmid: str) -> None:
    catalog = read(small_vmid)
    vms = {vm.name: vm for vm in catalog.vms}
    assert list(vms) == [
        *("vm-llm", "cloud-cluster-control-plane", "cloud-cluster-worker-01", "cloud-cluster-gpu-worker-01"),
        *("hpc-cluster-controller", "hpc-cluster-compute-01"),
    ]
    llm = vms["vm-llm"]
    assert (llm.ip, llm.gateway, llm.memory_mib, llm.cores) == ("192.168.0.140/24", "192.168.0.1", 32768, 32)
    assert (llm.gpus[0].address, llm.gpus[0].vendor, llm.gpus[0].device) == ("0000:01:00", "1002", "67df")
    assert vms["cloud-cluster-control-plane"].ip == "192.168.0.10/24"
    assert vms["hpc-cluster-controller"].memory_mib == 2048
    assert vms["cloud-cluster-gpu-worker-01"].gpus[0].id == "upper", "the same card by its address"


def test_a_shared_card_is_told_and_only_two_that_start_are_a_conflict(small_vmid: str) -> None:
    catalog = read(small_vmid)
    users = ["vm-llm", "cloud-cluster-gpu-worker-01", "hpc-cluster-compute-01"]
    assert catalog.sharing() == {("pve1", "0000:01:00"): users}
    (remark,) = catalog.remarks
    assert "one of them runs at a time" in remark.text and "start by themselves" not in remark.text
    (remark,) = read(small_vmid.replace("    auto_start: false\nclusters", "    auto_start: true\nclusters")).remarks
    assert "vm-llm and hpc-cluster-compute-01 start by themselves: set auto_start: false for all but one" in remark.text


@pytest.mark.parametrize(
    ("before", "after", "line", "told"),
    [
        ("cpu_cores: 32", "cpu_core: 32", 10, "vms.vm-llm.cpu_core: there is no such key; did you mean cpu_cores?"),
        ("memory_gb: 32", "memory_gb: lots", 11, "vms.vm-llm.memory_gb: it takes a whole number, not 'lots'"),
        ("gpus: [upper]\n    groups", "gpus: [lower]\n    groups", 13, "there is no GPU lower; there are upper"),
        ('"01:00"', '"1:0"', 6, "gpus.upper.pci_address: '1:0' does not fit; write it like 0000:01:00"),
        ("vmid: 140", "vmid: 14", 9, "vms.vm-llm.vmid: 14 is not between 100 and 999999999"),
        ("vmid: 140", "vmid: 111", 23, "vmid 111 is that of vm-llm, too (line 8)"),
        ("192.168.0.10,", "192.168.1.10,", 20, "192.168.1.10 is not in 192.168.0.0/24"),
        ("192.168.0.10,", "192.168.0.140,", 20, "ip 192.168.0.140 is that of vm-llm, too (line 8)"),
        ("192.168.0.0/24", "192.168.0.0/33", 4, "networks.lan.cidr: '192.168.0.0/33'"),
        ("network: lan}", "network: wan}", 8, "there is no network wan"),
        ("auto_start: false\nclusters", "auto_start: 'no'\nclusters", 16, "it takes true or false, not 'no'"),
        ("node: pve1, ", "", 8, "vms.vm-llm.node: it is needed, here or in defaults"),
        ("    controller: {memory_mib: 2048}\n", "", 31, "clusters.hpc: a cluster has a controller with compute_nodes"),
        ("gpus: [upper]\n    groups", "gpus: [upper, upper]\n    groups", 13, "0000:01:00 is there twice (line 13)"),
        ("cpu_cores: 32\n", "cpu_cores: 32\n    cpu_cores: 4\n", 11, "cpu_cores comes twice (first in line 10)"),
        ("vms:\n  vm-llm:", "vms:\n  vm_llm:", 8, "'vm_llm' does not fit; write it like vm-llm"),
        ("plugin:", "catalog: 7\nplugin:", 1, "catalog: this version reads format 1"),
        ("defaults: {", "defaults: [", 2, "this is no YAML"),
    ],
)
def test_a_problem_is_told_with_its_line(small_vmid: str, before: str, after: str, line: int, told: str) -> None:
    assert before in small_vmid
    with pytest.raises(_catalog.CatalogError) as caught:
        read(small_vmid.replace(before, after, 1))
    found = [problem for problem in caught.value.problems if told in str(problem)]
    assert found, str(caught.value)
    assert found[0].line == line


def test_all_problems_come_at_once_in_the_order_of_lines(small_vmid: str) -> None:
    broken = small_vmid.replace("cpu_cores: 32", "cpu_core: 32").replace("memory_mib: 2048", "memory_mib: x")
    with pytest.raises(_catalog.CatalogError) as caught:
        read(broken)
    assert [problem.line for problem in caught.value.problems] == [10, 33]


def test_a_card_of_another_node_and_a_seventeenth_are_refused() -> None:
    gpus = "".join(f'  g{n}: {{pci_address: "0000:{n:02x}:00"}}\n' for n in range(17))
    names = ", ".join(f"g{n}" for n in range(17))
    text = f"defaults: {{node: a}}\ngpus:\n{gpus}vms:\n  v: {{gpus: [{names}]}}\n  w: {{node: b, gpus: [g1]}}\n"
    with pytest.raises(_catalog.CatalogError) as caught:
        read(text)
    assert "a VM has at most 16 GPUs" in str(caught.value)
    assert "g1 is in node a, and the VM on b" in str(caught.value)


def test_every_vm_is_one_that_pve_vm_takes(small_vmid: str) -> None:
    for vm in read(small_vmid).vms:
        wanted = _catalog_vm.arguments(vm)
        _pve_vm_plan.read_wishes(wanted["config"])
        _pve_vm_plan.read_wishes(wanted["create"])
        assert (wanted["config"].get("balloon") == 0) == bool(vm.gpus)


def test_the_published_example_has_a_shared_card_and_no_conflict() -> None:
    file = REPO / "docs/examples/multi-gpu-clusters.catalog.yml"
    catalog = _catalog.read(lined_yaml.load(file.read_text(), file.name), file.name)
    users = ["hpc-cluster-compute-01", "cloud-cluster-gpu-worker-01"]
    assert catalog.sharing() == {("pve1", "0000:01:00"): users}
    assert "start by themselves" not in catalog.remarks[0].text


def inventory(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "lab.catalog.yml"
    file.write_text(text)
    cache = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").absolute()
    return subprocess.run(
        [sys.executable, "-m", "ansible", "inventory", "-i", str(file), "--list"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(cache / "collections"),
            "ANSIBLE_HOME": str(tmp_path / "home"),
            "ANSIBLE_INVENTORY_ENABLED": "organism.proxmox.catalog",
            "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1",
            "ANSIBLE_NOCOLOR": "1",
        },
    )


def test_ansible_sees_hosts_and_groups(tmp_path: Path, small_vmid: str) -> None:
    done = inventory(tmp_path, small_vmid)
    assert done.returncode == 0, done.stderr
    listing: dict[str, Any] = json.loads(done.stdout)
    assert listing["pve"]["hosts"] == ["pve1"]
    assert listing["gpu_pool"]["hosts"] == ["vm-llm"]
    assert listing["cluster_cloud_cluster"]["hosts"] == [
        *("cloud-cluster-control-plane", "cloud-cluster-worker-01", "cloud-cluster-gpu-worker-01"),
    ]
    assert len(listing["role_kubernetes_worker"]["hosts"]) == 2
    assert "cloud-cluster-gpu-worker-01" not in listing["auto_start"]["hosts"]
    known = listing["_meta"]["hostvars"]
    assert known["vm-llm"]["ansible_host"] == "192.168.0.140"
    assert known["vm-llm"]["ansible_user"] == "debian"
    assert known["vm-llm"]["catalog_gpus"][0]["shared_with"] == [
        "cloud-cluster-gpu-worker-01",
        "hpc-cluster-compute-01",
    ]
    (mapping,) = known["pve1"]["catalog_mappings"]
    assert mapping == {
        "name": "gpu-upper",
        "description": "RX 580",
        "devices": [{"node": "pve1", "path": "0000:01:00", "id": "1002:67df"}],
    }
    assert len(known["pve1"]["catalog_vms"]) == 6


def test_ansible_tells_the_file_and_the_line(tmp_path: Path, small_vmid: str) -> None:
    done = inventory(tmp_path, small_vmid.replace("vmid: 140", "vmid: none"))
    assert done.returncode != 0
    assert "lab.catalog.yml:9: vms.vm-llm.vmid: it takes a whole number, not 'none'" in " ".join(done.stderr.split())
