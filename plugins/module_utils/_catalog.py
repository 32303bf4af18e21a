# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The catalog: one file that says which VMs, clusters and GPUs there are; read, checked as a whole, and pure.

A GPU may be in several VMs: it is shared, and only one of them runs at a time (the guard sees to it). The catalog tells
who shares what, and complains where two of them would start by themselves.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._catalog_read import Lined, Notes, Problem, Section, plain

FORMAT = 1
MAX_GPUS = 16
"""hostpci0 to hostpci15."""

_TOP = ("plugin", "catalog", "defaults", "networks", "gpus", "vms", "clusters")
_SIZES = ("cpu_cores", "memory_gb", "memory_mib", "disk_gb")
_PLACE = ("node", "network", "storage", "bridge", "image", "template")
_VM = (
    *_SIZES, *_PLACE, "vmid", "ip", "onboot", "agent", "cloud_init", "auto_start", "gpus", "pcie_passthrough",
    "groups", "vars", "worker_type",
)  # fmt: skip
_CLUSTER = ("name", *_PLACE, "controller", "compute_nodes", "control_plane", "worker_nodes", "groups", "vars")
_GPU = ("node", "pci_address", "vendor_id", "device_id", "device_type", "model")

_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_ADDRESS = r"([0-9a-fA-F]{4,}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(\.[0-7])?"
_HEX = r"(0x)?[0-9a-fA-F]{4}"


class CatalogError(ValueError):
    """The file has problems; ``problems`` has each with its line."""

    def __init__(self, problems: list[Problem], name: str = "the catalog") -> None:
        self.problems = sorted(problems, key=lambda each: each.line)
        super().__init__(f"{name}: " + "; ".join(str(each) for each in self.problems))


@dataclass(frozen=True)
class Gpu:
    """``address``: with domain; without function where all are meant. ``vendor``, ``device``: hex, or empty."""

    node: str
    address: str
    vendor: str = ""
    device: str = ""
    model: str = ""
    id: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Cards are one thing whatever the function: its functions go together."""
        return self.node, self.address.split(".")[0]

    @property
    def mapping(self) -> str:
        return f"gpu-{self.id or self.address.replace(':', '-').replace('.', '-')}"


@dataclass(frozen=True)
class CatalogVm:
    """``ip``: with prefix length, or ``dhcp``. ``cluster``, ``role``: empty for a VM of its own."""

    name: str
    node: str
    vmid: int | None
    ip: str
    gateway: str
    bridge: str
    cores: int
    memory_mib: int
    disk_gib: int
    storage: str
    image: str
    template: str
    gpus: tuple[Gpu, ...]
    auto_start: bool
    onboot: bool
    agent: bool
    cloud_init: bool
    cluster: str
    role: str
    groups: tuple[str, ...]
    vars: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0

    @property
    def address(self) -> str:
        """The address alone, or empty."""
        return "" if self.ip == "dhcp" else self.ip.split("/")[0]


@dataclass(frozen=True)
class Catalog:
    vms: tuple[CatalogVm, ...]
    gpus: tuple[Gpu, ...]
    remarks: tuple[Problem, ...] = ()

    def sharing(self) -> dict[tuple[str, str], list[str]]:
        """(node, address) of each card that more than one VM has, to their names."""
        users: dict[tuple[str, str], list[str]] = {}
        for vm in self.vms:
            for gpu in vm.gpus:
                users.setdefault(gpu.key, []).append(vm.name)
        return {key: names for key, names in users.items() if len(names) > 1}


@dataclass
class _Reader:
    notes: Notes
    defaults: Section
    networks: dict[str, Section] = field(default_factory=dict)
    gpus: dict[str, Gpu] = field(default_factory=dict)
    vms: list[CatalogVm] = field(default_factory=list)

    def place(self, name: str, *sections: Section) -> str:
        """A word of the nearest section that has it: the VM's, its cluster's, the defaults."""
        for section in (*sections, self.defaults):
            if section.has(name):
                return section.text(name)
        return ""


def read(lined: Lined, name: str = "the catalog") -> Catalog:
    """Raises CatalogError with all problems."""
    notes = Notes()
    top = Section.of(lined, "", notes, _TOP)
    if top.number("catalog", FORMAT) != FORMAT:
        top.wrong("catalog", f"this version reads format {FORMAT}")
    reader = _Reader(notes, top.section("defaults", (*_PLACE, *_SIZES, "agent", "cloud_init", "onboot")))
    for network, section in top.named("networks", ("cidr", "gateway", "bridge", "ip_from_vmid")):
        _network(section)
        reader.networks[network] = section
    for gpu, section in top.named("gpus", _GPU):
        if found := _gpu(reader, section, gpu, ""):
            reader.gpus[gpu] = found
    for vm, section in top.named("vms", _VM):
        _vm(reader, section, None, vm, "")
    for cluster, section in top.named("clusters", _CLUSTER):
        _cluster(reader, section, cluster)
    _together(reader)
    if notes.problems:
        raise CatalogError(notes.problems, name)
    return Catalog(tuple(reader.vms), tuple(reader.gpus.values()), tuple(notes.remarks))


def _network(section: Section) -> None:
    cidr = section.text("cidr")
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError as error:
        section.wrong("cidr", f"{error}; write it like 192.168.0.0/24")
        return
    gateway = section.text("gateway")
    if gateway and _ip(section, "gateway", gateway, network) is None:
        return


def _ip(
    section: Section, name: str, text: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        section.wrong(name, f"{error}")
        return None
    if network is not None and found not in network:
        section.wrong(name, f"{text} is not in {network}")
        return None
    return found


def _gpu(reader: _Reader, section: Section, name: str, node: str) -> Gpu | None:
    where = section.text("node", node or reader.place("node"))
    if not where:
        section.wrong("node", "it is needed: on which node the card is")
    address = section.text("pci_address", "", _ADDRESS, "0000:01:00, which means all functions of the card").lower()
    if not address:
        if not section.has("pci_address"):
            section.wrong("pci_address", "it is needed, like 0000:01:00")
        return None
    vendor, device = (section.text(key, "", _HEX, "10de").lower() for key in ("vendor_id", "device_id"))
    full = address if address.count(":") == 2 else f"0000:{address}"
    return Gpu(where, full, vendor.removeprefix("0x"), device.removeprefix("0x"), section.text("model"), name)


def _cluster(reader: _Reader, section: Section, key: str) -> None:
    """An HPC cluster has a controller and compute nodes, a cloud one a control plane and workers."""
    name = section.text("name", key, _NAME, "hpc-cluster")
    kinds = [kind for kind in ("controller", "control_plane") if section.has(kind)]
    if len(kinds) != 1:
        section.wrong("", "a cluster has a controller with compute_nodes, or a control_plane with worker_nodes")
    if section.has("controller"):
        _vm(reader, section.section("controller", _VM), section, f"{name}-controller", "hpc-controller")
    for number, each in enumerate(section.sections("compute_nodes", _VM), 1):
        _vm(reader, each, section, f"{name}-compute-{number:02}", "hpc-compute")
    if section.has("control_plane"):
        _vm(reader, section.section("control_plane", _VM), section, f"{name}-control-plane", "kubernetes-control-plane")
    workers = section.section("worker_nodes", ("cpu", "gpu"))
    for kind, middle in (("cpu", "worker"), ("gpu", "gpu-worker")):
        for number, each in enumerate(workers.sections(kind, _VM), 1):
            _vm(reader, each, section, f"{name}-{middle}-{number:02}", "kubernetes-worker")


def _vm(reader: _Reader, section: Section, cluster: Section | None, name: str, role: str) -> None:
    around = (section, cluster) if cluster else (section,)
    if not Section({"name": Lined(name, section.line)}, section.line, section.where, reader.notes).text(
        "name", "", _NAME, "vm-llm (letters, digits and -)"
    ):
        return
    node = reader.place("node", *around)
    if not node:
        section.wrong("node", "it is needed, here or in defaults")
    vmid = section.number("vmid", 0, 100, 999_999_999) or None
    network = reader.networks.get(reader.place("network", *around))
    if reader.place("network", *around) and network is None:
        section.wrong("network", f"there is no network {reader.place('network', *around)}")
    ip, gateway = _address(section, network, vmid)
    groups = [each for part in around for each in part.words("groups")]
    variables = {key: plain(each) for part in reversed(around) for key, each in part.section("vars").items.items()}
    reader.vms.append(
        CatalogVm(
            name=name,
            node=node,
            vmid=vmid,
            ip=ip,
            gateway=gateway,
            bridge=reader.place("bridge", *around) or (network.text("bridge") if network else "") or "vmbr0",
            cores=section.number("cpu_cores", reader.defaults.number("cpu_cores", 4, 1), 1, 8192),
            memory_mib=_memory(section, reader.defaults),
            disk_gib=section.number("disk_gb", reader.defaults.number("disk_gb", 32, 1), 1),
            storage=reader.place("storage", *around) or "local-zfs",
            image=reader.place("image", *around),
            template=reader.place("template", *around),
            gpus=tuple(_gpus(reader, section, node)),
            auto_start=section.switch("auto_start", True),
            onboot=section.switch("onboot", reader.defaults.switch("onboot", False)),
            agent=section.switch("agent", reader.defaults.switch("agent", True)),
            cloud_init=section.switch("cloud_init", reader.defaults.switch("cloud_init", True)),
            cluster=cluster.text("name", cluster.where.rpartition(".")[2]) if cluster else "",
            role=role,
            groups=tuple(str(each.value) for each in groups),
            vars=variables,
            line=section.line,
        )
    )


def _memory(section: Section, defaults: Section) -> int:
    for part in (section, defaults):
        if part.has("memory_gb") and part.has("memory_mib"):
            part.wrong("memory_gb", "memory_mib is there, too; say one of them")
        if part.has("memory_mib"):
            return part.number("memory_mib", 4096, 16)
        if part.has("memory_gb"):
            return part.number("memory_gb", 4, 1, 65536) * 1024
    return 4096


def _address(section: Section, network: Section | None, vmid: int | None) -> tuple[str, str]:
    text = section.text("ip")
    if network is None:
        if text and text != "dhcp" and _ip(section, "ip", text.split("/")[0], None) is None:
            return "dhcp", ""
        if text and text != "dhcp" and "/" not in text:
            section.wrong("ip", f"{text} has no prefix length; write {text}/24, or name a network")
        return text or "dhcp", ""
    try:
        inside = ipaddress.ip_network(network.text("cidr"))
    except ValueError:
        return "dhcp", ""  # told where the network stands
    if not text and network.switch("ip_from_vmid", False) and vmid:
        text = str(inside.network_address + vmid)
    if not text or text == "dhcp":
        return "dhcp", ""
    found = _ip(section, "ip" if section.has("ip") else "vmid", text.split("/")[0], inside)
    return (f"{found}/{inside.prefixlen}", network.text("gateway")) if found else ("dhcp", "")


def _gpus(reader: _Reader, section: Section, node: str) -> Iterator[Gpu]:
    seen: dict[tuple[str, str], int] = {}
    for each in section.words("gpus"):
        gpu = reader.gpus.get(str(each.value))
        if gpu is None:
            known = ", ".join(sorted(reader.gpus)) or "none"
            reader.notes.wrong(each.line, section.path("gpus"), f"there is no GPU {each.value}; there are {known}")
        elif _fits(reader, section, gpu, node, seen, each.line):
            yield gpu
    passthrough = section.section("pcie_passthrough", ("enabled", "devices"))
    if not passthrough.switch("enabled", passthrough.has("devices")):
        return
    for device in passthrough.sections("devices", _GPU):
        if device.text("device_type", "gpu") != "gpu":
            continue
        found = _gpu(reader, device, "", node)
        if found and _fits(reader, section, found, node, seen, device.line):
            yield next((known for known in reader.gpus.values() if known.key == found.key), found)


def _fits(reader: _Reader, section: Section, gpu: Gpu, node: str, seen: dict[tuple[str, str], int], line: int) -> bool:
    told = section.path("gpus")
    if gpu.node != node:
        reader.notes.wrong(line, told, f"{gpu.id or gpu.address} is in node {gpu.node}, and the VM on {node or 'none'}")
    elif gpu.key in seen:
        reader.notes.wrong(line, told, f"{gpu.address} is there twice (line {seen[gpu.key]})")
    elif len(seen) == MAX_GPUS:
        reader.notes.wrong(line, told, f"a VM has at most {MAX_GPUS} GPUs")
    else:
        seen[gpu.key] = line
        return True
    return False


def _together(reader: _Reader) -> None:
    """What only all VMs together show."""
    for what, values in (
        ("vmid", [(vm, str(vm.vmid)) for vm in reader.vms if vm.vmid]),
        ("name", [(vm, vm.name) for vm in reader.vms]),
        ("ip", [(vm, vm.address) for vm in reader.vms if vm.address]),
    ):
        first: dict[str, CatalogVm] = {}
        for vm, value in values:
            other = first.setdefault(value, vm)
            if other is not vm:
                text = f"{what} {value} is that of {other.name}, too (line {other.line})"
                reader.notes.wrong(vm.line, vm.name, text)
    cards: dict[tuple[str, str], Gpu] = {}
    for gpu in reader.gpus.values():
        other_gpu = cards.setdefault(gpu.key, gpu)
        if other_gpu is not gpu:
            reader.notes.wrong(1, f"gpus.{gpu.id}", f"{gpu.address} is {other_gpu.id}, too")
    catalog = Catalog(tuple(reader.vms), ())
    by_name = {vm.name: vm for vm in reader.vms}
    for (node, address), names in catalog.sharing().items():
        vms = [by_name[name] for name in names]
        starting = [vm.name for vm in vms if vm.auto_start]
        text = f"{address} on {node} is shared by {', '.join(names)}: one of them runs at a time"
        if len(starting) > 1:
            text += f", and {' and '.join(starting)} start by themselves: set auto_start: false for all but one"
        reader.notes.remark(vms[-1].line, vms[-1].name, text)
