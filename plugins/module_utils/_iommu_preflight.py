# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Can this host give its cards to virtual machines: firmware, kernel, groups, and each card with what would stop it.

Changes nothing and sends nothing.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import _iommu, _kernel_cmdline, _kernel_modules, _vfio_files, _vfio_needs
from ._iommu import VFIO, Function
from ._preflight import FAIL, OK, WARN, Record
from ._root import Root

FREE, SHARED, NEEDED = "own group", "shared group", "must stay"
"""Verdicts on a card: it can go alone; other things would have to go with it; the host needs something of its group."""

ACS_EXPLAINED = (
    "Functions share a group because nothing between them stops one from reaching the other's memory: the port above "
    "them has no Access Control Services. Another slot may have them (the processor's and the chipset's differ), or a "
    "newer firmware. The kernel parameter pcie_acs_override= only makes the kernel list smaller groups: a guest with "
    "the card could still read and write through its neighbour, be it the host's disk or network card. That is why "
    "nothing here ever sets it."
)
_TABLES = {"DMAR": "Intel VT-d", "IVRS": "AMD-Vi"}
_OFF = {"intel_iommu": "off", "amd_iommu": "off", "iommu": "off"}
_BLACKLISTED = re.compile(r"^\s*(?:blacklist|install)\s+(amdgpu|radeon|nouveau|nvidia\w*|i915|xe)\b", re.MULTILINE)
_IDS = re.compile(r"^\s*options\s+vfio[-_]pci\b.*\bids=", re.MULTILINE)
_VIRQFD = re.compile(r"^\s*vfio_virqfd\b", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A display controller and what its group means for it. ``beside``: members that are no part of the card."""

    address: str
    id: str
    model: str
    driver: str | None
    group: int | None
    beside: tuple[str, ...]
    reset: tuple[str, ...]
    console: bool
    verdict: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """``tokens``: kernel parameters that this processor's IOMMU wants (role gpu_passthrough sets them)."""

    records: tuple[Record, ...]
    cards: tuple[Card, ...]
    tokens: Mapping[str, str]
    groups: Mapping[int, tuple[Function, ...]]

    @property
    def ready(self) -> bool:
        return not any(record.status == FAIL for record in self.records)

    def as_dict(self) -> dict[str, Any]:
        """JSON types, for ``--json`` and the module's result."""
        return {
            "ready": self.ready,
            "active": bool(self.groups),
            "records": [asdict(record) for record in self.records],
            "cards": [
                {**asdict(card), "beside": list(card.beside), "reset": list(card.reset), "reasons": list(card.reasons)}
                for card in self.cards
            ],
            "groups": {str(number): [member.address for member in members] for number, members in self.groups.items()},
            "tokens": dict(self.tokens),
        }


def report(root: Root) -> Report:
    """Everything at once."""
    found = _iommu.functions(root)
    groups = _iommu.groups(found)
    vendor = _vendor(root)
    line = _kernel_cmdline.parse(root.read_or_none("/proc/cmdline") or "")
    records = (
        _virtualisation(root),
        _firmware(root, groups),
        _kernel(root, groups, line, vendor),
        _passthrough_mode(line),
        _remapping(root),
        _module(root),
        _override(line),
        *_leftovers(root),
    )
    return Report(records, cards(root, found), _tokens(vendor), groups)


def _vendor(root: Root) -> str:
    match = re.search(r"^vendor_id\s*:\s*(\S+)", root.read_or_none("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else ""


def _tokens(vendor: str) -> dict[str, str]:
    """AMD's IOMMU is on wherever the firmware has it; ``amd_iommu=on`` means nothing to the kernel."""
    return {"intel_iommu": "on", "iommu": "pt"} if vendor == "GenuineIntel" else {"iommu": "pt"}


# Host -----------------------------------------------------------------------------------------------------------------


def _virtualisation(root: Root) -> Record:
    flags = re.search(r"^flags\s*:\s*(.*)$", root.read_or_none("/proc/cpuinfo") or "", re.MULTILINE)
    found = {"vmx": "VT-x", "svm": "AMD-V"}
    have = [word for flag, word in found.items() if flags and flag in flags[1].split()]
    if have:
        return Record("virtualisation", OK, have[0])
    step = "switch VT-x or AMD-V (SVM) on in the firmware; inside of a virtual machine let its host pass it on"
    return Record("virtualisation", WARN, "the processor does not offer it", step)


def _firmware(root: Root, groups: Mapping[int, object]) -> Record:
    tables = [f"{word} ({name})" for name, word in _TABLES.items() if root.exists(f"/sys/firmware/acpi/tables/{name}")]
    if tables:
        return Record("firmware", OK, ", ".join(tables))
    if groups:  # a virtio IOMMU, or no right to look
        return Record("firmware", OK, "tells of no IOMMU, and the kernel has one")
    return Record("firmware", FAIL, "has no IOMMU switched on", "switch VT-d or AMD-Vi on in the firmware's setup")


def _kernel(root: Root, groups: Mapping[int, object], line: _kernel_cmdline.Cmdline, vendor: str) -> Record:
    units = root.listdir("/sys/class/iommu")
    if groups:
        return Record("kernel", OK, f"{len(groups)} groups ({', '.join(units) or 'unit unknown'})")
    off = [f"{key}={value}" for key, value in _OFF.items() if f"{key}={value}" in _effective(line, key)]
    if off:
        return Record(
            "kernel", FAIL, f"the IOMMU is switched off by {', '.join(off)}", "take that off the command line"
        )
    if vendor == "GenuineIntel" and "intel_iommu=on" not in _effective(line, "intel_iommu"):
        step = "set intel_iommu=on (role gpu_passthrough does) and reboot"
        return Record("kernel", FAIL, "has no groups, and intel_iommu=on is not set", step)
    return Record("kernel", FAIL, "has no groups", "look for DMAR or AMD-Vi in dmesg; the firmware may have it off")


def _effective(line: _kernel_cmdline.Cmdline, key: str) -> tuple[str, ...]:
    return _kernel_cmdline.effective(line.tokens, key)


def _passthrough_mode(line: _kernel_cmdline.Cmdline) -> Record:
    if "iommu=pt" in _effective(line, "iommu"):
        return Record("host devices", OK, "reach memory without translation (iommu=pt)")
    step = "iommu=pt saves the host's own devices the translation (role gpu_passthrough sets it)"
    return Record("host devices", OK, "are translated, too", step)


def _remapping(root: Root) -> Record:
    if re.search(r"\bIR-|\bAMD-Vi\b", root.read_or_none("/proc/interrupts") or ""):
        return Record("interrupts", OK, "are remapped")
    unsafe = (root.read_or_none("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") or "").strip()
    if unsafe == "Y":
        return Record("interrupts", WARN, "are not remapped, and allow_unsafe_interrupts lets guests send any", "")
    step = "switch interrupt remapping (x2APIC) on in the firmware; without it vfio refuses to give devices away"
    return Record("interrupts", WARN, "no sign of remapping", step)


def _module(root: Root) -> Record:
    try:
        there = _kernel_modules.exists(root, "vfio_pci")
    except OSError:
        there = False
    if there:
        return Record("vfio-pci", OK, "loaded" if _kernel_modules.loaded(root, "vfio_pci") else "can be loaded")
    return Record("vfio-pci", FAIL, "is no module of the running kernel", "boot a kernel of Debian or Proxmox VE")


def _override(line: _kernel_cmdline.Cmdline) -> Record:
    set_to = _effective(line, "pcie_acs_override")
    if not set_to:
        return Record("ACS override", OK, "not set: groups are what the hardware separates")
    step = "take it off, and see what the groups really are; never rely on it where guests are not trusted"
    return Record(
        "ACS override", WARN, f"{set_to[0]}: the kernel lists groups that the hardware does not separate", step
    )


def _leftovers(root: Root) -> list[Record]:
    """What recipes of before have left, and how it interferes."""
    found = []
    for path in root.glob("/etc/modprobe.d/*.conf"):
        text = root.read_or_none(path) or ""
        if _IDS.search(text) and path != _vfio_files.OPTIONS:
            detail = "gives every card of a kind to vfio-pci (ids=)"
            found.append(Record(path, WARN, detail, "remove the line when cards are bound by address"))
        names = sorted(set(_BLACKLISTED.findall(text)))
        if names:
            detail = f"keeps {', '.join(names)} away from all cards, the host's own as well"
            found.append(Record(path, WARN, detail, "remove the line when cards are bound by address"))
    for path in ("/etc/modules", *root.glob("/etc/modules-load.d/*.conf")):
        if _VIRQFD.search(root.read_or_none(path) or "") and path != _vfio_files.MODULES:
            detail = "names vfio_virqfd, which is a part of vfio since Linux 6.2"
            found.append(Record(path, WARN, detail, "remove the line: it only logs an error at each boot"))
    return found


# Cards ----------------------------------------------------------------------------------------------------------------


def cards(root: Root, found: Mapping[str, Function]) -> tuple[Card, ...]:
    """A verdict on each display controller."""
    needs = _vfio_needs.needs(root, found)
    names = _iommu.models(root, found.values())
    return tuple(_card(found, function, names, needs) for function in found.values() if function.is_display)


def _card(
    found: Mapping[str, Function], it: Function, names: Mapping[str, str], needs: Mapping[str, list[str]]
) -> Card:
    members = _iommu.members(found, it)
    beside = [member for member in members if member.slot != it.slot and not member.is_bridge]
    reasons = [
        f"{member.address} is {' and '.join(needs[member.address])}"
        for member in members
        if member.address in needs and (not member.is_bridge or member.kind.startswith("0601"))
    ]
    verdict = FREE
    if reasons and it.driver != VFIO:
        verdict = NEEDED
    elif beside:
        verdict = SHARED
        reasons = [f"{_iommu.listed(beside)} would go with it"]
    return Card(
        it.address,
        it.id,
        names.get(it.address, it.id),
        it.driver,
        it.group,
        tuple(member.address for member in beside),
        it.reset,
        it.boot_vga,
        verdict,
        tuple(reasons),
    )


def card_lines(cards: Iterable[Card]) -> list[str]:
    """A table for people, with its head."""
    head = ("card", "group", "driver", "reset", "verdict", "model")
    rows = [
        (
            card.address,
            "-" if card.group is None else str(card.group),
            card.driver or "-",
            ",".join(card.reset) or "-",
            card.verdict + (", console" if card.console else ""),
            card.model,
        )
        for card in cards
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def group_lines(groups: Mapping[int, tuple[Function, ...]]) -> list[str]:
    """Each group with its members, a line each."""
    return [f"{number:>4}  {member}" for number, members in groups.items() for member in members]
