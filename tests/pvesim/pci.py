# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PCI mappings and reservations (PVE::Mapping::PCI, PVE::QemuServer::PCI)."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ApiError, Died
from .hardware import Host

MAX_HOSTPCI = 16


def fields(text: str) -> dict[str, str]:
    """The parts of a property string that has been checked already; a part without key is ``_``."""
    found = {}
    for part in text.split(","):
        if part.strip():
            key, equals, value = part.partition("=")
            found[key if equals else "_"] = value if equals else key
    return found


def replace_file(path: Path, text: str) -> None:
    """In one step, as PVE::Tools::file_set_contents does."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def hostpci(text: str) -> dict[str, str]:
    found = fields(text)
    if "_" in found:
        found["host"] = found.pop("_")
    return found


@dataclass
class PciMapping:
    id: str
    maps: list[str]
    description: str | None = None
    mdev: bool = False
    live_migration: bool = False

    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = {"id": self.id, "map": list(self.maps)}
        if self.description is not None:
            found["description"] = self.description
        if self.mdev:
            found["mdev"] = 1
        if self.live_migration:
            found["live-migration-capable"] = 1
        return found


class Mappings:
    """``/etc/pve/mapping/pci.cfg``."""

    def __init__(self, file: Path) -> None:
        self.by_id: dict[str, PciMapping] = {}
        self.lock = threading.Lock()
        self.file = file

    def write(self) -> None:
        """The file as PVE::SectionConfig writes it, whose sections here have no type in front."""
        text = ""
        for name, each in sorted(self.by_id.items()):
            text += f"{name}\n"
            for key, value in each.shown().items():
                if key != "id":
                    text += "".join(f"\t{key} {one}\n" for one in (value if isinstance(value, list) else [value]))
            text += "\n"
        replace_file(self.file, text)

    @property
    def digest(self) -> str:
        text = json.dumps([each.shown() for _id, each in sorted(self.by_id.items())], sort_keys=True)
        return hashlib.sha1(text.encode()).hexdigest()

    def check_digest(self, digest: str | None) -> None:
        if digest and digest != self.digest:
            raise Died("detected modified configuration - file changed by other user? Try again.")

    def find(self, name: str) -> PciMapping:
        if name not in self.by_id:
            raise Died(f"mapping '{name}' not found")
        return self.by_id[name]


def check_entry(host: Host, name: str, entry: Mapping[str, str], mdev: bool | None) -> None:
    """PVE's assert_valid: identity, group and subsystem of each path are those of the hardware. Raises Died."""
    for index, path in enumerate(entry.get("path", "").split(";")):
        address = path if "." in path else f"{path}.0"
        device = host.devices.get(address)
        if device is None:
            raise Died(f"pci device '{address}' not found")
        expected: dict[str, str | None] = {
            "id": f"{device.vendor}:{device.device}",
            "iommugroup": str(-1 if device.group is None else device.group),
            "subsystem-id": ":".join(device.subsystem) if device.subsystem else None,
        }
        configured: dict[str, str | None] = {key: entry.get(key) for key in expected}
        if mdev is not None:
            expected["mdev"], configured["mdev"] = str(int(device.mdev)), str(int(mdev))
        for prop in sorted(expected):
            want, have = expected[prop], configured[prop]
            if (prop == "iommugroup" and index > 0) or (want is None and have is None):
                continue
            if have is None:
                raise Died(f"missing expected property '{prop}' for device '{address}'")
            if want is None:
                raise Died(f"unexpected property '{prop}' configured for device '{address}'")
            if want.replace("0x", "") != have.replace("0x", ""):
                raise Died(f"'{prop}' does not match for '{name}' ({want} != {have})")


def alternatives(host: Host, mappings: Mappings, node: str, text: str) -> list[list[str]]:
    """The sets of addresses of which a ``hostpciN`` takes the first free one. Raises Died."""
    device = hostpci(text)
    named, raw = device.get("mapping"), device.get("host")
    if named and raw:
        raise Died("Cannot set both 'host' and 'mapping'.")
    if not named and not raw:
        raise Died("Either 'host' or 'mapping' must be set.")
    choices: list[list[str]] = []
    if named:
        mapping = mappings.by_id.get(named)
        entries = [fields(each) for each in mapping.maps] if mapping else []
        entries = [entry for entry in entries if entry.get("node") == node]
        if mapping is None or not entries:
            raise Died(f"PCI device mapping not found for '{named}'")
        for entry in entries:
            try:
                check_entry(host, named, entry, mapping.mdev)
            except ApiError as error:
                raise Died(f"PCI device mapping invalid (hardware probably changed): {error.message}\n") from None
            choices.append(entry["path"].split(";"))
    else:
        choices.append(str(raw).split(";"))
    found = []
    for choice in choices:
        ids: list[str] = []
        for path in choice:
            functions = host.functions(path)
            if not functions:
                raise Died(f"no PCI device found for '{path}'")
            ids += [each.address for each in functions]
        found.append(ids)
    return found


@dataclass
class Reservation:
    vmid: int
    pid: int | None = None
    until: float | None = None


@dataclass
class Reservations:
    """``/run/qemu-server/pci-id-reservations``. ``running_pid``: of a VM, None when it does not run."""

    running_pid: Callable[[int], int | None]
    file: Path
    by_address: dict[str, Reservation] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def reserve(self, addresses: list[str], vmid: int, *, timeout: float | None = None, pid: int | None = None) -> None:
        """All or, at the first that is taken, none. Raises Died."""
        with self.lock:
            wanted: dict[str, Reservation] = {}
            for address in addresses:
                held = self.by_address.get(address)
                if held is not None and held.vmid != vmid:
                    if held.until is not None and held.until > time.time():
                        raise Died(f"PCI device '{address}' is currently reserved for use by VMID '{held.vmid}'")
                    if held.pid is not None and self.running_pid(held.vmid) == held.pid:
                        raise Died(f"PCI device '{address}' already in use by VMID '{held.vmid}'")
                until = time.time() + timeout + 5 if timeout is not None and pid is None else None
                wanted[address] = Reservation(vmid, pid, until)
            self.by_address.update(wanted)
            self._write()

    def release(self, vmid: int) -> None:
        with self.lock:
            self.by_address = {address: held for address, held in self.by_address.items() if held.vmid != vmid}
            self._write()

    def _write(self) -> None:
        text = ""
        for address, held in sorted(self.by_address.items()):
            told = f"pid:{held.pid}" if held.pid is not None else f"time:{int(held.until or 0)}"
            text += f"{address} {held.vmid} {told}\n"
        replace_file(self.file, text)

    def choose(self, devices: Mapping[str, list[list[str]]], vmid: int) -> list[str]:
        """Addresses for each ``hostpciN``, in order (PVE::QemuServer::PCI, choose_hostpci_devices). Raises Died."""
        used: list[str] = []
        for key in (f"hostpci{index}" for index in range(MAX_HOSTPCI)):
            if key not in devices:
                continue
            choices = devices[key]
            taken = choices[0] if len(choices) == 1 else self._first_free(choices, used, vmid, key)
            for address in taken:
                if address in used:
                    raise Died(f"device '{address}' assigned more than once")
                used.append(address)
        return used

    def _first_free(self, choices: list[list[str]], used: list[str], vmid: int, key: str) -> list[str]:
        for choice in choices:
            if any(address in used for address in choice):
                continue
            try:
                self.reserve(choice, vmid, timeout=10)
            except Died:
                continue
            return choice
        raise Died(f"could not find a free device for '{key}'")
