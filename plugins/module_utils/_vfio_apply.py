# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carries a plan out: record, files, functions back to their drivers, functions to vfio-pci, initramfs, what waits.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import _iommu, _owned_files, _vfio_select
from ._atomic import write_atomic
from ._earlier import EarlierState, Kept
from ._iommu import DEVICES, VFIO, Function
from ._root import Root
from ._systemd import CommandError, Runner, run_command
from ._vfio_files import RULES, WAITING
from ._vfio_plan import INITRAMFS, Facts, Plan

DRIVERS = "/sys/bus/pci/drivers"
PROBE = "/sys/bus/pci/drivers_probe"
INITRAMFS_SECONDS = 550.0
"""An initramfs of each kernel is packed anew; the task still ends within ten minutes."""


class VfioError(Exception):
    """The kernel did not do what it was told; the text names the function and the next step."""


@dataclass
class Hands:
    """What touches the host; a test's kernel replaces ``write``."""

    root: Root
    run: Runner = run_command

    def write(self, path: str, text: str) -> None:
        """One write(2) of a value into a file of sysfs. Raises OSError with the kernel's reason."""
        with self.root.path(path).open("w", encoding="ascii") as stream:
            stream.write(text)

    def driver(self, address: str) -> str | None:
        return self.root.link_name(f"{DEVICES}/{address}/driver")

    def override(self, address: str) -> str:
        text = (self.root.read_or_none(f"{DEVICES}/{address}/driver_override") or "").strip()
        return "" if text == "(null)" else text


@dataclass
class Outcome:
    """``waiting``: what a reboot will bring, in sentences."""

    waiting: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


def apply(hands: Hands, earlier: EarlierState, plan: Plan) -> Outcome:
    """Raises VfioError, CommandError, OSError. What was done stays recorded; the next run goes on from there."""
    done = Outcome(list(plan.waiting))
    remember = dict(plan.remember)
    if plan.initramfs:
        remember[INITRAMFS] = Kept(None, "due")
    earlier.remember(remember)
    _owned_files.apply(hands.root, earlier, plan.files)
    if RULES in plan.files.writes and hands.root.exists("/run/udev/control"):
        hands.run(["udevadm", "control", "--reload"])
    for address, driver in plan.release.items():
        done.waiting += release(hands, address, driver)
    for address, value in plan.overrides.items():
        _set_override(hands, address, value)
    for address, value in plan.resets.items():
        path = f"{DEVICES}/{address}/reset_method"
        _tell(hands, path, value, f"the reset method of {address} cannot be set to {value}")
    if plan.bind:
        hands.run(["modprobe", VFIO])
    for group in plan.bind:
        bind(hands, group)
    # before the initramfs, which takes its time: the rule leaves running drivers alone while this is there
    write_waiting(hands.root, done.waiting)
    if plan.initramfs:
        command = ["update-initramfs", "-u", "-k", "all"]
        done.ran.append(" ".join(command))
        hands.run(command)
    forget = [*plan.forget, *([INITRAMFS] if INITRAMFS in earlier.kept else [])]
    if forget:
        earlier.forget(forget)
    return done


def bind(hands: Hands, group: Iterable[str]) -> None:
    """The functions of one IOMMU group to vfio-pci: all told first, then freed, then taken. Raises VfioError."""
    addresses = list(group)
    for address in addresses:
        _set_override(hands, address, VFIO)
    for address in addresses:
        if hands.driver(address) not in (None, VFIO):
            _tell(hands, f"{DEVICES}/{address}/driver/unbind", address, f"{address} cannot be freed")
    for address in addresses:
        if hands.driver(address) is None:
            _tell(hands, PROBE, address, f"{address} cannot be bound to vfio-pci")
        now = hands.driver(address)
        if now != VFIO:
            raise VfioError(
                f"{address} was given to vfio-pci and has {now or 'no driver'}; the kernel's reason is in dmesg. A "
                "reboot binds it if it can be; state absent takes all of this back"
            )


def release(hands: Hands, address: str, driver: str | None) -> list[str]:
    """A function from vfio-pci to the driver that it had (None: to none); says what has to wait for a reboot.

    The driver is told by its name: vfio-pci may have learnt the card's ids (``ids=``, or Proxmox VE's ``new_id``) and
    would take it again.
    """
    if hands.driver(address) == VFIO:
        _tell(hands, f"{DEVICES}/{address}/driver/unbind", address, f"{address} cannot be taken from vfio-pci")
    if driver is None:
        return []
    if not hands.root.exists(f"{DRIVERS}/{driver}"):
        alias = (hands.root.read_or_none(f"{DEVICES}/{address}/modalias") or "").strip()
        try:
            hands.run(["modprobe", "--", alias or driver])
        except CommandError as error:
            return [f"{address} gets {driver} at the next boot, since its module cannot be loaded now ({error})"]
    before = hands.override(address)
    _set_override(hands, address, driver)
    try:
        _tell(hands, PROBE, address, f"{address} cannot be given back to {driver}")
    finally:
        _set_override(hands, address, before)
    if hands.driver(address) != driver:
        return [f"{driver} did not take {address} back now (dmesg tells why); it gets it at the next boot"]
    return []


def _set_override(hands: Hands, address: str, value: str) -> None:
    path = f"{DEVICES}/{address}/driver_override"
    # a lone newline empties it (driver_set_override() in drivers/base/driver.c); an empty write would never arrive
    _tell(hands, path, value or "\n", f"driver_override of {address} cannot be set")
    if hands.override(address) != value:
        raise VfioError(f"driver_override of {address} is {hands.override(address)!r} after {value!r} was written")


def _tell(hands: Hands, path: str, text: str, complaint: str) -> None:
    try:
        hands.write(path, text)
    except OSError as error:
        raise VfioError(f"{complaint}: {path}: {error.strerror}. See dmesg; a reboot brings what is set up") from error


def write_waiting(root: Root, waiting: Iterable[str]) -> None:
    """Leave or remove the file that asks for a reboot (role reboot reads it). Raises OSError."""
    text = "; ".join(waiting)
    path = root.path(WAITING)
    if not text:
        path.unlink(missing_ok=True)
    elif root.read_or_none(WAITING) != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text + "\n", durable=False)


def rows(root: Root, facts: Facts, plan: Plan) -> list[dict[str, Any]]:
    """The taken functions as they are now, for people and for PCI mappings."""
    now = _iommu.functions(root)
    names = _iommu.models(root, now.values())
    return [_row(now[address], reason, names, facts) for address, reason in plan.taken.items() if address in now]


def _row(function: Function, reason: str, names: dict[str, str], facts: Facts) -> dict[str, Any]:
    return {
        "address": function.address,
        "id": function.id,
        "subsystem_id": f"{function.subvendor}:{function.subdevice}" if function.subvendor else "",
        "model": names.get(function.address, function.id),
        "class": function.kind,
        "gpu": function.is_display,
        "reason": reason,
        "group": function.group,
        "driver": function.driver,
        "driver_override": function.override,
        "driver_before": facts.earlier_drivers.get(function.address, facts.functions[function.address].driver),
        "reset": list(function.reset),
        "bound": function.driver == VFIO,
        "own_group": all(
            member.is_bridge or member.slot == function.slot for member in _iommu.members(facts.functions, function)
        )
        and reason != _vfio_select.GROUP,
    }
