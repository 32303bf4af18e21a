# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cluster-wide names for PCI devices, with all that Proxmox VE compares when a VM starts.

Create and update take a mapping with a path and an id. The start of a VM (assert_valid of PVE::Mapping::PCI) wants
``id``, ``iommugroup`` and ``subsystem-id`` whenever the hardware has them, and refuses with "PCI device mapping
invalid (hardware probably changed)". So they are read from the node: of function 0 where a path means all functions,
of the first path where there are several. A group can change with the firmware or the kernel; a second run then
corrects it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _pve_find
from ._difference import Difference
from ._pve_client import Pve, PveNotFound, PveRefused, PveStaleDigest
from ._pve_strings import StringError, parse

PATH = "/cluster/mapping/pci"
STALE_TRIES = 4
FILLED = ("id", "subsystem-id", "iommugroup")

_ADDRESS = re.compile(r"(?:[0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}(?:\.[0-9a-f])?")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]+")


class MappingRefused(ValueError):
    """A wish that does not fit the hardware or would break a VM; the text names the mapping and the next step."""


@dataclass(frozen=True)
class Device:
    """One alternative of a mapping on a node. ``path``: addresses joined by ``;`` are passed through together.

    ``expected``: what the operator says of the hardware (keys of FILLED); it is compared, never trusted.
    """

    path: str
    node: str
    description: str = ""
    expected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """``mdev``, ``live_migration``, ``description``: None leaves them as they are."""

    name: str
    devices: tuple[Device, ...] = ()
    description: str | None = None
    mdev: bool | None = None
    live_migration: bool | None = None


@dataclass
class Outcome:
    """``pending``: of mappings that were or would be written, the alternatives on each node's devices, by name."""

    difference: Difference = field(default_factory=Difference)
    pending: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def address(text: str) -> str:
    """An address with its domain in lower case. Raises MappingRefused."""
    found = text.strip().lower()
    if not _ADDRESS.fullmatch(found):
        raise MappingRefused(f"{text!r} is no PCI address; write it like 0000:01:00 (all functions) or 0000:01:00.0")
    return found if found.count(":") == 2 else f"0000:{found}"


def path_of(text: str) -> str:
    return ";".join(address(part) for part in text.split(";"))


def check(wish: Wish) -> None:
    """Raises MappingRefused for a name that Proxmox VE does not take, or no device."""
    if not _NAME.fullmatch(wish.name):
        raise MappingRefused(
            f"mapping {wish.name!r}: a name begins with a letter and has letters, digits, _ and - only"
        )
    if not wish.devices:
        raise MappingRefused(f"mapping {wish.name}: it names no device")


def entry(wish: Wish, device: Device, hardware: Mapping[str, Mapping[str, Any]] | None) -> str:
    """The text of one alternative, completed from the node's devices. Raises MappingRefused."""
    values = {"node": device.node, "path": device.path}
    if hardware is None:
        missing = [key for key in FILLED if key not in device.expected]
        if missing:
            raise MappingRefused(
                f"mapping {wish.name}: the devices of node {device.node} may not be read; grant Sys.Audit on /, or say "
                f"{', '.join(missing)} of {device.path}"
            )
        values |= device.expected
    else:
        values |= _of_hardware(wish, device, hardware)
    if device.description:
        values["description"] = device.description
    return ",".join(f"{key}={value}" for key, value in values.items())


def _of_hardware(wish: Wish, device: Device, hardware: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    where = f"mapping {wish.name}: {device.path} on node {device.node}"
    for part in device.path.split(";"):
        if first(part) not in hardware:
            raise MappingRefused(f"{where}: there is no PCI device {part}; displays are {displays(hardware.values())}")
    shown = hardware[first(device.path.split(";")[0])]
    found = {"id": f"{_hex(shown['vendor'])}:{_hex(shown['device'])}"}
    if shown.get("subsystem_vendor") and shown.get("subsystem_device"):
        found["subsystem-id"] = f"{_hex(shown['subsystem_vendor'])}:{_hex(shown['subsystem_device'])}"
    group = int(shown.get("iommugroup", -1))
    if group < 0:
        raise MappingRefused(
            f"{where}: it is in no IOMMU group, so no VM can have it; switch the IOMMU on (firmware: VT-d or AMD-Vi; "
            "role gpu_passthrough for the kernel), reboot, and repeat"
        )
    found["iommugroup"] = str(group)
    for key, value in device.expected.items():
        if found.get(key, "").lower() != value.lower():
            raise MappingRefused(f"{where}: {key} is {found.get(key, 'not there')}, not {value}; is it the right card?")
    return found


def first(path: str) -> str:
    """The function whose identity counts: the named one, or function 0."""
    return path if "." in path else f"{path}.0"


def displays(devices: Iterable[Mapping[str, Any]]) -> str:
    """GPUs of a node for an error's text."""
    found = [
        f"{each['id']} ({each.get('device_name') or _hex(each['vendor']) + ':' + _hex(each['device'])})"
        for each in devices
        if str(each.get("class", "")).startswith("0x03")
    ]
    return ", ".join(found) or "none"


def _hex(text: Any) -> str:
    return str(text).lower().removeprefix("0x")


def plan(wish: Wish, wanted: Sequence[str], present: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters for create (``present`` None) or update; empty when nothing differs.

    Entries of nodes that are not wished for stay, and ``map`` is sent whole, as Proxmox VE replaces it.
    """
    named = {device.node for device in wish.devices}
    now = [str(text) for text in (present or {}).get("map") or ()]
    after = [text for text in now if parse(None, text).get("node") not in named] + list(wanted)
    params: dict[str, Any] = {}
    if sorted(map(_meaning, now)) != sorted(map(_meaning, after)):
        params["map"] = after
    if wish.description is not None and wish.description.rstrip("\n") != str(
        (present or {}).get("description") or ""
    ).rstrip("\n"):
        params["description"] = wish.description
    for key, value in (("mdev", wish.mdev), ("live-migration-capable", wish.live_migration)):
        if value is not None and str(int(value)) != str((present or {}).get(key) or 0):
            params[key] = int(value)
    return params


def _meaning(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value.lower()) for key, value in parse(None, text).as_dict().items()))


def converge(
    pve: Pve, wishes: Sequence[Wish], *, owned_prefix: str = "", force: bool = False, check_mode: bool
) -> Outcome:
    """Bring mappings to their wishes; those that begin with ``owned_prefix`` and are not wished for go.

    Nothing is written before everything is known to fit. Raises MappingRefused and PveError.
    """
    for wish in wishes:
        check(wish)
    hardware = {
        node: _pve_find.devices(pve, node) for node in sorted({d.node for wish in wishes for d in wish.devices})
    }
    wanted = {wish.name: [entry(wish, device, hardware[device.node]) for device in wish.devices] for wish in wishes}
    _refuse_doubles(wishes)
    outcome = Outcome()
    present = {str(each["id"]): each for each in pve.get(PATH)}
    obsolete = [n for n in sorted(present) if owned_prefix and n.startswith(owned_prefix) and n not in wanted]
    _refuse_used(pve, obsolete, force)
    for wish in wishes:
        if plan(wish, wanted[wish.name], present.get(wish.name)):  # else not even its digest is needed
            _write(pve, wish, wanted[wish.name], outcome, check_mode=check_mode)
    _delete(pve, obsolete, present, outcome, check_mode=check_mode)
    if not check_mode:
        outcome.problems = _complaints(pve, wishes)
    return outcome


def remove(
    pve: Pve, names: Sequence[str], *, owned_prefix: str = "", keep: Sequence[str] = (), force: bool, check_mode: bool
) -> Outcome:
    """Those that are named, and those that begin with ``owned_prefix`` and are not to be kept.

    Raises MappingRefused for one that a VM has.
    """
    present = {str(each["id"]): each for each in pve.get(PATH)}
    gone = [
        name
        for name in sorted(present)
        if name in names or (owned_prefix and name.startswith(owned_prefix) and name not in keep)
    ]
    _refuse_used(pve, gone, force)
    outcome = Outcome()
    _delete(pve, gone, present, outcome, check_mode=check_mode)
    return outcome


def _write(pve: Pve, wish: Wish, wanted: Sequence[str], outcome: Outcome, *, check_mode: bool) -> None:
    attempt = 0
    while True:
        attempt += 1
        try:
            present = dict(pve.get(f"{PATH}/{wish.name}"))
        except PveNotFound:
            present = None
        params = plan(wish, wanted, present)
        if not params:
            return
        before = None if present is None else {key: present.get(key) for key in params}
        if not check_mode:
            try:
                _put(pve, wish, params, present)
            except PveStaleDigest:
                if attempt == STALE_TRIES:
                    raise
                continue
        outcome.difference.add(f"mapping {wish.name}", before, params)
        outcome.pending[wish.name] = [device.path for device in wish.devices]
        return


def _put(pve: Pve, wish: Wish, params: Mapping[str, Any], present: Mapping[str, Any] | None) -> None:
    if present is None:
        pve.post(PATH, id=wish.name, **params)
    else:
        # the schema calls map optional, and Proxmox VE still replaces it by nothing when it is left out
        pve.put(f"{PATH}/{wish.name}", **{"map": present.get("map"), **params, "digest": present.get("digest")})


def _delete(
    pve: Pve, names: Sequence[str], present: Mapping[str, Mapping[str, Any]], outcome: Outcome, *, check_mode: bool
) -> None:
    for name in names:
        outcome.difference.add(f"mapping {name}", {"map": present[name].get("map")}, None)
        if not check_mode:
            pve.delete(f"{PATH}/{name}")


def _refuse_doubles(wishes: Sequence[Wish]) -> None:
    """A card in two mappings could be given out twice, and only the start of the second VM would tell."""
    owners: dict[tuple[str, str], str] = {}
    for wish in wishes:
        for device in wish.devices:
            for part in device.path.split(";"):
                key = (device.node, part.split(".")[0])
                other = owners.setdefault(key, wish.name)
                if other != wish.name and "." not in part:
                    raise MappingRefused(f"{part} on node {device.node} is in mapping {other} and in {wish.name}")


def _refuse_used(pve: Pve, names: Sequence[str], force: bool) -> None:
    if not names or force:
        return
    for guest in pve.get("/cluster/resources", type="vm"):
        if guest.get("type") != "qemu":
            continue
        config = pve.get(f"/nodes/{guest['node']}/qemu/{guest['vmid']}/config")
        for option, value in config.items():
            if not str(option).startswith("hostpci"):
                continue
            try:
                used = parse("host", str(value)).get("mapping")
            except StringError as error:
                raise PveRefused(f"VM {guest['vmid']}: {option}: {error}") from error
            if used in names:
                raise MappingRefused(
                    f"mapping {used} is {option} of VM {guest['vmid']} ({guest.get('name') or 'no name'}), which would "
                    f"not start without it; take it off first (qm set {guest['vmid']} --delete {option}), or force"
                )


def _complaints(pve: Pve, wishes: Sequence[Wish]) -> list[str]:
    """What Proxmox VE itself finds wrong with the mappings on their nodes."""
    names, found = {wish.name for wish in wishes}, []
    for node in sorted({device.node for wish in wishes for device in wish.devices}):
        known = _pve_find.mappings(pve, node)
        found += [
            f"{name} on node {node}: {text}" for name in sorted(names & set(known)) for text in known[name].errors
        ]
    return found
