# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which ``hostpciN`` of a VM carries which PCI mapping: stable, and never one that somebody else put there; pure.

An index decides the PCIe port, and with it the device's address inside the guest. So a mapping that is there keeps its
index, a new one takes the lowest free index, and one of ours that is wished for no longer goes. Entries that are not
ours stay, but for a raw entry of the very device that a mapping stands for: Proxmox VE would refuse both together.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _pve_vm_keys as keys
from ._pve_strings import kind, parse_option
from ._pve_vm_check import PciMapping, overlap
from ._pve_vm_plan import Wish, WishRefused, addresses


def plan(
    config: Mapping[str, Any],
    wanted: Sequence[str],
    options: Mapping[str, str | None],
    owned_prefix: str,
    known: Mapping[str, PciMapping] | None,
) -> dict[str, Wish]:
    """Wishes for ``hostpciN``.

    ``wanted``: mappings in the order in which new ones get indices. ``options``: sub-options that each of them has.
    ``owned_prefix``: a mapping whose name begins so and is not wanted is taken off; empty for none. ``known``: the
    node's mappings, None where they could not be asked. Raises WishRefused.
    """
    _check(wanted, known)
    present = {
        option: parse_option(option, str(value))
        for option, value in config.items()
        if kind(option) == "hostpci" and value
    }
    places: dict[str, str] = {}
    wishes: dict[str, Wish] = {}
    for option in sorted(present, key=_index):
        name, host = present[option].get("mapping"), present[option].get("host")
        if name in wanted and name is not None:
            if name in places:
                wishes[option] = None  # the same mapping twice: the first one stays
            places.setdefault(name, option)
        elif name and owned_prefix and name.startswith(owned_prefix):
            wishes[option] = None
        elif host and known is not None and (same := _stands_for(host, wanted, known)) and same not in places:
            places[same] = option
    taken = {option for option in present if wishes.get(option, "") is not None}
    free = [f"hostpci{number}" for number in range(keys.MAX_HOSTPCI) if f"hostpci{number}" not in taken]
    missing = [name for name in wanted if name not in places]
    if len(missing) > len(free):
        raise WishRefused(
            f"{len(wanted)} mappings and {len(taken)} entries that are there already do not fit: "
            f"a VM has {keys.MAX_HOSTPCI} hostpci; take some off or use a second VM"
        )
    places.update(zip(missing, free, strict=False))
    for name, option in places.items():
        wishes[option] = {"mapping": name, **options}
    return wishes


def _check(wanted: Sequence[str], known: Mapping[str, PciMapping] | None) -> None:
    twice = sorted({name for name in wanted if list(wanted).count(name) > 1})
    if twice:
        raise WishRefused(f"mappings named twice: {', '.join(twice)}")
    if len(wanted) > keys.MAX_HOSTPCI:
        raise WishRefused(f"{len(wanted)} mappings, and a VM has {keys.MAX_HOSTPCI} hostpci: use a second VM")
    unknown = [name for name in wanted if known is not None and name not in known]
    if unknown:
        raise WishRefused(f"there is no PCI mapping {', '.join(unknown)}; create it with pve_pci_mapping")


def _stands_for(host: str, wanted: Sequence[str], known: Mapping[str, PciMapping]) -> str | None:
    """The wanted mapping whose device a raw entry assigns."""
    raw = addresses(host)
    for name in wanted:
        mapping = known.get(name)
        if mapping and any(overlap(one, other) for path in mapping.paths for one in path for other in raw):
            return name
    return None


def _index(option: str) -> int:
    return int(option[len("hostpci") :])
