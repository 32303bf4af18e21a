# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which PCI functions a host cannot do without, and why: disks in use, network ports, its chipset, its last console.

In doubt a function is needed: to refuse a card costs an operator a line of inventory, to take the wrong one the host.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping

from . import _netdev
from ._iommu import VFIO, Function, behind
from ._netdev import NET
from ._root import Root

BLOCK = "/sys/block"
INTERFACES = "/etc/network/interfaces"
_UP = 0x1
_MEMBER = re.compile(r"zfs_member|LVM2_member|linux_raid_member|crypto_LUKS|bcache|ceph_bluestore|.*_raid_member")
_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
"""Partition type of an EFI system partition; those of proxmox-boot-tool are not mounted (pve-docs, system-booting)."""
_PORTS = ("bridge-ports", "bridge_ports", "bond-slaves", "bond_slaves", "ovs_ports", "ovs_bonds", "vlan-raw-device")
_LINK_LOCAL = "20"
_SERIAL = re.compile(r"(ttyS|ttyAMA|ttyUSB|hvc|hvsi)\d+")


def needs(root: Root, found: Mapping[str, Function]) -> dict[str, list[str]]:
    """Reasons by address; a function without one can go as far as this goes."""
    reasons: dict[str, list[str]] = {}
    for disk, uses in disks(root).items():
        for address in behind(root, f"{BLOCK}/{disk}"):
            reasons.setdefault(address, []).append(f"disk {disk} ({', '.join(uses)})")
    for port, uses in ports(root).items():
        for address in behind(root, f"{NET}/{port}/device"):
            reasons.setdefault(address, []).append(f"network port {port} ({', '.join(uses)})")
    for function in found.values():
        if function.kind.startswith("0601"):
            reasons.setdefault(function.address, []).append("the chipset's own bridge")
    return {address: list(dict.fromkeys(texts)) for address, texts in reasons.items()}


# Disks ----------------------------------------------------------------------------------------------------------------


def disks(root: Root) -> dict[str, list[str]]:
    """Uses of each disk that is in use: mounts, swap, volume groups, pools, arrays, boot partitions."""
    names, lower = _devices(root)
    used: dict[str, list[str]] = {}

    def use(name: str | None, text: str) -> None:
        """Charge a use to the disks below a device."""
        waiting, seen = [name] if name else [], set()
        while waiting:
            now = waiting.pop()
            if now in seen:
                continue
            seen.add(now)
            below = lower.get(now, [])
            waiting += below
            if not below and root.exists(f"{BLOCK}/{now}"):
                used.setdefault(now, []).append(text)

    zfs = bool(root.glob("/proc/spl/kstat/zfs/*/state"))
    for numbers, place, kind, source in _mounts(root):
        zfs = zfs or kind == "zfs"
        word = "boot disk, " if place in ("/", "/boot", "/boot/efi", "/efi") else ""
        use(names.get(numbers) or _node(root, source), f"{word}mounted on {place}")
    for line in (root.read_or_none("/proc/swaps") or "").splitlines()[1:]:
        use(_node(root, line.split()[0]), "swap")
    told = False
    for numbers, name in names.items():
        data = root.read_or_none(f"/run/udev/data/b{numbers}") or ""
        told = told or "E:ID_" in data
        values = dict(line[2:].split("=", 1) for line in data.splitlines() if line.startswith("E:") and "=" in line)
        if _MEMBER.fullmatch(values.get("ID_FS_TYPE", "")):
            use(name, values["ID_FS_TYPE"])
        if values.get("ID_PART_ENTRY_TYPE", "").lower() == _ESP:
            use(name, "boot partition")
    if zfs and not told:
        # which disks a pool is on is in udev's database alone: without it, any can be
        for name in names.values():
            use(name, "may belong to a ZFS pool: udev tells nothing of it")
    return {name: list(dict.fromkeys(texts)) for name, texts in sorted(used.items())}


def _devices(root: Root) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names of disks and partitions by ``major:minor``, and what each device lies on."""
    names: dict[str, str] = {}
    lower: dict[str, list[str]] = {}
    for disk in root.listdir(BLOCK):
        lower[disk] = root.listdir(f"{BLOCK}/{disk}/slaves")
        # partitions alone: an NVMe drive's ``device`` has a number, too, that of its controller's character device
        for entry in ("", *(name for name in root.listdir(f"{BLOCK}/{disk}") if name.startswith(disk))):
            numbers = root.read_or_none(f"{BLOCK}/{disk}/{entry}/dev" if entry else f"{BLOCK}/{disk}/dev")
            if numbers and re.fullmatch(r"\d+:\d+", numbers.strip()):
                names[numbers.strip()] = entry or disk
                if entry:
                    lower[entry] = [disk]
    return names, lower


def _mounts(root: Root) -> list[tuple[str, str, str, str]]:
    """(major:minor, place, type, source) of each mount (proc(5), mountinfo)."""
    found = []
    for line in (root.read_or_none("/proc/self/mountinfo") or "").splitlines():
        left, _dash, right = line.partition(" - ")
        words, rest = left.split(), right.split()
        if len(words) > 4 and len(rest) > 1:
            found.append((words[2], words[4], rest[0], rest[1]))
    return found


def _node(root: Root, source: str) -> str | None:
    """The kernel's name of a device node or of a link to one."""
    if not source.startswith("/dev/"):
        return None
    return root.link_name(source) or posixpath.basename(source)


# Network --------------------------------------------------------------------------------------------------------------


def ports(root: Root) -> dict[str, list[str]]:
    """Uses of each physical port that is in use or that the node's configuration names."""
    used: dict[str, list[str]] = {}
    try:
        default = _netdev.default_route(root)
    except _netdev.NetdevError:
        default = []
    uses = [(name, "default route") for name in default]
    uses += [(name, f"port of {kind}") for name, kind in _enslaved(root)]
    uses += [(name, "addresses") for name in _addressed(root)]
    uses += [(name, f"named in {INTERFACES}") for name in _configured(root)]
    uses += [(name, "up") for name in _netdev.names(root) if _is_up(root, name)]
    for name, text in uses:
        for port in _below(root, name):
            used.setdefault(port, []).append(text if name == port else f"{text} via {name}")
    return {port: _short(texts) for port, texts in sorted(used.items())}


def _short(texts: Iterable[str]) -> list[str]:
    """Without ``up`` where there is a better reason."""
    found = list(dict.fromkeys(text for text in texts if not text.startswith("up via ")))
    return [text for text in found if text != "up"] or found


def _below(root: Root, name: str) -> list[str]:
    """The physical ports that an interface ends at; none for taps, loopback and what does not exist now."""
    if not _netdev.exists(root, name):
        return []
    try:
        return _netdev.ports(root, [name])
    except _netdev.NetdevError:
        return []


def _enslaved(root: Root) -> list[tuple[str, str]]:
    return [(name, master) for name in _netdev.names(root) if (master := root.link_name(f"{NET}/{name}/master"))]


def _addressed(root: Root) -> list[str]:
    """Interfaces with an IPv4 route of their own, or an IPv6 address that is not just for the link."""
    rows = [line.split() for line in (root.read_or_none("/proc/net/route") or "").splitlines()[1:]]
    found = [row[0] for row in rows if row]
    for line in (root.read_or_none("/proc/net/if_inet6") or "").splitlines():
        words = line.split()
        if len(words) == 6 and words[3] != _LINK_LOCAL:
            found.append(words[5])
    return [name for name in dict.fromkeys(found) if name != "lo"]


def _configured(root: Root) -> list[str]:
    """Interfaces that get an address or a master by interfaces(5), up or not; a plain ``manual`` uses nothing."""
    found: list[str] = []
    for path in (INTERFACES, *root.glob(f"{INTERFACES}.d/*")):
        for line in (root.read_or_none(path) or "").splitlines():
            words = line.split()
            if len(words) > 3 and words[0] == "iface" and words[3] in ("static", "dhcp", "auto"):
                found.append(words[1])
            elif words and words[0] in _PORTS:
                found += words[1:]
    return list(dict.fromkeys(name for name in found if name not in ("lo", "none")))


def _is_up(root: Root, name: str) -> bool:
    return bool((root.read_int(f"{NET}/{name}/flags") or 0) & _UP)


# Console --------------------------------------------------------------------------------------------------------------


def lost_console(root: Root, found: Mapping[str, Function], taken: Iterable[str]) -> Function | None:
    """The card of the host's only console, when it is among those to be taken.

    The console is on the adapter that the firmware used. It is not the only one where another adapter stays with the
    host (a server's management controller is one), or where the kernel writes to a serial line.
    """
    gone = set(taken)
    lost = next((f for f in found.values() if f.boot_vga and f.address in gone and f.driver != VFIO), None)
    stays = any(f.kind.startswith("0300") and f.address not in gone and f.driver != VFIO for f in found.values())
    if lost is None or stays or serial_console(root):
        return None
    return lost


def serial_console(root: Root) -> bool:
    """Does the kernel write to a serial line or a hypervisor's console?"""
    return bool(_SERIAL.search(root.read_or_none("/sys/class/tty/console/active") or ""))
