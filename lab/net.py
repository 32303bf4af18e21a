# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's network: a bridge in a network namespace of its own, joined to the host by one veth pair.

Why a namespace and not a bridge on the host: with br_netfilter loaded (Docker does that) bridged frames pass the
host's FORWARD chain, whose policy may be DROP, and the only ways out are a sysctl or a firewall rule of the host.
Inside an empty namespace neither the host's firewall nor its forwarding matters, and nothing of the host is changed.
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path

from . import host
from .config import Settings, State
from .errors import LabError, UsageError
from .show import say

BRIDGE = "br0"
_UPLINK = "uplink0"
# Where `up` looks for a free network, in this order; few sites use the upper end of 10/8.
_CANDIDATES = tuple(f"10.{second}.0.0/24" for second in (99, 213, 227, 241, 171, 187))


def _inside(where: Settings, *argv: str) -> str:
    return host.run("nsenter", f"--net={where.netns}", *argv)


def used_networks(interface: str) -> list[tuple[ipaddress.IPv4Network, str]]:
    """IPv4 networks the host has an address in or a route to; those of ``interface`` and default routes left out."""
    found = []
    for entry in json.loads(host.run("ip", "-json", "-4", "address")):
        for address in entry.get("addr_info", []):
            network = ipaddress.IPv4Network(f"{address['local']}/{address['prefixlen']}", strict=False)
            found.append((network, entry.get("ifname", "")))
    routes = json.loads(host.run("ip", "-json", "-4", "route", "show", "table", "all"))
    found += [
        (ipaddress.IPv4Network(route["dst"], strict=False), route.get("dev", ""))
        for route in routes
        if route["dst"] != "default" and route.get("type", "unicast") == "unicast"
    ]
    return [(network, device) for network, device in found if device != interface and network.prefixlen > 0]


def choose_subnet(wanted: str | None, used: list[tuple[ipaddress.IPv4Network, str]]) -> str:
    """The wanted network, or the first free candidate. Raises `UsageError` when it clashes with one the host uses."""
    if wanted is not None:
        try:
            network = ipaddress.IPv4Network(wanted)
        except ValueError as error:
            raise UsageError(f"--subnet {wanted}: {error}", "give an IPv4 network, for example 10.99.0.0/24") from error
        if network.prefixlen > 26 or network.prefixlen < 8:
            raise UsageError(f"--subnet {wanted}: the lab needs a network of /8 to /26")
        for other, device in used:
            if network.overlaps(other):
                raise UsageError(
                    f"--subnet {wanted} clashes with {other} on {device or 'this host'}",
                    "choose a network this host does not use: --subnet 10.X.0.0/24",
                )
        return str(network)
    for candidate in _CANDIDATES:
        if not any(ipaddress.IPv4Network(candidate).overlaps(other) for other, _ in used):
            return candidate
    raise UsageError(
        f"this host already uses every network the lab would try ({', '.join(_CANDIDATES)})",
        "choose one it does not use: --subnet 10.X.0.0/24, or ORGANISM_LAB_SUBNET",
    )


def present(where: Settings, state: State) -> bool:
    """True when namespace, bridge and the host's address are all there."""
    if not host.mounts_below(where.netns) or not Path(f"/sys/class/net/{where.name}").exists():
        return False
    addresses = json.loads(host.run("ip", "-json", "-4", "address", "show", "dev", where.name))
    links = json.loads(_inside(where, "ip", "-json", "link"))
    up = {link["ifname"] for link in links if "UP" in link.get("flags", [])}
    held = {address["local"] for entry in addresses for address in entry.get("addr_info", [])}
    return {BRIDGE, _UPLINK} <= up and state.host_address in held


def make(where: Settings, state: State) -> bool:
    """Build the network unless it is complete. Gives True when it was built. Call only while no node runs in it."""
    if present(where, state):
        return False
    remove(where)
    if Path(f"/sys/class/net/{where.name}").exists():
        raise LabError(
            f"the host has an interface {where.name} that the lab did not make",
            "choose another name: ORGANISM_LAB_NAME=orglab1 ./run lab up",
        )
    where.netns.touch()
    host.run("unshare", f"--net={where.netns}", "true")
    _inside(where, "ip", "link", "set", "lo", "up")
    _inside(where, "ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
    # Made inside and moved out, so that a cut in between leaves the host untouched.
    _inside(where, "ip", "link", "add", _UPLINK, "type", "veth", "peer", "name", where.name)
    _inside(where, "ip", "link", "set", _UPLINK, "master", BRIDGE, "up")
    _inside(where, "ip", "link", "set", BRIDGE, "up")
    _inside(where, "ip", "link", "set", where.name, "netns", str(os.getpid()))
    host.run("ip", "address", "add", f"{state.host_address}/{state.prefix}", "dev", where.name)
    host.run("ip", "link", "set", where.name, "up")
    say(f"network {state.subnet} on interface {where.name} (host: {state.host_address})")
    return True


def remove(where: Settings) -> None:
    """Take the network away; the host's end goes with the namespace's end."""
    if host.mounts_below(where.netns):
        links = json.loads(_inside(where, "ip", "-json", "link"))
        if any(link["ifname"] == _UPLINK for link in links):
            _inside(where, "ip", "link", "delete", _UPLINK)
        for point in host.mounts_below(where.netns):
            host.run("umount", point)
    where.netns.unlink(missing_ok=True)


def members(where: Settings) -> list[int]:
    """Processes that live in the lab's network namespace."""
    if not host.mounts_below(where.netns):
        return []
    wanted = where.netns.stat().st_ino
    found = []
    for process in host.processes():
        try:
            inode = Path(f"/proc/{process.pid}/ns/net").stat().st_ino
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or belongs to another user: the lab's own are root's
        if inode == wanted:
            found.append(process.pid)
    return found
