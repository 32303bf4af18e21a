# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole files that a capability owns: what they are now, and having them as wanted, folders included.

A file is a JSON value, so that the record of earlier state can hold it: content, mode (octal text), uid, gid; None
where there is none. Bytes that are not UTF-8 survive as lone surrogates (PEP 383).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from typing import Any

from ._atomic import fsync_directory, write_atomic
from ._root import Root

# values of the kernel and of the running system: no place for a file that shall be there after a boot
NOT_BELOW = ("/proc", "/sys", "/dev", "/run", "/tmp")  # noqa: S108 - a list of refusals, nothing is written there


@dataclass(frozen=True)
class FileWish:
    """A file as it shall be, owned by who runs this (root). ``mode``: octal text."""

    path: str
    content: str
    mode: str = "0644"

    @property
    def value(self) -> dict[str, Any]:
        mode = f"{int(self.mode, 8):04o}"
        return {"content": self.content, "mode": mode, "uid": os.geteuid(), "gid": os.getegid()}


def check(root: Root, wish: FileWish) -> None:
    """Raises ValueError, before anything is written, on what cannot be had."""
    path = wish.path
    if not path.startswith("/") or posixpath.normpath(path) != path or path == "/":
        raise ValueError(f"{path!r} is not an absolute path of a file")
    if any(path.startswith(f"{top}/") for top in NOT_BELOW):
        raise ValueError(f"{path}: not a place for a file that stays")
    try:
        if not 0 <= int(wish.mode, 8) <= 0o7777:
            raise ValueError
    except ValueError:
        raise ValueError(f"{path}: mode {wish.mode!r} is not octal, like 0644") from None
    real = root.path(path)
    if real.is_symlink() or (real.exists() and not real.is_file()):
        raise ValueError(f"{path} is a link, a folder or a device: move it away, it is not replaced")
    above = real.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{path}: {above} is not a folder")


def read(root: Root, path: str) -> dict[str, Any] | None:
    """The file of now. Raises OSError when it is there and cannot be read."""
    real = root.path(path)
    try:
        status = real.lstat()
        if not stat.S_ISREG(status.st_mode):
            return {"content": f"not a regular file: {stat.filemode(status.st_mode)}"}
        content = real.read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {
        "content": content,
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "uid": status.st_uid,
        "gid": status.st_gid,
    }


def shown(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A file for a difference that people read: its lines one by one."""
    if value is None:
        return None
    rest: dict[str, Any] = {name: value[name] for name in ("mode", "uid", "gid") if name in value}
    return rest | {"lines": value["content"].splitlines()}


def missing_folders(root: Root, path: str) -> list[str]:
    """The folders above a file that are not there, outermost first."""
    found: list[str] = []
    above = posixpath.dirname(path)
    while above != "/" and not root.exists(above):
        found.insert(0, above)
        above = posixpath.dirname(above)
    return found


def write(root: Root, path: str, value: dict[str, Any] | None) -> None:
    """Have a file as it shall be, durably; None removes it. Raises OSError."""
    real = root.path(path)
    if value is None:
        real.unlink(missing_ok=True)
        if real.parent.is_dir():
            fsync_directory(real.parent)
        return
    # 0755 whatever the umask: programs without privileges read these folders
    for folder in missing_folders(root, path):
        root.path(folder).mkdir()
        root.path(folder).chmod(0o755)
    content = value["content"].encode("utf-8", "surrogateescape")
    write_atomic(real, content, mode=int(value["mode"], 8), uid=value["uid"], gid=value["gid"])


def remove_folder(root: Root, path: str) -> bool:
    """Remove a folder when it is empty; says whether it is gone."""
    real = root.path(path)
    if real.is_dir() and not any(real.iterdir()):
        real.rmdir()
    return not real.exists()
