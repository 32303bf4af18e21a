# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What has to be done so that just the wanted functions belong to vfio-pci, now and at each boot; or why it must not.

Keys of the record of earlier state: ``driver:ADDRESS``, ``override:ADDRESS`` and ``reset:ADDRESS`` (the driver,
``driver_override`` and ``reset_method`` of before), a file's path, and ``initramfs`` while it lacks the last change.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _iommu, _kernel_modules, _owned_files, _vfio_files, _vfio_needs, _vfio_select, _vfio_users
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._iommu import VFIO, Function
from ._owned_files import FilePlan
from ._root import Root
from ._vfio_files import ADDRESS_MODE, IDS_MODE
from ._vfio_select import Selector

CAPABILITY = "vfio"
AUTO, NOW, BOOT = "auto", "now", "boot"
BINDS = (AUTO, NOW, BOOT)
INITRAMFS = "initramfs"
DRIVER, OVERRIDE, RESET = "driver:", "override:", "reset:"
_VGA = "/sys/module/vfio_pci/parameters/disable_vga"


class VfioRefused(Exception):
    """What must not be done; the text names the function or group, the reason and the way out."""


@dataclass(frozen=True)
class Wish:
    """Empty ``selectors``: nothing shall belong to vfio-pci through us. ``cards``: how many there must be."""

    selectors: tuple[Selector, ...] = ()
    exclude: tuple[str, ...] = ()
    mode: str = ADDRESS_MODE
    bind: str = AUTO
    disable_vga: bool = False
    give_console: bool = False
    cards: int | None = None
    reset_method: str = ""
    """The only way to reset a card that the kernel may take; empty leaves the kernel's own order."""


@dataclass(frozen=True)
class Facts:
    """A host as it is. ``needs``: why it needs a function. ``holders``: who uses one now."""

    functions: Mapping[str, Function]
    needs: Mapping[str, list[str]]
    holders: Mapping[str, list[str]]
    kept: Mapping[str, Kept]
    can_bind: bool
    """Has the running kernel vfio-pci?"""

    @property
    def earlier_drivers(self) -> dict[str, str | None]:
        return {key[len(DRIVER) :]: kept.before for key, kept in self.kept.items() if key.startswith(DRIVER)}


@dataclass
class Plan:
    """``bind``: addresses by group, to be bound now. ``release``: address to the driver that gets it (None: nobody)."""

    taken: dict[str, str]
    difference: Difference = field(default_factory=Difference)
    files: FilePlan = field(default_factory=FilePlan)
    bind: list[tuple[str, ...]] = field(default_factory=list)
    overrides: dict[str, str] = field(default_factory=dict)
    release: dict[str, str | None] = field(default_factory=dict)
    resets: dict[str, str] = field(default_factory=dict)
    remember: dict[str, Kept] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    kept_by_others: dict[str, Any] = field(default_factory=dict)
    initramfs: bool = False


def gather(root: Root, earlier: EarlierState) -> Facts:
    functions = _iommu.functions(root)
    return Facts(
        functions,
        _vfio_needs.needs(root, functions),
        _vfio_users.holders(root, functions.values()),
        earlier.kept,
        _kernel_modules.exists(root, "vfio_pci"),
    )


def make_plan(root: Root, earlier: EarlierState, facts: Facts, wish: Wish) -> Plan:
    """Raises VfioRefused, SelectError, OSError; nothing is changed by it."""
    found = facts.functions
    taken = _vfio_select.choose(found, wish.selectors, wish.exclude, facts.earlier_drivers) if wish.selectors else {}
    if taken:
        check(root, facts, wish, taken)
    plan = Plan(taken)
    chosen = [found[address] for address in taken]
    plan.files = _owned_files.plan(
        root,
        earlier,
        _vfio_files.wanted(root, chosen, wish.mode, disable_vga=wish.disable_vga, reset_method=wish.reset_method),
    )
    plan.difference.merge(plan.files.difference)
    plan.kept_by_others |= plan.files.others
    _plan_taking(facts, wish, plan)
    _plan_resets(facts, wish, plan)
    _plan_giving(facts, wish, plan)
    if wish.disable_vga and taken and (root.read_or_none(_VGA) or "Y").strip() == "N":
        plan.waiting.append("vfio-pci was loaded without disable_vga")
    if _vfio_files.has_initramfs(root):
        touched = any(path in plan.files.writes for path in _vfio_files.EARLY)
        plan.initramfs = touched or INITRAMFS in facts.kept
    if plan.initramfs:
        plan.difference.add(INITRAMFS, "lacks the change", "updated")
    return plan


# Refusals -------------------------------------------------------------------------------------------------------------


def check(root: Root, facts: Facts, wish: Wish, taken: Mapping[str, str]) -> None:
    """Raises VfioRefused for what must not be taken."""
    found = facts.functions
    if all(found[address].group is None for address in taken):
        raise VfioRefused(
            "this host runs without an IOMMU, so nobody knows what is in one group with a card. Switch VT-d or AMD-Vi "
            "on in the firmware, on Intel set intel_iommu=on, reboot, and run this again (organism-iommu tells more)"
        )
    cards = [address for address in taken if found[address].is_display]
    if wish.cards is not None and len(cards) != wish.cards:
        raise VfioRefused(
            f"{wish.cards} cards are expected and {len(cards)} were found ({', '.join(cards) or 'none'}). "
            "Is one dead, unpowered or in another slot? Mend it, or correct the number"
        )
    blocked = blocked_groups(facts, taken)
    if blocked:
        raise VfioRefused("; ".join(blocked) + ". " + WAYS_OUT)
    lost = _vfio_needs.lost_console(root, found, taken)
    if lost and not wish.give_console:
        raise VfioRefused(
            f"{lost} is the only console of this host. Leave it out (exclude), let the firmware use another adapter, "
            "set a serial console (console=ttyS0), or say give_console if nobody needs a screen"
        )
    parents = [found[address] for address in taken if found[address].virtual and found[address].driver != VFIO]
    if parents:
        raise VfioRefused(
            f"{parents[0]} has {len(parents[0].virtual)} virtual functions, which would vanish with its driver. Name "
            "these instead (function: virtual), or remove them first (sriov_numvfs)"
        )
    if wish.mode == IDS_MODE:
        _check_ids(facts, taken)
    if wish.reset_method:
        _check_resets(facts, wish, cards)
    if not facts.can_bind:
        raise VfioRefused("the running kernel has no module vfio-pci; boot one that has (Debian's and Proxmox VE's do)")


WAYS_OUT = (
    "Put the card into another slot, leave it out (exclude), or free what the host uses there. Splitting the group by "
    "an ACS override would only hide that its members can reach each other's memory, and is never done here"
)


def blocked_groups(facts: Facts, taken: Iterable[str]) -> list[str]:
    """A sentence on each group that holds what the host needs, with its members."""
    found, said, seen = facts.functions, [], set()
    for address in taken:
        group = found[address].group
        if group in seen:
            continue
        seen.add(group)
        all_of_it = _iommu.members(found, found[address])
        reasons = [
            f"{member.address} is {' and '.join(facts.needs[member.address])}"
            for member in all_of_it
            if member.address in facts.needs
            and member.driver != VFIO
            # a bridge carries what is behind it, which says so itself; only the chipset's own counts
            and (not member.is_bridge or member.kind.startswith("0601"))
        ]
        if reasons:
            where = f"IOMMU group {group}" if group is not None else address
            said.append(f"{where} must stay: {'; '.join(reasons)}. The group holds {_iommu.listed(all_of_it)}")
    return said


def _check_ids(facts: Facts, taken: Mapping[str, str]) -> None:
    found = facts.functions
    wanted = set(_vfio_files.ids(found[address] for address in taken))
    caught = [f for f in found.values() if f.id in wanted and f.address not in taken]
    if caught:
        raise VfioRefused(
            f"by ids, {_iommu.listed(caught)} would be taken as well, and nobody asked for that. Bind by address"
        )


def _check_resets(facts: Facts, wish: Wish, cards: Iterable[str]) -> None:
    if wish.mode == IDS_MODE:
        raise VfioRefused("a reset method belongs to an address: choose mode address, or leave it out")
    for address in cards:
        kept = facts.kept.get(RESET + address)
        ways = {*facts.functions[address].reset, *(str(kept.before).split() if kept else ())}
        if wish.reset_method not in ways:
            raise VfioRefused(
                f"{facts.functions[address]} cannot be reset by {wish.reset_method}: the kernel knows "
                f"{', '.join(sorted(ways)) or 'no way'} for it"
                + (
                    " (device_specific comes with a module such as vendor-reset)"
                    if "specific" in wish.reset_method
                    else ""
                )
            )


# Taking ---------------------------------------------------------------------------------------------------------------


def _plan_taking(facts: Facts, wish: Wish, plan: Plan) -> None:
    by_group: dict[Any, list[Function]] = {}
    for address in plan.taken:
        function = facts.functions[address]
        by_group.setdefault(function.group if function.group is not None else address, []).append(function)
        plan.remember[DRIVER + address] = Kept(function.driver, VFIO)
        if wish.mode == ADDRESS_MODE:
            plan.remember[OVERRIDE + address] = Kept(function.override, VFIO)
            if function.driver == VFIO and function.override != VFIO:
                plan.overrides[address] = VFIO
                plan.difference.add(f"{address} driver_override", function.override, VFIO)
    for group in by_group.values():
        loose = [function for function in group if function.driver != VFIO]
        foreign = [function for function in loose if function.driver]
        if not loose:
            continue
        if wish.bind == BOOT or (foreign and wish.bind == AUTO):
            plan.waiting += [
                f"{f.address} has {f.driver or 'no driver'}, and vfio-pci from the next boot on" for f in loose
            ]
            continue
        held = [function for function in loose if function.address in facts.holders]
        if held:
            raise VfioRefused(
                f"{held[0]} is in use by {_vfio_users.told(facts.holders[held[0].address])}. Stop that first, or let "
                "it be bound at the next boot (bind: boot)"
            )
        plan.bind.append(tuple(function.address for function in loose))
        for function in loose:
            plan.difference.add(f"{function.address} driver", function.driver, VFIO)
            plan.difference.add(f"{function.address} driver_override", function.override, VFIO)
            plan.remember[OVERRIDE + function.address] = Kept(function.override, VFIO)


def _plan_resets(facts: Facts, wish: Wish, plan: Plan) -> None:
    """Cards that the kernel may reset in one way alone; those that lose the wish get the kernel's order again."""
    wanted = {a for a in plan.taken if wish.reset_method and facts.functions[a].is_display}
    for address in sorted(wanted | {key[len(RESET) :] for key in facts.kept if key.startswith(RESET)}):
        function, kept = facts.functions.get(address), facts.kept.get(RESET + address)
        if address not in wanted:
            plan.forget.append(RESET + address)
        if function is None:
            continue
        now = " ".join(function.reset)
        if address in wanted:
            plan.remember[RESET + address] = Kept(now, wish.reset_method)
            value = wish.reset_method
        elif kept and now == kept.set:
            value = str(kept.before)
        else:
            continue
        if now != value:
            plan.resets[address] = value
            plan.difference.add(f"{address} reset_method", now, value)


# Giving back ----------------------------------------------------------------------------------------------------------


def _plan_giving(facts: Facts, wish: Wish, plan: Plan) -> None:
    """What was taken once and is not wanted any more."""
    gone = {key.partition(":")[2] for key in facts.kept if key.startswith((DRIVER, OVERRIDE))} - set(plan.taken)
    for address in sorted(gone):
        plan.forget += [key for key in (DRIVER + address, OVERRIDE + address) if key in facts.kept]
        function = facts.functions.get(address)
        if function is not None:
            _give(facts, wish, plan, function)


def _give(facts: Facts, wish: Wish, plan: Plan, function: Function) -> None:
    address = function.address
    override = facts.kept.get(OVERRIDE + address)
    if override and function.override not in (override.before, override.set):
        plan.kept_by_others[f"{address} driver_override"] = function.override
    elif override and function.override != override.before:
        plan.overrides[address] = override.before
        plan.difference.add(f"{address} driver_override", function.override, override.before)
    driver = facts.kept.get(DRIVER + address)
    if driver is None or driver.before == function.driver:
        return
    if function.driver not in (driver.set, None):  # without any, an earlier run was cut between two drivers
        plan.kept_by_others[f"{address} driver"] = function.driver
        return
    if wish.bind == BOOT:
        plan.waiting.append(
            f"{address} has {function.driver or 'no driver'}, and {driver.before or 'none'} from the next boot on"
        )
        return
    if address in facts.holders:
        raise VfioRefused(
            f"{function} is in use by {_vfio_users.told(facts.holders[address])}. Stop that first; nothing was changed"
        )
    plan.release[address] = driver.before
    plan.difference.add(f"{address} driver", function.driver, driver.before)
