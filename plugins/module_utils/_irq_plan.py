# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where each interrupt belongs: NICs and NVMe spread over the I/O zone, one queue a CPU, everything else in the host's.

Pure: interrupts and a wish in, a plan out.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _cpu_list
from ._cpu_plan import ZONES
from ._irq import DEFAULT_MASK, KINDS, Device, Interrupts, Vector

LEAVE = "leave"
ZONE_OF_KIND: Mapping[str, str] = {"nic": "io", "nvme": "io", "passthrough": "host", "other": "host"}
SPREAD = ("nic", "nvme")

# virtio2-input.3, eno1-TxRx-3, eno1-rx-3, mlx5_comp3@pci:0000:03:00.0, nvme0q3, eth0-fp-3, ens1f0-3, ena-Tx-Rx-3
_QUEUE = re.compile(r"(?:input|output|rx|tx|txrx|comp|fp|queue|que|req|q|-)[-._]?(\d+)(?:@.*)?\Z", re.IGNORECASE)


class IrqPlanError(ValueError):
    """A wish that cannot be met on this host; the text names the device or zone and the way out."""


@dataclass(frozen=True)
class IrqWish:
    """``zones``: CPUs of ``host``, ``vcpu``, ``io``. ``devices``: a zone's name, a CPU list or ``leave`` by device.

    A device is named by PCI address, network interface, NVMe controller, or, without a PCI device, by its action name.
    What is said of a card with virtual functions holds for these too, unless they are named themselves.
    """

    zones: Mapping[str, tuple[int, ...]]
    devices: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=lambda: dict(ZONE_OF_KIND))
    default: bool = True
    """Let new vectors begin in the zone of ``other`` (``default_smp_affinity``)."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, CPU lists as text."""
        return {
            "zones": {zone: _cpu_list.render(cpus) for zone, cpus in self.zones.items()},
            "devices": dict(self.devices),
            "kinds": dict(self.kinds),
            "default": self.default,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> IrqWish:
        """Raises KeyError, TypeError, ValueError or AttributeError when it is none."""
        return IrqWish(
            zones={str(zone): _cpu_list.parse(cpus) for zone, cpus in raw["zones"].items()},
            devices={str(name): str(place) for name, place in raw["devices"].items()},
            kinds={str(kind): str(zone) for kind, zone in raw["kinds"].items()},
            default=bool(raw["default"]),
        )


@dataclass(frozen=True)
class Steering:
    """Where one vector should be. ``zone``: a zone's name, or the CPU list that the wish gives, or ``leave``."""

    vector: Vector
    zone: str
    wanted: tuple[int, ...]

    @property
    def movable(self) -> bool:
        return not self.vector.locked and self.zone != LEAVE

    @property
    def differs(self) -> bool:
        """Whether a write is due. The configured mask counts: some chips move with the next interrupt only."""
        return self.movable and self.vector.affinity != self.wanted

    @property
    def state(self) -> str:
        """``ok``, ``pending`` (mask set, moves with the next interrupt), ``managed`` or ``fixed`` (the kernel refuses),
        ``left`` (by wish) or ``wrong``."""
        if self.vector.locked:
            return "managed" if self.vector.device is not None else "fixed"
        if self.zone == LEAVE:
            return "left"
        if self.vector.affinity != self.wanted:
            return "wrong"
        runs = self.vector.effective
        return "ok" if runs is None or set(runs) <= set(self.wanted) else "pending"

    def row(self) -> dict[str, Any]:
        """What a module returns of it."""
        vector = self.vector
        return {
            "irq": vector.irq,
            "device": vector.device.address if vector.device else "",
            "owner": vector.owner,
            "name": vector.name,
            "zone": self.zone,
            "wanted": _cpu_list.render(self.wanted),
            "affinity": _cpu_list.render(vector.affinity),
            "effective": None if vector.effective is None else _cpu_list.render(vector.effective),
            "managed": bool(vector.locked),
            "state": self.state,
            "ok": self.state in ("ok", "left"),
        }


@dataclass(frozen=True)
class IrqPlan:
    steerings: tuple[Steering, ...]
    default: tuple[int, ...] | None
    """What ``default_smp_affinity`` should be; None: not ours."""

    def summary(self) -> dict[str, int]:
        """Number of vectors in each state."""
        states = [steering.state for steering in self.steerings]
        return {state: states.count(state) for state in ("ok", "pending", "wrong", "managed", "fixed", "left")}

    def wanted(self) -> dict[str, str]:
        """What is ours to hold, by key of the record of earlier state."""
        held = {s.vector.key: _cpu_list.render(s.wanted) for s in self.steerings if s.movable}
        if self.default is not None:
            held[DEFAULT_MASK] = _cpu_list.render(self.default)
        return held


def unknown_devices(wish: IrqWish, found: Interrupts) -> list[str]:
    """Names in a wish that nothing here has."""
    known = _known(found)
    return sorted(name for name in wish.devices if name not in known)


def check_wish(wish: IrqWish, found: Interrupts, *, strict: bool = True) -> None:
    """Refuse unknown devices (if ``strict``) and zones, and CPUs that are not online. Raises IrqPlanError."""
    unknown = unknown_devices(wish, found)
    if unknown and strict:
        likely = ", ".join(sorted({name for device in found.devices for name in device.names})) or "none"
        raise IrqPlanError(
            f"no such device: {', '.join(unknown)}. Name a PCI address, a network interface or an NVMe controller of "
            f"this host (there are {likely}), or an action name of /proc/interrupts"
        )
    wrong = sorted(set(wish.kinds) - set(KINDS))
    if wrong:
        raise IrqPlanError(f"no such kind of device: {', '.join(wrong)} (there are {', '.join(KINDS)})")
    for place in {*wish.kinds.values(), *wish.devices.values()} - {LEAVE}:
        cpus = _cpus_of(place, wish)
        offline = sorted(set(cpus) - set(found.online))
        if offline:
            raise IrqPlanError(
                f"{place}: CPU {_cpu_list.render(offline)} is not online (online: {_cpu_list.render(found.online)})"
            )


def plan(found: Interrupts, wish: IrqWish, *, strict: bool = True) -> IrqPlan:
    """``strict=False`` lives with wishes for devices that are not there (any more). Raises IrqPlanError."""
    check_wish(wish, found, strict=strict)
    steerings: list[Steering] = []
    devices = sorted({v.device for v in found.vectors if v.device is not None}, key=lambda device: device.address)
    given = _given(found, wish)
    offset = 0
    for device in devices:
        vectors = [vector for vector in found.vectors if vector.device == device]
        place, spread = _place(device, wish, given)
        if place != LEAVE and spread:
            cpus = _cpus_of(place, wish)
            queues = queue_numbers(vectors)
            steerings += [
                Steering(vector, place, (cpus[(offset + queue) % len(cpus)],))
                for vector, queue in zip(vectors, queues, strict=True)
            ]
            # the next device goes on where this one ends, so that single-queue devices do not meet on one CPU
            if any(not vector.locked for vector in vectors):
                offset += len(set(queues))
        else:
            cpus = () if place == LEAVE else _cpus_of(place, wish)
            steerings += [Steering(vector, place, cpus) for vector in vectors]
    for vector in found.vectors:
        if vector.device is None:
            named = next((wish.devices[name] for name in vector.actions if name in wish.devices), None)
            place = named or wish.kinds.get("other", LEAVE)
            steerings.append(Steering(vector, place, () if place == LEAVE else _cpus_of(place, wish)))
    steerings.sort(key=lambda steering: steering.vector.irq)
    other = wish.kinds.get("other", LEAVE)
    default = _cpus_of(other, wish) if wish.default and other != LEAVE and found.default is not None else None
    return IrqPlan(tuple(steerings), default)


def queue_numbers(vectors: Iterable[Vector]) -> list[int]:
    """The queue that each vector of a device serves; both directions of a queue have one number.

    Vectors without a number in a device that numbers its queues (configuration, mailbox) count as queue 0, so that they
    do not push the queues off their CPUs; where no vector has a number, the position counts.
    """
    vectors = list(vectors)
    numbers: list[int | None] = []
    for vector in vectors:
        match = next((match for match in map(_QUEUE.search, vector.actions) if match), None)
        numbers.append(int(match[1]) if match else None)
    if all(number is None for number in numbers):
        return list(range(len(vectors)))
    # NVMe counts its I/O queues from 1; q0 is the admin queue
    lowest = 1 if any(re.fullmatch(r"nvme\d+q\d+", name) for vector in vectors for name in vector.actions) else 0
    return [max(0, number - lowest) if number is not None else 0 for number in numbers]


def _known(found: Interrupts) -> set[str]:
    known = {name for vector in found.vectors if vector.device is None for name in vector.actions}
    for device in found.devices:
        known |= {device.address, *device.names}
    return known


def _given(found: Interrupts, wish: IrqWish) -> dict[str, str]:
    """What the wish says of devices, by PCI address whatever name it uses; an address wins over other names."""
    return {
        device.address: wish.devices[name]
        for device in found.devices
        for name in (*device.names, device.address)
        if name in wish.devices
    }


def _place(device: Device, wish: IrqWish, given: Mapping[str, str]) -> tuple[str, bool]:
    """Where a device's vectors go, and whether each queue gets a CPU of its own."""
    named = given.get(device.address) or given.get(device.physfn)
    if named is not None:
        return named, True
    return wish.kinds.get(device.kind, LEAVE), device.kind in SPREAD


def _cpus_of(place: str, wish: IrqWish) -> tuple[int, ...]:
    if place in ZONES:
        cpus = tuple(wish.zones.get(place, ()))
        if not cpus:
            raise IrqPlanError(f"the zone {place} has no CPUs; run level 1 (cpu_plan) or give its CPU list")
        return cpus
    try:
        cpus = _cpu_list.parse(place)
    except ValueError as error:
        raise IrqPlanError(
            f"{place!r} is no zone ({', '.join(ZONES)}), no CPU list and not {LEAVE!r}: {error}"
        ) from error
    if not cpus:
        raise IrqPlanError("an empty place: name a zone, a CPU list, or 'leave'")
    return cpus
