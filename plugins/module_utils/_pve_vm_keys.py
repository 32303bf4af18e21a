# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of a VM: their names, sub-options, types and defaults, and which of them root@pam alone may set.

Source: the API schema of Proxmox VE 9.2 (``/nodes/{node}/qemu``) and qemu-server 9.2.6, API2/Qemu.pm, for the
permissions. Names that are not here are refused before anything is sent, since Proxmox VE would refuse them after a
part was done (a VM created, a disk allocated).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ._pve_strings import kind

MAX_HOSTPCI = 16
"""hostpci0 to hostpci15 ($MAX_HOSTPCI_DEVICES of PVE/QemuServer/PCI.pm)."""

_THROTTLES = " ".join(
    f"bps{way}:i bps{way}_max_length:i iops{way}:i iops{way}_max:i iops{way}_max_length:i mbps{way}:n mbps{way}_max:n"
    for way in ("", "_rd", "_wr")
)
_DRIVE = (
    "file:s format:s import-from:s size:s media:s aio:s backup:b cache:s detect_zeroes:b discard:e replicate:b "
    f"rerror:s serial:s shared:b snapshot:b werror:s {_THROTTLES}"
)

_SUBS = {
    "agent": "enabled:b freeze-fs:b fstrim_cloned_disks:b type:s",
    "amd-sev": "type:s allow-smt:b kernel-hashes:b no-debug:b no-key-sharing:b",
    "audio": "device:s driver:s",
    "boot": "legacy:s order:s",
    "cicustom": "meta:s network:s user:s vendor:s",
    "cpu": "cputype:s flags:s guest-phys-bits:i hidden:b hv-vendor-id:s level:i phys-bits:s reported-model:s",
    "efidisk": "file:s format:s import-from:s size:s efitype:s ms-cert:s pre-enrolled-keys:b",
    "hostpci": (
        "host:s mapping:s pcie:b rombar:b romfile:s x-vga:b legacy-igd:b mdev:s driver:s vendor-id:s device-id:s "
        "sub-vendor-id:s sub-device-id:s"
    ),
    "ide": f"{_DRIVE} model:s ssd:b wwn:s",
    "intel-tdx": "type:s attestation:b vsock-cid:i vsock-port:i",
    "ipconfig": "ip:s gw:s ip6:s gw6:s",
    "ivshmem": "size:i name:s",
    "machine": "type:s viommu:s aw-bits:n enable-s3:b enable-s4:b",
    "memory": "current:i",
    "net": "model:s macaddr:s bridge:s firewall:b host-tunnel:b link_down:b mtu:i queues:i rate:n tag:i trunks:s",
    "numa": "cpus:s hostnodes:s memory:n policy:s",
    "rng": "source:s max_bytes:i period:i",
    "sata": f"{_DRIVE} ssd:b wwn:s",
    "scsi": f"{_DRIVE} iothread:b product:s queues:i ro:b scsiblock:b ssd:b vendor:s wwn:s",
    "smbios": "base64:b family:s manufacturer:s product:s serial:s sku:s uuid:s version:s",
    "spice_enhancements": "foldersharing:b videostreaming:s",
    "startup": "order:i up:i down:i",
    "tpmstate": "file:s format:s import-from:s size:s version:s",
    "usb": "host:s mapping:s usb3:b",
    "vga": "type:s memory:i clipboard:s",
    "virtio": f"{_DRIVE} iothread:b ro:b",
    "virtiofs": "dirid:s cache:s direct-io:b expose-acl:b expose-xattr:b",
    "watchdog": "model:s action:s",
}

SUB_OPTIONS: Mapping[str, Mapping[str, str]] = {
    name: dict(word.split(":") for word in words.split()) for name, words in _SUBS.items()
}
"""Kind of an option -> sub-option -> type: b(oolean), i(nteger), n(umber), s(tring), e: ``on`` or ``ignore``."""

ALIASES: Mapping[str, Mapping[str, str]] = {
    "agent": {"freeze-fs-on-backup": "freeze-fs", "guest-fsfreeze": "freeze-fs"},
    **{drive: {"volume": "file"} for drive in ("efidisk", "ide", "sata", "scsi", "tpmstate", "virtio")},
}

_SCALARS = (
    "acpi:b affinity:s allow-ksm:b arch:s args:s autostart:b balloon:i bios:s cipassword:s citype:s ciupgrade:b "
    "ciuser:s cores:i cpulimit:n cpuunits:i description:s freeze:b hookscript:s hotplug:s hugepages:s "
    "keephugepages:b keyboard:s kvm:b localtime:b migrate_downtime:n migrate_speed:i name:s nameserver:s numa:b "
    "onboot:b ostype:s parallel:s protection:b scsihw:s searchdomain:s serial:s shares:i sockets:i sshkeys:s "
    "startdate:s tablet:b tags:s tdf:b template:b vcpus:i vmgenid:s vmstatestorage:s"
)
SCALARS: Mapping[str, str] = dict(word.split(":") for word in _SCALARS.split())
"""Options that are one value, by kind (``numa`` and ``numaN`` are told apart by the index)."""

INDEXED: Mapping[str, int] = {
    "hostpci": MAX_HOSTPCI, "ide": 4, "ipconfig": 32, "net": 32, "numa": 8, "parallel": 3, "sata": 6, "scsi": 31,
    "serial": 4, "usb": 14, "virtio": 16, "virtiofs": 10,
}  # fmt: skip
"""Kinds that carry a number, and how many of them a VM can have."""

_NUMBERED_ONCE = {"audio0", "efidisk0", "rng0", "smbios1", "tpmstate0"}

DRIVES = ("efidisk", "ide", "sata", "scsi", "tpmstate", "virtio")

DEFAULTS: Mapping[str, str] = {
    "acpi": "1", "allow-ksm": "1", "autostart": "0", "bios": "seabios", "ciupgrade": "1", "cores": "1",
    "cpulimit": "0", "hotplug": "network,disk,usb", "keephugepages": "0", "kvm": "1", "migrate_downtime": "0.1",
    "migrate_speed": "0", "numa": "0", "onboot": "0", "ostype": "other", "protection": "0", "scsihw": "lsi",
    "shares": "1000", "sockets": "1", "tablet": "1", "tdf": "0", "template": "0", "vcpus": "0",
}  # fmt: skip
"""What an option that is not there means, where the schema says so."""

SUB_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "agent": {"enabled": "0", "freeze-fs": "1", "fstrim_cloned_disks": "0", "type": "virtio"},
    "hostpci": {"driver": "vfio", "legacy-igd": "0", "pcie": "0", "rombar": "1", "x-vga": "0"},
    "net": {"firewall": "0", "host-tunnel": "0", "link_down": "0"},
    "cpu": {"hidden": "0"},
    "memory": {"current": "512"},
    "usb": {"usb3": "0"},
    "vga": {"type": "std"},
    **{
        drive: {"backup": "1", "discard": "ignore", "iothread": "0", "replicate": "1", "ro": "0", "shared": "0",
                "snapshot": "0", "ssd": "0"}
        for drive in ("ide", "sata", "scsi", "virtio")
    },
    "efidisk": {"efitype": "2m", "pre-enrolled-keys": "0"},
}  # fmt: skip

ROOT_ONLY = frozenset(
    {
        "affinity", "amd-sev", "arch", "args", "hookscript", "hugepages", "intel-tdx", "ivshmem", "keephugepages",
        "lock", "meta", "parallel", "spice_enhancements", "vmgenid",
    }
)  # fmt: skip
"""Kinds that fall through to "only root can set" (API2/Qemu.pm:789-1040): literally root@pam, never a token."""

_TRUE, _FALSE = ("1", "on", "yes", "true"), ("0", "off", "no", "false")


class KeyRefused(ValueError):
    """A name or value that no VM can have; the text names it and, where there is one, the likely meaning."""


def is_string(option: str) -> bool:
    """Whether an option is a property string. ``numa`` is a switch, ``numa0`` a string."""
    return kind(option) in SUB_OPTIONS and option != "numa"


def check_name(option: str) -> None:
    """Raises KeyRefused for a name that is no option of a VM."""
    of = kind(option)
    index = option[len(of) :]
    if index and option not in _NUMBERED_ONCE:
        if of not in INDEXED:
            raise KeyRefused(f"{option}: a VM has no such option{_meant(of)}")
        if int(index) >= INDEXED[of]:
            raise KeyRefused(f"{option}: a VM has {of}0 to {of}{INDEXED[of] - 1}")
        return
    if option in _NUMBERED_ONCE or option == "numa":
        return
    if of in INDEXED:
        raise KeyRefused(f"{option}: it needs a number, as {option}0")
    if of not in SCALARS and of not in SUB_OPTIONS:
        raise KeyRefused(f"{option}: a VM has no such option{_meant(of)}")


def check_sub(option: str, sub: str) -> str:
    """The sub-option's own name, aliases resolved. Raises KeyRefused."""
    of = kind(option)
    sub = ALIASES.get(of, {}).get(sub, sub)
    known = SUB_OPTIONS[of]
    if sub in known:
        return sub
    if of == "hostpci" and sub == "all-functions":
        raise KeyRefused(f"{option}: all-functions does not exist; an address without .FUNCTION means all functions")
    close = difflib.get_close_matches(sub, known, 1)
    meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
    raise KeyRefused(f"{option}: no sub-option {sub}{meant}")


def text(option: str, sub: str | None, value: Any) -> str:
    """A wanted value as Proxmox VE writes it. ``sub``: the sub-option, None for an option that is one value.

    YAML reads ``on`` and ``yes`` as booleans, so booleans are written by the type that the option has. A list is joined
    by what its option takes. Raises KeyRefused.
    """
    where = f"{option}.{sub}" if sub else option
    kind_of = SUB_OPTIONS[kind(option)][sub] if sub else SCALARS.get(kind(option), "b" if option == "numa" else "s")
    if isinstance(value, (list, tuple)):
        value = _joiner(option).join(str(item) for item in value)
    if kind_of in ("b", "e"):
        low = str(value).strip().lower()
        if low in (*_TRUE, *_FALSE):
            if kind_of == "e":
                return "on" if low in _TRUE else "ignore"
            return "1" if low in _TRUE else "0"
        if kind_of == "e" and low == "ignore":
            return low
        raise KeyRefused(f"{where}: {value!r} is neither yes nor no")
    if isinstance(value, bool):
        raise KeyRefused(f"{where}: {value} is a boolean, and this option takes a word; put it into quotes")
    written = str(value)
    if kind_of == "i" and not re.fullmatch(r"\d+", written):
        raise KeyRefused(f"{where}: {written!r} is no whole number")
    if kind_of == "n" and not re.fullmatch(r"\d+(\.\d+)?", written):
        raise KeyRefused(f"{where}: {written!r} is no number")
    if not written and not (option == "args"):
        raise KeyRefused(f"{where}: the value is empty; null removes the option")
    return written


def root_only(option: str, before: str | None, after: str | None) -> bool:
    """Whether a change of an option needs root@pam itself.

    Some depend on the value, before or after: a raw ``hostpciN host=`` or ``romfile=``, a host's USB device, and serial
    ports that are no sockets.
    """
    of = kind(option)
    if of in ROOT_ONLY:
        return True
    values = [value for value in (before, after) if value]
    if of == "hostpci":
        return any(not re.search(r"(?:^|,)mapping=", value) or "romfile=" in value for value in values)
    if of == "usb":
        return any(not re.search(r"(?:^|,)mapping=", value) and not value.startswith("spice") for value in values)
    if of == "serial":
        return any(value != "socket" for value in values)
    return False


def _joiner(option: str) -> str:
    if option == "sshkeys":
        return "\n"
    if option in ("nameserver", "searchdomain"):
        return " "
    return "," if option == "hotplug" else ";"


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*SCALARS, *SUB_OPTIONS], 1)
    return f"; did you mean {close[0]}{'0' if close[0] in INDEXED and close[0] != 'numa' else ''}?" if close else ""
