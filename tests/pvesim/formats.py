# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The named formats of the API whose check is code in Proxmox VE (PVE::JSONSchema and its users)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable


class FormatError(Exception):
    """The text after ``invalid format -``."""


def _pattern(pattern: str, complaint: str, flags: int = 0) -> Callable[[str], None]:
    compiled = re.compile(pattern, flags)

    def check(value: str) -> None:
        if not compiled.fullmatch(value):
            raise FormatError(complaint.replace("%s", value) + "\n")

    return check


def parse_cpuset(text: str) -> set[int]:
    """As PVE::CpuSet reads it: numbers and ranges, no strides. Raises FormatError."""
    found: set[int] = set()
    for part in re.split(r"[,\s]+", text.strip()):
        matched = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not matched or (matched[2] and int(matched[2]) < int(matched[1])):
            raise FormatError(f"cannot parse cpuset '{text}'\n")
        found.update(range(int(matched[1]), int(matched[2] or matched[1]) + 1))
    return found


def _cpuset(value: str) -> None:
    parse_cpuset(value)


def parse_hotplug(value: str) -> set[str]:
    """The features of ``hotplug``; 1 is the default set (PVE::QemuServer, parse_hotplug_features)."""
    if value == "0":
        return set()
    if value == "1":
        return {"network", "disk", "usb"}
    found = set(re.split(r"[,;\s]+", value))
    if not found <= {"network", "disk", "cpu", "memory", "usb", "cloudinit"}:
        raise FormatError("unable to parse hotplug option\n")
    return found


def _hotplug(value: str) -> None:
    parse_hotplug(value)


def _ip(value: str) -> None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise FormatError("value does not look like a valid IP address\n") from None


def _address(value: str) -> None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not re.fullmatch(_DNS, value):
            raise FormatError(f"value does not look like a valid address: {value}\n") from None


def _ip_config(version: int, words: tuple[str, ...]) -> Callable[[str], None]:
    def check(value: str) -> None:
        if value in words:
            return
        try:
            if ipaddress.ip_interface(value).version != version or "/" not in value:
                raise ValueError
        except ValueError:
            raise FormatError(f"value does not look like a valid ipv{version} network configuration\n") from None

    return check


def _ipv(version: int) -> Callable[[str], None]:
    def check(value: str) -> None:
        try:
            if ipaddress.ip_address(value).version != version:
                raise ValueError
        except ValueError:
            raise FormatError(f"value does not look like a valid IPv{version} address\n") from None

    return check


def _anything(_value: str) -> None:
    """``string`` exists so that ``string-list`` can be said."""


_LABEL = r"([a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?)"
_DNS = rf"({_LABEL}\.)*{_LABEL}"
_VOLUME = r"[a-zA-Z][a-zA-Z0-9._-]*:.+"

FORMATS: dict[str, Callable[[str], None]] = {
    "string": _anything,
    "address": _address,
    "ip": _ip,
    "ipv4": _ipv(4),
    "ipv6": _ipv(6),
    "dns-name": _pattern(_DNS, "value does not look like a valid DNS name"),
    "disk-size": _pattern(r"\d+(\.\d+)?[KMGT]?", "value does not look like a valid disk size: %s"),
    "mac-addr": _pattern(
        r"[a-f0-9][02468ace](:[a-f0-9]{2}){5}", "value does not look like a valid unicast MAC address", re.I
    ),
    "pve-bridge-id": _pattern(r"[-_.\w\d]+", "invalid bridge ID '%s'"),
    "pve-configid": _pattern(r"[a-z][a-z0-9_-]+", "invalid configuration ID '%s'", re.I),
    "pve-cpuset": _cpuset,
    "pve-hotplug-features": _hotplug,
    "pve-ipv4-config": _ip_config(4, ("dhcp", "manual")),
    "pve-ipv6-config": _ip_config(6, ("auto", "dhcp", "manual")),
    "pve-node": _pattern(_LABEL, "value does not look like a valid node name"),
    "pve-poolid": _pattern(r"[\w.-]+(/[\w.-]+){0,2}", "value '%s' does not look like a valid pool ID"),
    "pve-priv": _pattern(r"[A-Z][A-Za-z]+(\.[A-Z][A-Za-z]+)+", "invalid privilege '%s'"),
    "pve-realm": _pattern(r"[A-Za-z][A-Za-z0-9.\-_]+", "value does not look like a valid realm"),
    "pve-roleid": _pattern(r"[A-Za-z0-9._-]+", "value '%s' does not look like a valid role name"),
    "pve-groupid": _pattern(r"[A-Za-z0-9.\-_]+", "value does not look like a valid group name"),
    "pve-startup-order": _pattern(r"((order=)?\d+|up=\d+|down=\d+|,)*", "unable to parse startup options"),
    "pve-storage-content": _pattern(
        "images|rootdir|vztmpl|iso|backup|snippets|import|none", "invalid content type '%s'"
    ),
    "pve-storage-id": _pattern(r"[a-z][a-z0-9\-_.]*[a-z0-9]", "storage ID '%s' contains illegal characters", re.I),
    "pve-storage-path": _pattern(r"/[^\n]*", "value does not look like a valid absolute path"),
    "pve-tag": _pattern(r"[a-z0-9_][a-z0-9_\-+.]*", "invalid characters in tag", re.I),
    "pve-tokenid": _pattern(r"[^\s:/]+@[A-Za-z][\w.\-]+![A-Za-z][A-Za-z0-9.\-_]+", "value '%s' is no token id"),
    "pve-userid": _pattern(r"[^\s:/]+@[A-Za-z][A-Za-z0-9.\-_]+", "value '%s' does not look like a valid user name"),
    "pve-vmid": _pattern(r"[1-9][0-9]{2,8}", "value does not look like a valid VM ID"),
    "pve-volume-id": _pattern(_VOLUME, "unable to parse volume ID '%s'"),
    "pve-volume-id-or-qm-path": _pattern(rf"none|cdrom|/.+|{_VOLUME}", "unable to parse volume ID '%s'"),
    "pve-volume-id-or-absolute-path": _pattern(rf"/.+|{_VOLUME}", "unable to parse volume ID '%s'"),
    "pve-qm-bootdev": _pattern(r"(ide|sata|scsi|virtio|net|hostpci|usb)\d+", "invalid boot device '%s'"),
    "pve-qm-bootdisk": _pattern(r"(ide|sata|scsi|virtio)\d+", "invalid boot disk '%s'"),
    "pve-vlan-id-or-range": _pattern(r"\d+(-\d+)?", "invalid VLAN configuration '%s'"),
    "urlencoded": _pattern(r"[-%a-zA-Z0-9_.!~*'()]*", "invalid urlencoded string: %s"),
}
"""Name to check. A format that is not here makes the request unknown (501) and never just passes."""
