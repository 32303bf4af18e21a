# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Network interfaces: which physical ports a bridge, bond, VLAN or macvlan ends at, and what queues a port has.

A bridge has no queues, no interrupts and no channels; steering happens at its ports. They are found by sysfs alone
(``lower_*`` links, and ``device`` for a real port), without a program of the network's own.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ._root import Root

NET = "/sys/class/net"
AUTO = "auto"
_RTF_UP = 0x1


class NetdevError(ValueError):
    """No such interface, or none that ends at a port; the text names it and the way out."""


def ports(root: Root, interfaces: Iterable[str]) -> list[str]:
    """The physical ports behind interfaces, sorted, each once; ``auto`` is the default route's. Raises NetdevError."""
    found: set[str] = set()
    for given in interfaces:
        for name in default_route(root) if given == AUTO else [given]:
            found.update(_ports_of(root, name, given))
    return sorted(found)


def named(root: Root, interfaces: Iterable[str]) -> tuple[str, ...]:
    """Interfaces with ``auto`` replaced by the name that it stands for now, each once. Raises NetdevError."""
    found = [name for given in interfaces for name in (default_route(root) if given == AUTO else [given])]
    return tuple(dict.fromkeys(found))


def _ports_of(root: Root, name: str, given: str) -> set[str]:
    if not exists(root, name):
        there = ", ".join(n for n in names(root) if n != "lo") or "none"
        raise NetdevError(f"no network interface {name!r} on this host (there are {there})")
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        now = waiting.pop()
        if now in seen:
            continue
        seen.add(now)
        if is_port(root, now):
            found.add(now)
        else:
            waiting += lowers(root, now)
    if not found:
        below = ", ".join(sorted(seen - {name})) or "nothing"
        wish = "the default route's interface" if given == AUTO else "it"
        raise NetdevError(
            f"{name} ends at no physical port (below it: {below}); name the port itself if {wish} is not built on one "
            "that sysfs knows, as with Open vSwitch"
        )
    return found


def names(root: Root) -> list[str]:
    return [name for name in root.listdir(NET) if root.exists(f"{NET}/{name}/ifindex")]


def exists(root: Root, name: str) -> bool:
    return bool(re.fullmatch(r"[^/\s]{1,15}", name)) and name not in (".", "..") and root.exists(f"{NET}/{name}")


def is_port(root: Root, name: str) -> bool:
    """Whether hardware (or what a hypervisor shows as such) is behind it; taps and veths have no ``device``."""
    return root.exists(f"{NET}/{name}/device")


def lowers(root: Root, name: str) -> list[str]:
    """The interfaces that this one is built on."""
    return [entry.removeprefix("lower_") for entry in root.listdir(f"{NET}/{name}") if entry.startswith("lower_")]


def default_route(root: Root) -> list[str]:
    """The interface of the best default route: IPv4's lowest metric, else IPv6's. Raises NetdevError."""
    routes = []
    for line in (root.read_or_none("/proc/net/route") or "").splitlines()[1:]:
        words = line.split()
        if len(words) >= 8 and words[1] == words[7] == "00000000" and int(words[3], 16) & _RTF_UP:
            routes.append((int(words[6]), words[0]))
    if not routes:
        for line in (root.read_or_none("/proc/net/ipv6_route") or "").splitlines():
            words = line.split()
            up = len(words) >= 10 and int(words[8], 16) & _RTF_UP
            if up and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
                routes.append((int(words[5], 16), words[9]))
    if not routes:
        raise NetdevError("this host has no default route, so 'auto' finds no interface; name one")
    return [min(routes)[1]]


def address(root: Root, name: str) -> str:
    """The PCI address behind a port (a virtio port's parent included); empty when it has none."""
    here = root.path(f"{NET}/{name}/device").resolve()
    for place in (here, *here.parents):
        if re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", place.name):
            return place.name
    return ""


def queues(root: Root, name: str, kind: str) -> list[str]:
    """``rx-0``, ``rx-1``, ... or ``tx-*``, in the order of their numbers."""
    found = [entry for entry in root.listdir(f"{NET}/{name}/queues") if re.fullmatch(rf"{kind}-\d+", entry)]
    return sorted(found, key=lambda entry: int(entry[3:]))
