# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names, files and precedence of sysctl values (sysctl.d(5), sysctl(8)).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from ._kernel_value import normal, same
from ._root import Root

TOP = "/proc/sys"
# sysctl.d(5): a file of the same name in an earlier folder hides one in a later.
FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d", "/lib/sysctl.d")
# Setting one of these zeroes its other half (kernel, mm/page-writeback.c), so that half must be remembered too.
OTHER_HALF = {
    f"{TOP}/vm/dirty_ratio": f"{TOP}/vm/dirty_bytes",
    f"{TOP}/vm/dirty_background_ratio": f"{TOP}/vm/dirty_background_bytes",
}
OTHER_HALF |= {half: ratio for ratio, half in OTHER_HALF.items()}


@dataclass(frozen=True)
class Overruled:
    """A file that is read after ours at boot and sets the same name to something else."""

    name: str
    file: str
    line: int
    value: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value} in {self.file}, line {self.line}"


def path_of(name: str) -> str:
    """``vm.swappiness`` -> ``/proc/sys/vm/swappiness``; the first separator decides what the other one means.

    Raises ValueError on a name that leaves /proc/sys or holds a pattern.
    """
    first = next((character for character in name if character in "./"), "/")
    relative = name.translate(str.maketrans("./", "/.")) if first == "." else name
    path = posixpath.normpath(f"{TOP}/{relative}")
    if not name or name.startswith(("/", ".", "-")) or any(c in name for c in "*?[]= \t\n") or ".." in relative:
        raise ValueError(f"{name!r} is not the name of a sysctl")
    if not path.startswith(f"{TOP}/"):
        raise ValueError(f"{name!r} is not below {TOP}")
    return path


def render(values: Mapping[str, str], header: str) -> str:
    """The text of a sysctl.d file."""
    return header + "".join(f"{name} = {value}\n" for name, value in sorted(values.items()))


def lines(text: str) -> list[tuple[int, str, str]]:
    """(line number, name, value) of each assignment in a sysctl.d file."""
    found = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#;" or "=" not in line:
            continue
        name, value = (part.strip() for part in line.split("=", 1))
        found.append((number, name.removeprefix("-"), normal(value)))
    return found


def overruled(root: Root, file: str, values: Mapping[str, str]) -> list[Overruled]:
    """What other files, read after ``file`` at boot, make of these values (name to value in normal form)."""
    wanted = {path_of(name): (name, value) for name, value in values.items()}
    ours = posixpath.basename(file)
    read: dict[str, str] = {}
    for folder in FOLDERS:
        for name in root.listdir(folder):
            if name.endswith(".conf") and name > ours:
                read.setdefault(name, f"{folder}/{name}")
    last: dict[str, Overruled] = {}
    for _name, other in sorted(read.items()):
        for number, name, value in lines(root.read_or_none(other) or ""):
            try:
                path = path_of(name)
            except ValueError:
                continue  # a pattern; a plain name elsewhere has precedence over it (sysctl.d(5))
            if path in wanted:
                last[path] = Overruled(wanted[path][0], other, number, value)
    return [found for path, found in sorted(last.items()) if not same(found.value, wanted[path][1])]
