# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a line of the map ``/etc/organism/gpus.json`` to the device behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from organism.core._gpu import discover
from organism.core._gpu_map import Entry, MapError, find, load_map
from organism.core._root import Root
from organism.worker.devices.base import Backend, DeviceError
from organism.worker.devices.nvml import NvmlGpu, load_nvml
from organism.worker.devices.simulated import VRAM_MB, SimulatedGpu
from organism.worker.devices.sysfs import SysfsGpu


def open_device(root: Root, map_path: str, gpu: str, nvml: Callable[[], Any] = load_nvml) -> Backend:
    """The device that the map has under an id. Raises DeviceError that says what is missing."""
    try:
        entry = find(load_map(root, map_path), gpu)
    except (MapError, OSError) as error:
        raise DeviceError(f"{error}; the module organism.proxmox.gpu_map writes {map_path}") from error
    if entry.backend == "simulated":
        return SimulatedGpu(entry.address, vram_mb=entry.vram_mb or VRAM_MB)
    if entry.backend == "nvml":
        return NvmlGpu(
            nvml(), address=entry.address, uuid=entry.uuid, model=entry.model, vram_mb=entry.vram_mb
        )  # fmt: skip
    return SysfsGpu(root, _card(root, entry))


def _card(root: Root, entry: Entry) -> Any:
    """The card with the map's UUID, wherever it is plugged in now; without a UUID the one at its address."""
    cards = discover(root)
    for card in cards:
        if entry.uuid is not None and card.uuid == entry.uuid:
            return _usable(card, entry)
    for card in cards:
        if card.address == entry.address and (entry.uuid is None or card.uuid is None):
            return _usable(card, entry)
    raise DeviceError(
        f"{entry.id} is {entry.model} at {entry.address}, but no such card is there now "
        f"(this machine has {', '.join(card.address for card in cards) or 'none'}); run the playbook's level 7 again"
    )


def _usable(card: Any, entry: Entry) -> Any:
    if card.unusable:
        raise DeviceError(f"{entry.id} at {card.address} cannot be used: {card.unusable}")
    return card
