# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The map from logical GPU ids to devices, ``/etc/organism/gpus.json``: an id once given stays with its card.

A card that vanishes keeps its id reserved (``present`` is false), so that no other card ever inherits its name, queue
and cache; it gets it back when it returns, even in another slot if it has a UUID.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ._bus import IDENTIFIER, is_identifier
from ._difference import Difference
from ._gpu import Gpu
from ._root import Root

PATH = "/etc/organism/gpus.json"
VERSION = 1
SIMULATED_MODEL = "Simulated GPU (no hardware)"
SIMULATED_VRAM_MB = 8192
BACKENDS = ("amdgpu", "nvml", "intel", "simulated")


class MapError(ValueError):
    """A map that must not be used; the text names file, entry and reason."""


@dataclass(frozen=True)
class Entry:
    """One line of the map."""

    id: str
    backend: str
    address: str
    """PCI address, or ``sim:<n>``."""
    uuid: str | None = None
    model: str = ""
    vram_mb: int = 0
    present: bool = True


def parse_map(text: str, where: str = PATH) -> list[Entry]:
    """Raises MapError."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise MapError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("gpus"), list):
        raise MapError(f'{where} is not a GPU map of version {VERSION} ({{"version": {VERSION}, "gpus": [...]}})')
    entries = [_entry(item, f"{where}: gpus[{position}]") for position, item in enumerate(data["gpus"])]
    _unique([entry.id for entry in entries], where, "id")
    return entries


def _entry(item: Any, where: str) -> Entry:
    kinds = {"id": str, "backend": str, "address": str, "uuid": str, "model": str, "vram_mb": int, "present": bool}
    if not isinstance(item, dict):
        raise MapError(f"{where} must be an object")
    unknown = sorted(set(item) - set(kinds))
    if unknown:
        raise MapError(f"{where} has unknown keys: {', '.join(unknown)}")
    for key, kind in kinds.items():
        value = item.get(key)
        if value is None and key not in ("id", "backend", "address"):
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise MapError(f"{where}: {key} must be of type {kind.__name__}, not {value!r}")
    if not is_identifier(item["id"]):
        raise MapError(f"{where}: id {item['id']!r} must match {IDENTIFIER.pattern}")
    if item["backend"] not in BACKENDS:
        raise MapError(f"{where}: backend {item['backend']!r} is none of {', '.join(BACKENDS)}")
    return Entry(**{key: value for key, value in item.items() if value is not None})


def _unique(values: list[str], where: str, what: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise MapError(f"{where}: {what} used twice: {', '.join(twice)}")


def load_map(root: Root, path: str = PATH) -> list[Entry]:
    """Raises MapError, or OSError when there is no map."""
    return parse_map(root.read(path), path)


def render_map(entries: Iterable[Entry]) -> str:
    return json.dumps({"version": VERSION, "gpus": [asdict(entry) for entry in entries]}, indent=2) + "\n"


def find(entries: list[Entry], gpu: str) -> Entry:
    """Raises MapError that says which ids there are."""
    for entry in entries:
        if entry.id == gpu:
            return entry
    raise MapError(f"the map has no GPU {gpu} (it has {', '.join(entry.id for entry in entries) or 'none'})")


@dataclass(frozen=True)
class MapPlan:
    """What the map should be, how it differs, and which cards were left out for which reason."""

    entries: list[Entry]
    difference: Difference
    ignored: dict[str, str]


def simulated_devices(count: int) -> list[Entry]:
    """Devices without ids yet."""
    return [
        Entry("", "simulated", f"sim:{number}", model=SIMULATED_MODEL, vram_mb=SIMULATED_VRAM_MB)
        for number in range(count)
    ]


def plan_map(
    known: list[Entry],
    found: list[Gpu],
    *,
    prefix: str = "gpu",
    simulated: int = 0,
    exclude: Iterable[str] = (),
    vendors: Iterable[str] = ("amd", "nvidia"),
) -> MapPlan:
    """The wanted map for the cards that were found.

    ``prefix`` begins new ids (``<prefix><n>``, the lowest free number), ``exclude`` holds PCI addresses or UUIDs that
    belong to somebody else (the console's card), ``simulated`` is how many devices without hardware to add. Raises
    ValueError for a prefix that makes no ids.
    """
    if not is_identifier(f"{prefix}0"):
        raise ValueError(f"prefix {prefix!r} must match {IDENTIFIER.pattern} and leave room for a number")
    devices, ignored = _usable(found, set(exclude), set(vendors))
    devices += simulated_devices(simulated)
    entries: list[Entry | None] = [None] * len(known)
    new: list[Entry] = []
    left = list(devices)
    # first by what never changes, then by the slot: a swapped card must not take the other's id
    for match in (_same_uuid, _same_place):
        for position, entry in enumerate(known):
            if entries[position] is None:
                device = next((device for device in left if match(entry, device)), None)
                if device is not None:
                    left.remove(device)
                    entries[position] = replace(_fresh(entry, device), id=entry.id, present=True)
    taken = {entry.id for entry in known}
    for device in left:
        new.append(replace(device, id=_free_id(prefix, taken)))
        taken.add(new[-1].id)
    kept = [entry or replace(known[position], present=False) for position, entry in enumerate(entries)]
    wanted = [*kept, *new]
    difference = Difference()
    before = {entry.id: entry for entry in known}
    for entry in wanted:
        old = before.get(entry.id)
        difference.add(f"GPU {entry.id}", asdict(old) if old else None, asdict(entry))
    return MapPlan(wanted, difference, ignored)


def _usable(found: list[Gpu], exclude: set[str], vendors: set[str]) -> tuple[list[Entry], dict[str, str]]:
    devices: list[Entry] = []
    ignored: dict[str, str] = {}
    for gpu in found:
        if gpu.address in exclude or (gpu.uuid and gpu.uuid in exclude):
            ignored[gpu.uuid or gpu.address] = "excluded by the inventory"
        elif gpu.vendor not in vendors:
            ignored[gpu.address] = f"cards by {gpu.vendor} are not wanted"
        elif gpu.unusable:
            ignored[gpu.address] = gpu.unusable
        else:
            devices.append(Entry("", gpu.backend, gpu.address, uuid=gpu.uuid, model=gpu.model, vram_mb=gpu.vram_mb))
    return devices, ignored


def _same_uuid(known: Entry, device: Entry) -> bool:
    return known.uuid is not None and known.uuid == device.uuid


def _same_place(known: Entry, device: Entry) -> bool:
    """The same slot, unless both have a UUID and it differs: then another card was put there."""
    same = known.address == device.address and known.backend == device.backend
    return same and (known.uuid is None or device.uuid is None)


def _fresh(known: Entry, device: Entry) -> Entry:
    """What the device says now, without losing what it only said earlier (its driver may not be ready yet)."""
    return replace(
        device,
        uuid=device.uuid or known.uuid,
        vram_mb=device.vram_mb or known.vram_mb,
        model=device.model
        if not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{4}", device.model)
        else known.model or device.model,
    )


def _free_id(prefix: str, taken: set[str]) -> str:
    number = 0
    while f"{prefix}{number}" in taken:
        number += 1
    return f"{prefix}{number}"
