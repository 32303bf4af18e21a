# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A directory tree as programs see it, to compare before and after."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any


def view(top: Path) -> dict[str, Any]:
    """Every name with type, mode, owner, times, attributes, content, and the names that share its inode."""
    found: dict[str, Any] = {}
    inodes: dict[int, list[str]] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        name = str(path.relative_to(top))
        found[name] = [stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns]
        found[name].append(
            {n: os.getxattr(path, n, follow_symlinks=False) for n in sorted(os.listxattr(path, follow_symlinks=False))}
        )
        if stat.S_ISREG(status.st_mode):
            found[name].append(path.read_bytes())
            inodes.setdefault(status.st_ino, []).append(name)
        elif stat.S_ISLNK(status.st_mode):
            found[name].append(str(path.readlink()))
    found["hard links"] = sorted(names for names in inodes.values() if len(names) > 1)
    return found
