# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does everything that may claim memory fit into the machine at the same time?

Each claim counts with the most that it may take: the ARC with its upper limit, a VM with all of its memory, a RAM layer
with its size. What cannot be true together counts once: VMs on hugepages live inside the pool, and of the VMs of one
exclusive group only the largest runs.

Compressed swap (zram) holds pages of these very claims. At worst they do not compress at all and take what they took
before; what zram adds is its bookkeeping, ``ZRAM_PERCENT`` of its size (a table entry and a handle a page, and the
slack of zsmalloc).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._root import Root

ARCSTATS = "/proc/spl/kstat/zfs/arcstats"
ZRAM_PERCENT = 2
_UNITS = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0 * 1024}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT%]?)(?:i?B)?")
PAGE_SIZES = {"2M": 2, "1G": 1024}


class BudgetError(ValueError):
    """An argument that is none: the text names it and what it should be."""


@dataclass(frozen=True)
class Vm:
    """A virtual machine. ``memory``: MiB at most. ``hugepages``: its memory comes from the pool, where there is one."""

    name: str
    memory: int
    hugepages: bool = False
    exclusive: str = ""


@dataclass(frozen=True)
class Claim:
    """MiB that something may take, and the way to make it less."""

    name: str
    mib: int
    way_out: str


@dataclass(frozen=True)
class Budget:
    """``memory``: MiB that the kernel has to give away (MemTotal)."""

    memory: int
    claims: tuple[Claim, ...]

    @property
    def total(self) -> int:
        return sum(claim.mib for claim in self.claims)

    @property
    def free(self) -> int:
        """What nobody claims; negative when too much is claimed."""
        return self.memory - self.total

    @property
    def fits(self) -> bool:
        return self.free >= 0

    def table(self) -> str:
        """A line a claim, the sum and the machine's memory, in GiB, and how to make each claim less."""
        width = max(len(claim.name) for claim in self.claims) if self.claims else 0
        width = max(width, len("this host has"))
        rows = [f"{'what':<{width}} {'GiB':>7}  make it less by"]
        rows += [f"{claim.name:<{width}} {gib(claim.mib):>7}  {claim.way_out}" for claim in self.claims]
        rows += [f"{'sum':<{width}} {gib(self.total):>7}", f"{'this host has':<{width}} {gib(self.memory):>7}"]
        return "\n".join(row.rstrip() for row in rows)

    def message(self) -> str:
        """One sentence for the result."""
        if self.fits:
            return f"{gib(self.total)} of {gib(self.memory)} GiB are claimed, {gib(self.free)} GiB are left"
        return (
            f"{gib(self.total)} GiB may be claimed at once, and this host has {gib(self.memory)}: "
            f"{gib(-self.free)} GiB too much"
        )


def gib(mib: int) -> str:
    return f"{mib / 1024:.1f}"


def size_mib(value: Any, memory: int, what: str) -> int:
    """MiB of a size: a number (MiB), ``8G``, ``512MiB``, or ``30%`` of the memory; rounded up. Raises BudgetError."""
    match = _SIZE.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    if match is None:
        raise BudgetError(f"{what}: {value!r} is not a size like 8G, 512M or 30%; a plain number is MiB")
    number, unit = float(match.group(1)), match.group(2)
    size = memory * number / 100 if unit == "%" else number * _UNITS[unit]
    return int(-(-size // 1))


def memory_mib(root: Root) -> int:
    """MemTotal in MiB. Raises BudgetError where the kernel does not tell it."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", root.read_or_none("/proc/meminfo") or "", re.MULTILINE)
    if match is None:
        raise BudgetError("/proc/meminfo does not say MemTotal")
    return int(match.group(1)) // 1024


def arc_now_mib(root: Root) -> int:
    """The upper limit of the ARC that is in force (``c_max``), MiB; 0 where ZFS is not loaded."""
    match = re.search(r"^c_max\s+\d+\s+(\d+)", root.read_or_none(ARCSTATS) or "", re.MULTILINE)
    return int(match.group(1)) >> 20 if match else 0


def allocated_pages(root: Root, page: str) -> int:
    """How many hugepages of a size the kernel has now."""
    size = PAGE_SIZES[page] * 1024
    return root.read_int(f"/sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages") or 0


def vms_from(wanted: Sequence[Mapping[str, Any]], memory: int) -> tuple[Vm, ...]:
    """VMs from a module's arguments. Raises BudgetError."""
    found = tuple(
        Vm(
            str(vm["name"]),
            size_mib(vm["memory"], memory, f"memory of VM {vm['name']}"),
            bool(vm.get("hugepages")),
            str(vm.get("exclusive") or ""),
        )
        for vm in wanted
    )
    names = [vm.name for vm in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BudgetError(f"VM {', '.join(twice)} is named twice")
    return found


def at_once(vms: Sequence[Vm]) -> list[Vm]:
    """The VMs that may run together: of each exclusive group the largest."""
    largest: dict[str, Vm] = {}
    for vm in vms:
        if vm.exclusive and vm.memory > largest.get(vm.exclusive, Vm("", -1)).memory:
            largest[vm.exclusive] = vm
    return [vm for vm in vms if not vm.exclusive or largest[vm.exclusive] is vm]


def pool_pages(vms: Sequence[Vm], page: str) -> int:
    """How many hugepages the VMs that live in them need together. Raises BudgetError."""
    size = PAGE_SIZES[page]
    chosen = at_once([vm for vm in vms if vm.hugepages])
    odd = [vm.name for vm in chosen if vm.memory % size]
    if odd:
        raise BudgetError(f"memory of VM {', '.join(odd)} is no multiple of {page}, the size of a hugepage")
    return sum(vm.memory for vm in chosen) // size


def make(
    memory: int,
    *,
    arc_max: int = 0,
    vms: Sequence[Vm] = (),
    pool: int = 0,
    layers: Sequence[tuple[str, int]] = (),
    zram: int = 0,
    reserve: int = 0,
) -> Budget:
    """The budget; all sizes in MiB. ``pool``: hugepages set aside at boot, which VMs on hugepages then live in."""
    claims = [Claim("ZFS ARC at most", arc_max, "a lower ARC limit (zfs_arc_max)")] if arc_max else []
    in_pool = pool > 0
    if in_pool:
        claims.append(Claim("hugepages set aside", pool, "less memory for the VMs that use them"))
    for vm in at_once([vm for vm in vms if not (vm.hugepages and in_pool)]):
        group = f", or another of {vm.exclusive}" if vm.exclusive else ""
        claims.append(Claim(f"VM {vm.name}{group}", vm.memory, "less memory, or an exclusive group with another VM"))
    claims += [Claim(f"RAM layer {name}", size, "a smaller layer, or fewer") for name, size in layers]
    if zram:
        claims.append(Claim("bookkeeping of zram", -(-zram * ZRAM_PERCENT // 100), "a smaller zram"))
    claims.append(Claim("the host itself", reserve, "nothing: it is what the system needs to live"))
    inside = sum(vm.memory for vm in at_once([vm for vm in vms if vm.hugepages]))
    if in_pool and inside > pool:
        raise BudgetError(
            f"the VMs on hugepages need {gib(inside)} GiB and {gib(pool)} GiB are set aside: "
            "set more aside, or give them less memory"
        )
    return Budget(memory, tuple(claims))
