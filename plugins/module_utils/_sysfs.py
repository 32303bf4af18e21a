# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values in /sys by path or shell pattern, and the tmpfiles.d file that sets them again at boot (tmpfiles.d(5)).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from ._root import Root

TOP = "/sys"


def is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def check(path: str) -> None:
    """Raises ValueError on a path that is not below /sys or could leave it."""
    if not path.startswith(f"{TOP}/") or posixpath.normpath(path) != path or any(c in path for c in "\n\t \"'\\"):
        raise ValueError(f"{path!r} is not a path below {TOP}")


def expand(root: Root, path: str) -> list[str]:
    """The existing paths that a pattern means, sorted; a plain path means itself, whether it exists or not."""
    return root.glob(path) if is_pattern(path) else [path]


def line(path: str, value: str) -> str:
    """The tmpfiles.d line that writes a value at boot; a percent sign or a backslash would mean something there."""
    escaped = value.replace("\\", "\\\\").replace("%", "%%")
    return f"w {path.replace('%', '%%')} - - - - {escaped}\n"


def render(values: Mapping[str, str], header: str) -> str:
    """The text of a tmpfiles.d file."""
    return header + "".join(line(path, value) for path, value in sorted(values.items()))
