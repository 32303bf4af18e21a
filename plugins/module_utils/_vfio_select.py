# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From what an operator names to all functions that have to go with it: companions of a card, and whole IOMMU groups.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import _iommu
from ._iommu import AddressError, Function

SELECTED, COMPANION, GROUP = "selected", "companion", "group"
"""Why a function is taken: named by the operator, a part of the same card, or in one IOMMU group with one of them."""

AUDIO, USB, SERIAL_BUS = "0403", "0c03", "0c80"
_CARD = (AUDIO, USB, SERIAL_BUS)
"""What a card has besides its graphics: sound of its connectors, a USB-C port and that port's controller (UCSI)."""

WORDS = {"display": "03", "vga": "0300", "3d": "0302"}
PHYSICAL, VIRTUAL, ANY = "physical", "virtual", "any"
FUNCTIONS = (PHYSICAL, VIRTUAL, ANY)
_ID = re.compile(r"([0-9a-f]{4})(?::([0-9a-f]{4}|\*))?")


class SelectError(ValueError):
    """What was named is not there, or is not clear; the text says what there is."""


@dataclass(frozen=True)
class Selector:
    """One entry of an operator's list; all that is given must hold. Empty: does not matter."""

    address: str = ""
    id: str = ""
    kind: str = ""
    driver: str = ""
    function: str = PHYSICAL

    def __str__(self) -> str:
        given = {"address": self.address, "id": self.id, "class": self.kind, "driver": self.driver}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value)

    def fits(self, it: Function, drivers: Mapping[str, str | None]) -> bool:
        """``drivers``: drivers of before we took a function, so that a second run finds the same."""
        if self.address:
            if self.address not in (it.address, it.slot):
                return False
        elif self.function != ANY and (self.function == VIRTUAL) != (it.physical is not None):
            return False
        elif len(self.id) < 9 and not self.kind and not it.is_display:
            return False  # "8086" or a driver for sound would be half of a host: by such words cards are meant
        if self.id and not it.id.startswith(self.id):
            return False
        if self.kind and not it.kind.startswith(self.kind):
            return False
        return not self.driver or self.driver in (it.driver, drivers.get(it.address))


def selector(entry: Mapping[str, Any]) -> Selector:
    """Raises SelectError."""
    given = {name: str(value).strip().lower() for name, value in entry.items() if value is not None}
    if not any(given.get(name) for name in ("address", "id", "class", "driver")):
        raise SelectError("an entry of devices needs one of address, id, class and driver")
    function = given.get("function") or PHYSICAL
    if function not in FUNCTIONS:
        raise SelectError(f"function {function!r} is none of {', '.join(FUNCTIONS)}")
    made = given.get("id", "").replace("0x", "")
    if made:
        match = _ID.fullmatch(made)
        if not match:
            raise SelectError(f"id {given['id']!r}: write vendor:device or a vendor alone, as 1002:67df or 1002")
        made = match[1] + (f":{match[2]}" if match[2] and match[2] != "*" else ":")
    kind = given.get("class", "").replace("0x", "")
    kind = WORDS.get(kind, kind)
    if kind and not re.fullmatch(r"[0-9a-f]{2,6}", kind):
        raise SelectError(f"class {given['class']!r}: write {', '.join(WORDS)} or a class in hexadecimal, as 0300")
    try:
        address = _iommu.normal(given["address"]) if given.get("address") else ""
    except AddressError as error:
        raise SelectError(str(error)) from error
    return Selector(address, made, kind, given.get("driver", ""), function)


def choose(
    found: Mapping[str, Function],
    selectors: Iterable[Selector],
    exclude: Iterable[str],
    drivers: Mapping[str, str | None],
) -> dict[str, str]:
    """Address to the reason why it is taken, in the order of addresses. Raises SelectError.

    ``exclude``: addresses or slots in full that stay with the host.
    """
    left = set(exclude)
    for address in sorted(left):
        if not any(address in (f.address, f.slot) for f in found.values()):
            raise SelectError(f"exclude: there is no PCI function {address}. {there(found)}")
    taken: dict[str, str] = {}
    for wish in selectors:
        matched = [f for f in found.values() if wish.fits(f, drivers) and not f.is_bridge]
        if not matched:
            raise SelectError(f"nothing on this host's PCI bus has {wish}. {there(found)}")
        taken |= {f.address: SELECTED for f in matched if not left & {f.address, f.slot}}
    for address in list(taken):
        for companion in companions(found, found[address]):
            if not left & {companion.address, companion.slot}:
                taken.setdefault(companion.address, COMPANION)
    for address in list(taken):
        for member in _iommu.members(found, found[address]):
            if not member.is_bridge:
                taken.setdefault(member.address, GROUP)
    kept = [found[address] for address in taken if left & {address, found[address].slot}]
    if kept:
        raise SelectError(
            f"{kept[0]} is excluded, and in one IOMMU group ({kept[0].group}) with a card that is wanted: the group "
            "can only go as a whole. Leave both out, or put one of them into another slot"
        )
    return dict(sorted(taken.items()))


def companions(found: Mapping[str, Function], of: Function) -> list[Function]:
    """The other functions of the same card: its sound, USB-C and UCSI, of the same maker in the same slot.

    A virtual function has none. Where the slot holds other things besides (a processor with graphics has its
    encryption engine and the board's USB controllers there), only the sound goes along.
    """
    if of.physical is not None or not of.is_display:
        return []
    beside = [f for f in found.values() if f.slot == of.slot and f.physical is None and f.address != of.address]
    foreign = any(not f.kind.startswith(("03", *_CARD)) or f.vendor != of.vendor for f in beside)
    kinds = (AUDIO,) if foreign else ("03", *_CARD)
    return [f for f in beside if f.kind.startswith(kinds)]


def there(found: Mapping[str, Function]) -> str:
    """A sentence on the display controllers that a host has."""
    cards = [str(f) for f in found.values() if f.is_display]
    return f"Display controllers here: {', '.join(cards) or 'none'}"
