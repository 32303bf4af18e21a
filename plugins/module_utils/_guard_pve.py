# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node of Proxmox VE does right now, from its own live state: configurations, processes, locks.

Read from files and ``/proc`` and not by ``qm``, since this happens before each start of a VM, under its lock:
configurations in ``/etc/pve/qemu-server``, processes by ``/run/qemu-server/ID.pid``, a VM's lock (flock on
``/var/lock/qemu-server/lock-ID.conf``) by ``/proc/locks``, devices by QEMU's command line, else by Proxmox VE's
reservations (``/run/qemu-server/pci-id-reservations``).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import _guard, _guard_devices, _memory_budget, _pve_strings, _qemu
from ._guard import Group, Memory, State, Vm
from ._guard_config import Config
from ._guard_devices import Device
from ._guard_records import Lease, Process, Records
from ._root import Root

CONFIGS = "/etc/pve/qemu-server"
MAPPINGS = "/etc/pve/mapping/pci.cfg"
HA_RESOURCES = "/etc/pve/ha/resources.cfg"
RESERVATIONS = f"{_qemu.PVE_RUN}/pci-id-reservations"
VZDUMP_LOCK = "/run/vzdump.lock"
_DEFAULT_MEMORY = 512
"""MiB, of a VM that does not say (qemu-server, Memory.pm)."""


class Tree(Root):
    """A folder that stands for a node, while processes and their locks are this machine's: for tests with real ones."""

    def path(self, path: str) -> Path:
        return Path(path) if re.match(r"/proc/(\d|locks$)", path) else super().path(path)


@dataclass(frozen=True)
class VmConfig:
    """The options of a VM as they are in force (without snapshots and pending changes)."""

    vmid: int
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.options.get("name", "")

    @property
    def lock(self) -> str:
        return self.options.get("lock", "")

    @property
    def memory(self) -> int:
        """MiB. The option is a number, or a property string since qemu-server 8.0.8."""
        text = self.options.get("memory", "")
        value = _pve_strings.parse("current", text).get("current") if text else None
        return int(value) if value is not None and value.isdigit() else _DEFAULT_MEMORY

    @property
    def hostpci(self) -> dict[str, str]:
        return {key: value for key, value in self.options.items() if re.fullmatch(r"hostpci\d+", key)}


def parse_config(vmid: int, text: str) -> VmConfig:
    """The first section of a VM's file: lines ``key: value``."""
    options = {}
    for line in text.splitlines():
        if line.startswith("["):
            break
        found = re.fullmatch(r"([a-z][a-z0-9_-]*):\s*(.*?)\s*", line)
        if found:
            options[found[1]] = found[2]
    return VmConfig(vmid, options)


def configs(root: Root, also: Iterable[int] = ()) -> dict[int, VmConfig]:
    """VMs of this node, templates left out; and those that run here or are named in ``also``, wherever their file is.

    While a VM migrates its file still lies with the source, and for a moment already with the target.
    """
    found: dict[int, VmConfig] = {}
    for name in root.listdir(CONFIGS):
        number, _dot, ending = name.partition(".")
        if number.isdigit() and ending == "conf":
            text = root.read_or_none(f"{CONFIGS}/{name}")
            if text is None:
                continue  # removed, or moved to another node, meanwhile
            config = parse_config(int(number), text)
            if config.options.get("template") != "1":
                found[config.vmid] = config
    for vmid in {*_qemu.pve_running(root), *also} - set(found):
        for path in root.glob(f"/etc/pve/nodes/*/qemu-server/{vmid}.conf"):
            text = root.read_or_none(path)
            if text is not None:
                found[vmid] = parse_config(vmid, text)
    return found


def node_name(root: Root) -> str:
    """This node's name: ``/etc/pve/local`` points at its folder, else the host's name."""
    return root.link_name("/etc/pve/local") or socket.gethostname().partition(".")[0]


def mappings(root: Root) -> _guard_devices.Mappings:
    return _guard_devices.parse_mappings(root.read_or_none(MAPPINGS) or "", node_name(root))


def lock_path(vmid: int) -> str:
    return f"/var/lock/qemu-server/lock-{vmid}.conf"


def lock_holder(root: Root, path: str) -> int | None:
    """Pid of who has a file locked by flock(2), 0 when that is not to be seen, None when nobody has."""
    try:
        status = root.path(path).stat()
    except OSError:
        return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in (root.read_or_none("/proc/locks") or "").splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:  # a waiter's second word is ->
            return max(0, int(words[4]))
    return None


def starting(root: Root, lease: Lease) -> bool:
    """Is the task that got this lease still at it? It lives, and has the VM's lock."""
    if lease.starter is None or not lease.starter.alive(root):
        return False
    path = lock_path(lease.vmid)
    return not root.exists(path) or lock_holder(root, path) is not None


def in_backup(root: Root, config: VmConfig) -> bool:
    """Is a backup of it going on? The lock in its configuration outlives a vzdump that was killed."""
    if config.lock != "backup":
        return False
    return not root.exists(VZDUMP_LOCK) or lock_holder(root, VZDUMP_LOCK) is not None


def is_ha(root: Root, vmid: int) -> bool:
    """Is it under high availability? Then ``qm shutdown`` only asks for it."""
    return re.search(rf"^vm:\s*{vmid}\s*$", root.read_or_none(HA_RESOURCES) or "", re.MULTILINE) is not None


def machine(root: Root, vmid: int) -> _qemu.Machine | None:
    """The process of a VM that runs. A pid file without a pid is that of a start that has just begun."""
    try:
        return _qemu.find(root, _qemu.pve(vmid))
    except _qemu.QemuError:
        return None


def phase(root: Root, config: VmConfig, lease: Lease | None) -> str:
    """What a VM does now."""
    if machine(root, config.vmid) is not None:
        return _guard.RUNNING
    if lease is not None and starting(root, lease):
        return _guard.STARTING
    if lease is not None and in_backup(root, config):
        return _guard.KEPT
    return _guard.STOPPED


def reservations(root: Root, vmid: int, pid: int | None) -> list[str]:
    """Addresses that Proxmox VE has noted for a VM: for its process ``pid``, or for its start that is under way.

    Lines ``ADDRESS VMID pid:PID`` or ``ADDRESS VMID time:UNTIL`` (s since 1970); what is left of an ended process, or
    of a start that has failed, does not count (PVE::QemuServer::PCI).
    """
    found = []
    for line in (root.read_or_none(RESERVATIONS) or "").splitlines():
        words = line.split()
        if len(words) != 3 or words[1] != str(vmid):
            continue
        kind, _colon, value = words[2].partition(":")
        if value.isdigit() and (int(value) > time.time() if kind == "time" else int(value) == pid):
            found.append(words[0])
    return found


def _keys(root: Root, addresses: Iterable[str], *, share: bool) -> frozenset[str] | None:
    keys = [_guard_devices.keys_of(root, address, share_functions=share) for address in addresses]
    return frozenset[str]().union(*keys) if keys else None


def held_by_running(root: Root, running: _qemu.Machine, vmid: int, *, share: bool) -> frozenset[str] | None:
    """Keys of the devices that a running VM has; None when neither QEMU nor Proxmox VE tells."""
    words = (root.read_or_none(f"/proc/{running.pid}/cmdline") or "").split("\0")
    addresses = list(_guard_devices.addresses_in(words)) or reservations(root, vmid, running.pid)
    return _keys(root, addresses, share=share)


def held_by_starting(
    root: Root, devices: Iterable[Device], lease: Lease | None, vmid: int, *, share: bool
) -> frozenset[str] | None:
    """Keys of a VM that is starting: what Proxmox VE has reserved for it, before that what its lease foresees."""
    reserved = _keys(root, reservations(root, vmid, None), share=share)
    if reserved is not None:
        fixed = (device.alternatives[0] for device in devices if len(device.alternatives) == 1)
        return reserved.union(*fixed)
    return frozenset(lease.keys) if lease is not None else None


def vm_of(root: Root, config: VmConfig, lease: Lease | None, settings: Config, known: _guard_devices.Mappings) -> Vm:
    """One VM as the rules see it."""
    share = settings.share_functions
    found, fault = [], ""
    for name, text in sorted(config.hostpci.items()):
        try:
            found.append(_guard_devices.device_of(root, name, text, known, share_functions=share))
        except (_guard_devices.DeviceError, _pve_strings.StringError) as error:
            fault = str(error)
    now = phase(root, config, lease)
    running = machine(root, config.vmid) if now == _guard.RUNNING else None
    held: frozenset[str] | None = None
    if running is not None:
        held = held_by_running(root, running, config.vmid, share=share)
    elif now != _guard.STOPPED:
        held = held_by_starting(root, found, lease, config.vmid, share=share)
    if held is None and not config.hostpci:
        held = frozenset()
    return Vm(
        config.vmid,
        config.name,
        config.memory,
        hugepages="hugepages" in config.options,
        devices=tuple(found),
        phase=now,
        held=held,
        lock=config.lock,
        since=float(running.start) if running else 0.0,
        fault=fault,
    )


def groups_of(settings: Config, known: Mapping[int, VmConfig]) -> tuple[Group, ...]:
    """Groups with the VMIDs of their members on this node: by number, or by name, which several VMs may have."""
    return tuple(
        Group(
            wish.name,
            wish.policy,
            frozenset(
                vmid for vmid, config in known.items() if str(vmid) in wish.members or config.name in wish.members
            ),
        )
        for wish in settings.groups
    )


def memory_of(root: Root, settings: Config) -> Memory | None:
    """What the host has, and what is claimed beside VMs. Raises BudgetError."""
    if not settings.memory:
        return None
    pool = free = 0
    for size in _memory_budget.PAGE_SIZES.values():
        folder = f"/sys/kernel/mm/hugepages/hugepages-{size * 1024}kB"
        pool += (root.read_int(f"{folder}/nr_hugepages") or 0) * size
        free += (root.read_int(f"{folder}/free_hugepages") or 0) * size
    return Memory(
        _memory_budget.memory_mib(root),
        settings.reserve,
        _memory_budget.arc_now_mib(root),
        pool,
        free,
        settings.limit,
        tuple(settings.claims.items()),
    )


def read_state(root: Root, settings: Config, records: Records, also: Iterable[int] = ()) -> State:
    """All that a decision needs. ``also``: VMs to look at wherever their file is. Raises BudgetError, OSError."""
    leases = records.leases()
    known = configs(root, {*also, *leases})  # one that has a lease may be arriving from another node
    pci = mappings(root)
    vms = {vmid: vm_of(root, config, leases.get(vmid), settings, pci) for vmid, config in known.items()}
    announced, stops = records.announced(root)
    return State(vms, groups_of(settings, known), memory_of(root, settings), announced, stops)


def starter_of(root: Root, vmid: int) -> Process | None:
    """The task that runs the hook we are in: who has the VM's lock, else the parent of the hook.

    None when neither is there any more.
    """
    pid = lock_holder(root, lock_path(vmid))
    if not pid:
        hook = os.getppid()
        words = (root.read_or_none(f"/proc/{hook}/stat") or "").rpartition(")")[2].split()
        pid = int(words[1]) if len(words) > 1 else 0
    return Process.of(root, pid) if pid > 1 else None
