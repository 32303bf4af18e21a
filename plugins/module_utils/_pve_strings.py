# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Property strings of Proxmox VE (``virtio=BC:24:11:00:00:01,bridge=vmbr0,queues=4``), read and written without loss.

Proxmox VE replaces such a string as a whole: a sub-option that is left out is dropped, and a ``netN`` without its MAC
gets a new one. So a change is made on what is there: order, unknown keys and the way the default key was written stay.

The grammar is that of PVE::JSONSchema::parse_property_string: parts are separated by commas, a part is ``key=value`` or
the value of the default key alone, blank parts are skipped, no key comes twice, and there is no quoting.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

Value: TypeAlias = "str | int | bool | None"

NET_MODELS = (
    "e1000",
    "e1000-82540em",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "i82551",
    "i82557b",
    "i82559er",
    "ne2k_isa",
    "ne2k_pci",
    "pcnet",
    "rtl8139",
    "virtio",
    "vmxnet3",
)
"""Network models, each of which is a key of its own, too (``virtio=MAC`` is ``model=virtio,macaddr=MAC``)."""


class StringError(ValueError):
    """A text is no property string, or a value cannot be written in one; the text names the part."""


@dataclass(frozen=True)
class Alias:
    """Keys that stand for another key's value: ``<model>=<macaddr>`` for ``model=<model>,macaddr=<macaddr>``."""

    names: frozenset[str]
    key: str
    value: str


NET_ALIAS = Alias(frozenset(NET_MODELS), "model", "macaddr")

DEFAULT_KEYS: Mapping[str, str] = {
    "agent": "enabled",
    "amd-sev": "type",
    "boot": "legacy",
    "cpu": "cputype",
    "efidisk": "file",
    "hostpci": "host",
    "ide": "file",
    "intel-tdx": "type",
    "machine": "type",
    "memory": "current",
    "net": "model",
    "rng": "source",
    "sata": "file",
    "scsi": "file",
    "startup": "order",
    "tpmstate": "file",
    "unused": "file",
    "usb": "host",
    "vga": "type",
    "virtio": "file",
    "virtiofs": "dirid",
    "watchdog": "model",
}
"""Kind of a VM's option (its name without the index) to the sub-option whose key may be left out; from the API schema.

A kind that is not here, such as ``numaN``, ``ivshmem`` or ``ipconfig``, has none. ``startup`` has its own parser in
Proxmox VE and reads a bare number as the order; ``boot`` reads a bare word as the old ``legacy`` form.
"""


@dataclass(frozen=True)
class Part:
    """One part. ``bare``: the default key was left out."""

    key: str
    value: str
    bare: bool = False

    def render(self) -> str:
        return self.value if self.bare else f"{self.key}={self.value}"


@dataclass(frozen=True)
class PropertyString:
    """The parts in the order in which they were written."""

    parts: tuple[Part, ...] = ()
    default_key: str | None = None
    alias: Alias | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> str | None:
        """The value of a key, also of one that is written by its alias; None when it is not there."""
        return self.as_dict().get(key)

    def as_dict(self) -> dict[str, str]:
        """Key to value with aliases resolved, in the order of the text."""
        found: dict[str, str] = {}
        for part in self.parts:
            if self.alias and part.key in self.alias.names:
                found[self.alias.key] = part.key
                found[self.alias.value] = part.value
            else:
                found[part.key] = part.value
        return found

    def with_(self, changes: Mapping[str, Value] | None = None, /, **more: Value) -> PropertyString:
        """The same with some values changed in place or added at the end; None removes a key.

        Keys that are no Python names (``x-vga``) come in the mapping. Raises StringError for a value that cannot be
        written.
        """
        parts = list(self.parts)
        for key, value in {**(changes or {}), **more}.items():
            parts = self._set(parts, key, None if value is None else text_of(key, value))
        return replace(self, parts=tuple(parts))

    def without(self, *keys: str) -> PropertyString:
        return self.with_(dict.fromkeys(keys))

    def _set(self, parts: list[Part], key: str, value: str | None) -> list[Part]:
        alias = self.alias
        done, seen = [], False
        for part in parts:
            if alias and part.key in alias.names and key in (alias.key, alias.value):
                seen = True
                done += _aliased(alias, part, key, value)
            elif part.key == key:
                seen = True
                if value is not None:
                    done.append(replace(part, value=value))
            else:
                done.append(part)
        if not seen and value is not None:
            done.append(Part(key, value))
        return done

    def render(self) -> str:
        """The text for Proxmox VE; that of `parse` when nothing was changed (without blank parts)."""
        return ",".join(part.render() for part in self.parts)

    def __str__(self) -> str:
        return self.render()

    def same_as(self, other: PropertyString) -> bool:
        """Equal in meaning: order and the way of writing keys do not count."""
        return self.as_dict() == other.as_dict()


def _aliased(alias: Alias, part: Part, key: str, value: str | None) -> list[Part]:
    """What becomes of ``virtio=MAC`` when its model or its address changes."""
    if key == alias.value:
        return [Part(part.key, value)] if value is not None else [Part(alias.key, part.key)]
    if value is None:
        return [Part(alias.value, part.value)]
    if value in alias.names:
        return [Part(value, part.value)]
    return [Part(alias.key, value), Part(alias.value, part.value)]


def text_of(key: str, value: str | int | bool) -> str:
    """A value as Proxmox VE writes it: 1 and 0 for booleans. Raises StringError."""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if not text or "," in text or "\n" in text:
        raise StringError(f"{key}={text!r}: a value in a property string is not empty and has no comma or newline")
    return text


def parse(default_key: str | None, text: str, alias: Alias | None = None) -> PropertyString:
    """Read a property string. ``default_key``: the key whose name may be left out. Raises StringError."""
    parts: list[Part] = []
    seen: set[str] = set()
    for raw in text.split(","):
        if not raw.strip():
            continue
        found = re.fullmatch(r"([^=]+)=(.+)", raw, re.DOTALL)
        if found:
            part = Part(found[1].strip(), found[2])
        elif "=" in raw:
            raise StringError(f"{raw!r} in {text!r} lacks a key or a value")
        elif default_key is None:
            raise StringError(f"{raw!r} in {text!r} has no key, and this option has no default key")
        else:
            part = Part(default_key, raw, bare=True)
        if part.key in seen:
            raise StringError(f"{part.key} comes twice in {text!r}")
        seen.add(part.key)
        parts.append(part)
    return PropertyString(tuple(parts), default_key, alias)


def kind(option: str) -> str:
    """The kind of a VM's option: ``hostpci`` of ``hostpci12``, ``amd-sev`` of ``amd-sev``."""
    return re.sub(r"\d+$", "", option)


def parse_option(option: str, text: str) -> PropertyString:
    """The property string of a VM's option, by its name (``net0``, ``scsi1``, ``memory``). Raises StringError."""
    of = kind(option)
    return parse(DEFAULT_KEYS.get(of), text, NET_ALIAS if of == "net" else None)
