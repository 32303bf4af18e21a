# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which devices a VM takes, and whether they are still to be had: GPUs by their physical function, not by their text.

A device is known by *keys*; two VMs exclude each other when they share one. A GPU's key is its slot (``0000:01:00``),
so that its sound function goes with it; a virtual function has the key of its physical one; other devices have that of
their function (``0000:02:00.1``). Devices of one IOMMU group share the key ``iommu:7`` (S4-D09). Addresses are
compared in full (S4-D10).

A PCI mapping with several entries for a node is a choice: Proxmox VE takes the first entry that is free
(PVE::QemuServer::PCI, choose_hostpci_devices). A VM may start when the choices of all VMs that are starting can be met
together.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import _pve_strings
from ._gpu import DISPLAY_CLASSES, PCI_DEVICES
from ._root import Root

_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.([0-7]))?")


class DeviceError(ValueError):
    """A device of a VM cannot be understood; the text names it."""


@dataclass(frozen=True)
class Device:
    """An option ``hostpciN``. ``alternatives``: sets of keys, of which the VM gets one. ``label``: as it is written."""

    name: str
    alternatives: tuple[frozenset[str], ...]
    label: str = ""


@dataclass(frozen=True)
class Holding:
    """What an active VM has. ``held``: known keys, None: unknown. ``settled``: it has chosen, even if we can't see
    what."""

    owner: int
    devices: tuple[Device, ...] = ()
    held: frozenset[str] | None = None
    settled: bool = True


@dataclass(frozen=True)
class Clash:
    """A device that cannot be had. ``owner`` of ``key``: a VM, or None when only too many want the same choice."""

    device: str
    label: str
    key: str = ""
    owner: int | None = None


OWN = -1
"""Owner in a `Clash` with another device of the same VM."""


@dataclass
class Fitting:
    """``chosen``: option to the keys that it will have, as far as that can be foreseen."""

    clashes: list[Clash] = field(default_factory=list)
    chosen: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset[str]().union(*self.chosen.values())


def fit(wanted: Sequence[Device], others: Iterable[Holding]) -> Fitting:
    """Can a VM have its devices beside the others?"""
    taken: dict[str, int] = {}
    choosing: list[tuple[str, Device]] = []
    for holding in others:
        if holding.held is not None:
            taken.update(dict.fromkeys(holding.held, holding.owner))
            continue
        for device in holding.devices:
            if holding.settled or len(device.alternatives) < 2:
                taken.update(dict.fromkeys(frozenset[str]().union(*device.alternatives), holding.owner))
            else:
                choosing.append((f"{holding.owner} {device.name}", device))
    fitting = Fitting()
    mine: set[str] = set()
    for device in (each for each in wanted if len(each.alternatives) == 1):
        keys = device.alternatives[0]
        clash = next(((key, taken[key]) for key in sorted(keys) if key in taken), None)
        twice = next((key for key in sorted(_proper(keys)) if key in mine), None)
        if clash is not None:
            fitting.clashes.append(Clash(device.name, device.label, *clash))
        elif twice is not None:
            fitting.clashes.append(Clash(device.name, device.label, twice, OWN))
        else:
            mine |= keys
            fitting.chosen[device.name] = keys
    choices = _Choices()
    for name, device in choosing:
        choices.add(name, _free(device, {*taken, *mine}))  # one that finds nothing will fail by itself
    for device in (each for each in wanted if len(each.alternatives) > 1):
        if not choices.add(device.name, _free(device, {*taken, *_proper(mine)})):
            fitting.clashes.append(_too_many(device, taken))
    for device in wanted:
        if (found := choices.of(device.name)) is not None:
            fitting.chosen[device.name] = found
    return fitting


def _proper(keys: Iterable[str]) -> frozenset[str]:
    """Without IOMMU groups: devices of one VM may share them."""
    return frozenset(key for key in keys if not key.startswith("iommu:"))


def _free(device: Device, taken: set[str]) -> list[frozenset[str]]:
    return [keys for keys in device.alternatives if not keys & taken]


def _too_many(device: Device, taken: Mapping[str, int]) -> Clash:
    """All alternatives of a device are gone; its owner where it is one."""
    owners = {taken[key]: key for keys in device.alternatives for key in sorted(keys, reverse=True) if key in taken}
    if len(owners) == 1 and all(keys & taken.keys() for keys in device.alternatives):
        owner, key = next(iter(owners.items()))
        return Clash(device.name, device.label, key, owner)
    return Clash(device.name, device.label)


class _Choices:
    """Gives each chooser one of its alternatives, no key twice; earlier choosers may be moved, never dropped.

    Kuhn's algorithm over *units*: alternatives that overlap are one unit, so that a choice never touches another's.
    """

    def __init__(self) -> None:
        self._wants: dict[str, tuple[frozenset[str], ...]] = {}
        self._given: dict[frozenset[str], str] = {}  # unit to chooser

    def add(self, name: str, alternatives: Sequence[frozenset[str]]) -> bool:
        """False when there is no way to serve it beside the others."""
        self._wants[name] = tuple(alternatives)
        self._place()
        if name in self._given.values():
            return True
        del self._wants[name]
        self._place()
        return False

    def of(self, name: str) -> frozenset[str] | None:
        """The alternative that a chooser is foreseen to get."""
        for unit, holder in self._given.items():
            if holder == name:
                return next(keys for keys in self._wants[name] if _proper(keys) <= unit)
        return None

    def _place(self) -> None:
        self._given = {}
        units = self._units()
        for name in self._wants:  # in their order: whom an earlier round has served is served again
            self._seat(name, units, set())

    def _units(self) -> dict[frozenset[str], frozenset[str]]:
        """Alternative to its unit: the union of all that overlap it, directly or by others."""
        alternatives = {keys for wants in self._wants.values() for keys in wants}
        units: list[frozenset[str]] = []
        for keys in alternatives:
            touching = [unit for unit in units if unit & _proper(keys)]
            units = [unit for unit in units if unit not in touching]
            units.append(_proper(keys).union(*touching))
        return {keys: unit for keys in alternatives for unit in units if _proper(keys) <= unit}

    def _seat(self, name: str, units: Mapping[frozenset[str], frozenset[str]], seen: set[frozenset[str]]) -> bool:
        for keys in self._wants[name]:
            unit = units[keys]
            if unit in seen:
                continue
            seen.add(unit)
            holder = self._given.get(unit)
            if holder is None or self._seat(holder, units, seen):
                self._given[unit] = name
                return True
        return False


def told(key: str) -> str:
    """A key for people."""
    return f"IOMMU group {key.partition(':')[2]}" if key.startswith("iommu:") else f"device {key}"


# From Proxmox VE's texts to keys --------------------------------------------------------------------------------------


def normal(address: str) -> tuple[str, str | None]:
    """Slot in full, lower case, and the function (None: all of them). Raises DeviceError."""
    found = _ADDRESS.fullmatch(address.strip())
    if found is None:
        raise DeviceError(f"{address!r} is no PCI address like 0000:01:00.0 or 01:00")
    domain, bus, slot, function = found.groups()
    return f"{(domain or '0000').lower()}:{bus.lower()}:{slot.lower()}", function


def keys_of(root: Root, address: str, *, share_functions: bool = False) -> frozenset[str]:
    """Keys of a device. A device that sysfs does not tell of counts as a GPU: its whole slot. Raises DeviceError.

    ``share_functions``: virtual functions of one GPU may go to different VMs.
    """
    slot, function = normal(address)
    functions = [f"{slot}.{function}"] if function is not None else root_functions(root, slot)
    keys: set[str] = set()
    for each in functions or [f"{slot}.0"]:
        device = f"{PCI_DEVICES}/{each}"
        physical = root.link_name(f"{device}/physfn")
        if physical is not None and not share_functions:
            keys |= keys_of(root, physical)
            each = physical
        elif physical is not None:
            keys.add(each)
        else:
            keys.add(_own_key(root, each))
            keys |= {_link for number in _virtual(root, device) if (_link := root.link_name(f"{device}/{number}"))}
        group = root.link_name(f"{device}/iommu_group")
        if group is not None:
            keys.add(f"iommu:{group}")
    return frozenset(keys)


def _virtual(root: Root, device: str) -> list[str]:
    return [name for name in root.listdir(device) if name.startswith("virtfn")]


def root_functions(root: Root, slot: str) -> list[str]:
    """Functions of a slot that this machine has."""
    return [f"{slot}.{number}" for number in range(8) if root.exists(f"{PCI_DEVICES}/{slot}.{number}")]


def _own_key(root: Root, function: str) -> str:
    """The slot for a GPU, and for what sysfs does not tell of; else the function."""
    slot = function.partition(".")[0]
    classes = [root.read_or_none(f"{PCI_DEVICES}/{each}/class") for each in root_functions(root, slot)]
    known = [text.strip()[:6] for text in classes if text]
    return function if known and not set(known) & set(DISPLAY_CLASSES) else slot


Mappings = Mapping[str, tuple[tuple[str, ...], ...]]
"""Name of a mapping to its alternatives on this node: each a tuple of addresses that go together."""


def parse_mappings(text: str, node: str) -> Mappings:
    found: dict[str, list[tuple[str, ...]]] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not line[0].isspace():
            name = line.strip().partition(":")[0] if ":" not in line.strip()[:-1] else line.partition(":")[2].strip()
            name = name or line.strip().rstrip(":")
            found[name] = []
            continue
        key, _space, value = line.strip().partition(" ")
        if key == "map" and name:
            parts = _pve_strings.parse(None, value.strip())
            if parts.get("node") == node and parts.get("path"):
                found[name].append(tuple((parts.get("path") or "").split(";")))
    return {each: tuple(entries) for each, entries in found.items()}


def device_of(root: Root, name: str, text: str, mappings: Mappings, *, share_functions: bool = False) -> Device:
    """The device of an option ``hostpciN``. Raises DeviceError, StringError."""
    parts = _pve_strings.parse("host", text)
    mapping, host = parts.get("mapping"), parts.get("host")
    if mapping is not None:
        if not mappings.get(mapping):
            raise DeviceError(f"{name}: the PCI mapping {mapping} has no device on this node; see Datacenter, Mappings")
        alternatives: Sequence[tuple[str, ...]] = mappings[mapping]
    elif host:
        alternatives = [tuple(host.split(";"))]
    else:
        raise DeviceError(f"{name}: {text!r} names neither a device nor a mapping")
    shared = share_functions and parts.get("mdev") is not None
    keys = [] if shared else [_together(root, each, share_functions) for each in alternatives]
    return Device(name, tuple(dict.fromkeys(keys)), f"mapping {mapping}" if mapping else str(host))


def _together(root: Root, addresses: Iterable[str], share_functions: bool) -> frozenset[str]:
    return frozenset[str]().union(*(keys_of(root, each, share_functions=share_functions) for each in addresses))


def addresses_in(words: Sequence[str]) -> Iterator[str]:
    """PCI addresses that a QEMU was started with, from its command line."""
    for word in words:
        if "vfio-pci" in word:
            for found in re.finditer(r"(?:\bhost\"?\s*[=:]\s*\"?|/devices/)([0-9a-fA-F:]+\.[0-7])", word):
                yield found[1]
