# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of CPUs in the kernel's two spellings: lists (``0-3,8``) and bitmaps (``f,0000010f``).

Source: Documentation/admin-guide/kernel-parameters.rst ("cpu lists") and lib/vsprintf.c (``%*pbl`` and ``%*pb``): a
bitmap is written in groups of 32 bits, eight hexadecimal digits each, the highest group first and only as wide as it
must be.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LIMIT = 8192
"""CPU numbers are below this: the largest NR_CPUS that Linux can be built with on x86 (arch/x86/Kconfig, MAXSMP)."""

_GROUP_BITS = 32
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+)/(\d+))?)?")


class CpuListError(ValueError):
    """A text that is no CPU list or bitmap; the message quotes the part that is wrong."""


def parse(text: str) -> tuple[int, ...]:
    """The sorted CPU numbers of a list such as ``0-3,8`` or ``0-31:2/8`` (the first 2 of each 8).

    An empty text is the empty set. Raises CpuListError for anything else, a reversed range included (the kernel refuses
    it too).
    """
    cpus: set[int] = set()
    for part in (piece.strip() for piece in text.split(",")):
        if part:
            cpus.update(_part(part))
        elif text.strip():
            raise CpuListError(f"CPU list {text.strip()!r} has an empty part; write it like 0-3,8")
    return tuple(sorted(cpus))


def _part(part: str) -> list[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise CpuListError(f"{part!r} is no CPU number or range; write it like 0-3,8")
    first = int(match[1])
    last = int(match[2]) if match[2] is not None else first
    if last >= LIMIT:
        raise CpuListError(f"CPU {last} is beyond {LIMIT - 1}, the highest number that Linux knows")
    if last < first:
        raise CpuListError(f"the range {part!r} is reversed; write {last}-{first}")
    if match[3] is None:
        return list(range(first, last + 1))
    used, group = int(match[3]), int(match[4])
    if not 0 < used <= group:
        raise CpuListError(f"{part!r}: {used} of each {group} CPUs cannot be taken")
    return [cpu for cpu in range(first, last + 1) if (cpu - first) % group < used]


def render(cpus: Iterable[int]) -> str:
    """The shortest list of a set of CPUs, as the kernel prints it: ``0-3,8``; empty for none."""
    spans: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def normalise(text: str) -> str:
    """One spelling for each set: two lists mean the same exactly when their normal forms are equal."""
    return render(parse(text))


def mask(cpus: Iterable[int], width: int = 0) -> str:
    """The bitmap of a set of CPUs, as the kernel prints it for ``width`` possible CPUs: ``0,0000010f`` for 36.

    ``width`` 0 is as narrow as the set allows. Raises CpuListError when a CPU does not fit into ``width``.
    """
    wanted = sorted(set(cpus))
    needed = wanted[-1] + 1 if wanted else 1
    if width and needed > width:
        raise CpuListError(f"CPU {needed - 1} does not fit into a mask of {width} CPUs")
    bits = width or needed
    value = sum(1 << cpu for cpu in wanted)
    groups = (bits + _GROUP_BITS - 1) // _GROUP_BITS
    top_digits = ((bits - 1) % _GROUP_BITS + 4) // 4
    texts = [
        f"{value >> (_GROUP_BITS * number) & 0xFFFFFFFF:0{top_digits if number == groups - 1 else 8}x}"
        for number in reversed(range(groups))
    ]
    return ",".join(texts)


def from_mask(text: str) -> tuple[int, ...]:
    """The sorted CPU numbers of a bitmap, ``0x`` and missing commas allowed. Raises CpuListError."""
    stripped = text.strip().lower().removeprefix("0x")
    groups = stripped.split(",")
    if not all(re.fullmatch(r"[0-9a-f]+", group) for group in groups):
        raise CpuListError(f"{text.strip()!r} is no CPU mask; write it like f,0000010f")
    if len(groups) > 1 and any(len(group) > _GROUP_BITS // 4 for group in groups):
        raise CpuListError(f"{text.strip()!r}: a group of a CPU mask has at most 8 digits")
    value = int("".join([groups[0], *(group.zfill(_GROUP_BITS // 4) for group in groups[1:])]), 16)
    if value.bit_length() > LIMIT:
        raise CpuListError(f"the mask names CPU {value.bit_length() - 1}, beyond {LIMIT - 1}")
    return tuple(bit for bit in range(value.bit_length()) if value >> bit & 1)
