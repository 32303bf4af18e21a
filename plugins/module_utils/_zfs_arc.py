# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The limits of ZFS's cache (ARC): what the module accepts, in which order, and whether it took them.

Rules of ``arc_tuning_update()`` and ``arc_init()`` in OpenZFS 2.2 to 2.4 (module/zfs/arc.c). A write to
``/sys/module/zfs/parameters/zfs_arc_max`` always succeeds and the file shows the new value, but it counts only when it
is at least 64 MiB, below the machine's memory and above the present minimum; 0 restores nothing. What counts is
``c_min`` and ``c_max`` in ``/proc/spl/kstat/zfs/arcstats``. All sizes are bytes.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ._root import Root

PARAMETERS = "/sys/module/zfs/parameters"
ARCSTATS = "/proc/spl/kstat/zfs/arcstats"
MODPROBE = "/etc/modprobe.d/zfs-organism.conf"
MODPROBE_FOLDERS = (
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/local/lib/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
)
LIMITS = ("zfs_arc_min", "zfs_arc_max")

LOWEST_MIN = 32 << 20
LOWEST_MAX = 64 << 20

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TAKEN = "# taken over by organism.proxmox: "


class ArcError(Exception):
    """A limit that cannot be had; the text has the numbers and the next step."""


@dataclass(frozen=True)
class Limits:
    """``minimum`` is None where it is left to ZFS."""

    minimum: int | None
    maximum: int


@dataclass(frozen=True)
class Live:
    """The running module: what it uses (``c_min``, ``c_max``, ``size``) and the texts of its parameters."""

    c_min: int
    c_max: int
    size: int
    parameters: Mapping[str, str]


def parse_size(text: str | int) -> int:
    """Bytes of ``8GiB``, ``512M`` (binary units) or a plain number. Raises ValueError."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write bytes, or a number with K, M, G or T (binary units)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def human(size: int) -> str:
    """A size for people, in GiB or MiB."""
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def memory(root: Root) -> int:
    """The machine's memory in bytes. Raises ArcError."""
    for line in (root.read_or_none("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ArcError("/proc/meminfo does not tell MemTotal, so the ARC's limit cannot be checked against it")


def live(root: Root) -> Live | None:
    """The running module, None where it is not loaded. Raises ArcError when it does not tell what it uses."""
    if not root.exists(PARAMETERS):
        return None
    stats = {}
    for line in (root.read_or_none(ARCSTATS) or "").splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2].isdigit():
            stats[fields[0]] = int(fields[2])
    try:
        return Live(
            stats["c_min"], stats["c_max"], stats["size"],
            {name: (root.read_or_none(f"{PARAMETERS}/{name}") or "").strip() for name in LIMITS},
        )  # fmt: skip
    except KeyError as missing:
        raise ArcError(f"the zfs module is loaded and {ARCSTATS} has no {missing.args[0]}") from None


def refusal(limits: Limits, ram: int, now: Live | None) -> str | None:
    """Why ZFS would ignore these limits in silence, or None."""
    top, low = limits.maximum, limits.minimum
    if top < LOWEST_MAX:
        return f"arc_max {human(top)} is below the 64 MiB that ZFS accepts"
    if top >= ram:
        return f"arc_max {human(top)} is not below this machine's memory of {human(ram)}"
    if low is not None and low < LOWEST_MIN:
        return f"arc_min {human(low)} is below the 32 MiB that ZFS accepts"
    if low is not None and low >= top:
        return f"arc_min {human(low)} is not below arc_max {human(top)}, and ZFS ignores such a maximum"
    if low is None and now is not None and top <= now.c_min:
        return (
            f"arc_max {human(top)} is not above the minimum of {human(now.c_min)} that the running module uses, and "
            f"would be ignored: give arc_min too, at most {human(top // 2)}"
        )
    return None


def steps(limits: Limits, now: Live) -> list[tuple[str, int]]:
    """The writes, in an order in which each is accepted: a maximum must be above the minimum of that moment, and a
    minimum at most the maximum of that moment."""
    low = [("zfs_arc_min", limits.minimum)] if limits.minimum is not None and limits.minimum != now.c_min else []
    top = [("zfs_arc_max", limits.maximum)] if limits.maximum != now.c_max else []
    return [*top, *low] if limits.maximum > now.c_min else [*low, *top]


def untaken(limits: Limits, now: Live) -> str | None:
    """Which limit the module does not use although it was written, or None."""
    if now.c_max != limits.maximum:
        return f"zfs_arc_max was written as {limits.maximum}, and c_max in {ARCSTATS} is {now.c_max}"
    if limits.minimum is not None and now.c_min != limits.minimum:
        return f"zfs_arc_min was written as {limits.minimum}, and c_min in {ARCSTATS} is {now.c_min}"
    return None


def render(limits: Limits) -> str:
    """The modprobe file."""
    low = f"zfs_arc_min={limits.minimum} " if limits.minimum is not None else ""
    return (
        "# ARC limits in bytes, of organism.proxmox. Take them back with the module zfs_arc, state=absent.\n"
        f"options zfs {low}zfs_arc_max={limits.maximum}\n"
    )


def _options(line: str) -> list[str] | None:
    """The words behind ``options zfs`` of a line of modprobe.d(5), else None."""
    words = line.split()
    return words[2:] if words[:2] == ["options", "zfs"] else None


def _is_limit(word: str) -> bool:
    return word.split("=", 1)[0] in LIMITS


def rivals(root: Root) -> dict[str, str]:
    """Other modprobe files that set a limit, with their texts; of files of one name the first folder's counts."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for folder in MODPROBE_FOLDERS:
        for name in root.listdir(folder):
            path = f"{folder}/{name}"
            if not name.endswith(".conf") or name in seen:
                continue
            seen.add(name)
            text = root.read_or_none(path) or ""
            if path != MODPROBE and any(_is_limit(word) for line in text.splitlines() for word in _options(line) or ()):
                found[path] = root.path(path).read_text(encoding="utf-8")
    return found


def cmdline_rivals(root: Root) -> list[str]:
    """Limits on the kernel's command line: modprobe heeds these after all files."""
    words = (root.read_or_none("/proc/cmdline") or "").split()
    return [word for word in words if word.startswith("zfs.") and _is_limit(word[len("zfs.") :])]


def without_limits(text: str) -> str:
    """A modprobe file whose limits are commented out; other options of the same line stay in force."""
    out = []
    for line in text.splitlines(keepends=True):
        words = _options(line) or []
        if not any(_is_limit(word) for word in words):
            out.append(line)
            continue
        out.append(f"{_TAKEN}{line}" if line.endswith("\n") else f"{_TAKEN}{line}\n")
        others = [word for word in words if not _is_limit(word)]
        if others:
            out.append(f"options zfs {' '.join(others)}\n")
    return "".join(out)


def with_limits_again(text: str) -> str:
    """The opposite of ``without_limits``, also for a file that somebody has edited since."""
    lines = text.splitlines(keepends=True)
    out, number = [], 0
    while number < len(lines):
        line = lines[number]
        if line.startswith(_TAKEN):
            original = line[len(_TAKEN) :]
            out.append(original)
            others = [word for word in _options(original) or [] if not _is_limit(word)]
            if others and number + 1 < len(lines) and _options(lines[number + 1]) == others:
                number += 1
        else:
            out.append(line)
        number += 1
    return "".join(out)


def over(now: Live) -> bool:
    """Is more cached than the limit allows, by more than what is in flight (a sixteenth, at least 32 MiB)?"""
    return now.size > now.c_max + max(now.c_max >> 4, 32 << 20)


@dataclass
class Shrink:
    """How the cache came down: sizes in bytes, a sample each half second at most."""

    before: int
    after: int
    target: int
    converged: bool
    samples: list[int]

    def as_result(self) -> dict[str, Any]:
        return dict(vars(self))


def shrink(read: Callable[[], Live], reclaim: Callable[[], None], wait: Callable[[], bool], keep: int = 60) -> Shrink:
    """Ask for reclaim until the cache is at its limit or ``wait`` says that the time is up (it pauses otherwise).

    Lowering the limit frees nothing by itself: the evict thread is woken by new allocations or by reclaim only.
    """
    now = first = read()
    samples = [now.size]
    while over(now):
        reclaim()
        now = read()
        samples.append(now.size)
        if not over(now) or not wait():
            break
    step = max(1, len(samples) // keep)
    return Shrink(first.size, now.size, now.c_max, not over(now), samples[::step])
