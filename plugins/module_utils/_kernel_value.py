# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One value of the kernel in /proc/sys or /sys: read in normal form, compared by meaning, written and read back.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable
from typing import Any

from ._root import Root

# A value here must be one of the words in the file beside it, or the kernel answers EINVAL (cpufreq, timekeeping).
_LISTED_IN = {
    "scaling_governor": "scaling_available_governors",
    "energy_performance_preference": "energy_performance_available_preferences",
    "current_clocksource": "available_clocksource",
}
# The kernel loads a scheduler's module on the first write, so this file lists only those that are there already.
_OPEN_LISTS = ("scheduler",)

Writer = Callable[[Root, str, str], None]


class KernelRefused(Exception):
    """The kernel did not take a value; the text names path, value and what it answered."""


def normal(value: Any) -> str:
    """A value as the kernel writes it: booleans as 1 and 0, one blank between the numbers of a vector."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return " ".join(str(value).split())


def same(one: str, other: str) -> bool:
    """Do two values in normal form mean the same? 010 is 10, and Y of a module's parameter is 1."""
    if one == other:
        return True
    left, right = one.split(), other.split()
    return len(left) == len(right) and all(_word(a) == _word(b) for a, b in zip(left, right, strict=True))


def _word(word: str) -> str | int:
    try:
        return int(word)
    except ValueError:
        return {"Y": 1, "N": 0}.get(word, word)


def choices(text: str) -> list[str] | None:
    """The words of a choice (``always [madvise] never``), or None when the text is not one."""
    words = text.split()
    if sum(word.startswith("[") and word.endswith("]") for word in words) != 1:
        return None
    return [word.strip("[]") for word in words]


def read(root: Root, path: str) -> str:
    """The value in normal form; of a choice the chosen word. Raises OSError."""
    text = root.read(path)
    if path.startswith("/sys/") and choices(text) is not None:
        return next(word.strip("[]") for word in text.split() if word.startswith("["))
    return normal(text)


def obstacle(root: Root, path: str) -> str | None:
    """Why a value cannot be set here, or None: looked up without writing anything."""
    real = root.path(path)
    try:
        mode = real.stat().st_mode
    except OSError as error:
        return "does not exist on this kernel" if error.errno == errno.ENOENT else str(error.strerror)
    if real.is_dir():
        return "is a folder, not a value"
    # The mode says it for root too: the kernel refuses to open a value for writing that has no write bit.
    if not mode & 0o222:
        return "is read-only"
    if not os.access(real, os.W_OK):
        return "cannot be written here (a container, or not root?)"
    if not mode & 0o444:
        return "is write-only: it triggers something and has no state to keep"
    try:
        read(root, path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def not_among(root: Root, path: str, value: str) -> str | None:
    """Why this value is none of those that the kernel offers at this path; None when it is, or there is no list."""
    name = posixpath.basename(path)
    if name in _OPEN_LISTS or not path.startswith("/sys/"):
        return None
    beside = _LISTED_IN.get(name)
    text = root.read_or_none(f"{posixpath.dirname(path)}/{beside}" if beside else path)
    offered = text.split() if text and beside else choices(text or "")
    if not offered or value in offered:
        return None
    return f"offers {' '.join(offered)}, and not {value}"


def write(root: Root, path: str, value: str) -> None:
    """One write() with the whole value, as the kernel's parsers want it. Raises OSError."""
    descriptor = os.open(root.path(path), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(descriptor, value.encode() + b"\n")
    finally:
        os.close(descriptor)


def set_and_verify(root: Root, path: str, value: str, writer: Writer = write) -> None:
    """Write a value and demand that the kernel shows it afterwards.

    A value that was altered is put back to what it was, so that no half of it stays. Raises KernelRefused.
    """
    before = read(root, path)
    try:
        writer(root, path, value)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise KernelRefused(f"{path}: the kernel refused {value!r} ({name}: {error.strerror})") from error
    after = read(root, path)
    if same(after, value):
        return
    text = f"{path}: wrote {value!r}, and the kernel made it {after!r}"
    try:
        writer(root, path, before)
    except OSError as error:
        raise KernelRefused(f"{text}; putting back {before!r} failed: {error.strerror}") from error
    raise KernelRefused(f"{text}; {read(root, path)!r} is back")
