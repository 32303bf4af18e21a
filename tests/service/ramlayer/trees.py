# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A layer on real mounts, a tree as programs see it, and operations that programs make."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from organism.core import _ramlayer as ramlayer
from organism.core._overlay import mounts
from organism.core._ramlayer import Layer
from organism.core._root import Root

ROOT = Root()
Operation = Callable[[Path, str, str, int], None]


def make_layer(top: Path, *, size_mb: int = 64, keep: int = 3, disk: Path | None = None) -> Layer:
    """A layer below ``top``, its persistent side on ``disk``; base holds something of each kind."""
    disk = disk or top / "data"
    layer = Layer("gpu0", top / "run/gpu0", disk / "base", disk / "persist", top / "srv/gpu0", size_mb, keep)
    if not layer.base.exists():
        for folder in ("a", "b/c", "d"):
            (layer.base / folder).mkdir(parents=True)
        for name in ("a/x", "a/y", "b/c/x", "b/z", "d/x", "x"):
            (layer.base / name).write_bytes(name.encode() * 700)
        (layer.base / "d/y").symlink_to("../a/x")
    return layer


def unmount_all(top: Path) -> None:
    """What a power cut does to RAM. Lazily: a test that failed may have left something open."""
    for found in reversed(mounts(ROOT)):
        if found.target.startswith(f"{top}/") and found.kind in ("overlay", "tmpfs"):
            subprocess.run(["umount", "-l", found.target], check=True)


def view(layer: Layer) -> dict[str, Any]:
    """Every name that programs see with type, mode, owner, time, attributes and content, and the names that are one
    file. That is asked of upper: overlayfs may show two inode numbers for one file until it forgets the older one."""
    top = layer.merged
    found: dict[str, Any] = {}
    inodes: dict[int, list[str]] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        name = str(path.relative_to(top))
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in sorted(os.listxattr(path, follow_symlinks=False))
        }
        entry: list[Any] = [stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, attributes]
        if stat.S_ISREG(status.st_mode):
            entry.append(path.read_bytes())
            if os.path.lexists(layer.upper / name):
                inodes.setdefault((layer.upper / name).lstat().st_ino, []).append(name)
        elif stat.S_ISLNK(status.st_mode):
            entry.append(str(path.readlink()))
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            entry.append(status.st_rdev)
        found[name] = entry
    found["hard links"] = sorted(sorted(names) for names in inodes.values() if len(names) > 1)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names in which two views differ, for messages."""
    return [f"{name}: {one.get(name)!r:.300} != {other.get(name)!r:.300}"
            for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]  # fmt: skip


def crash_and_restore(layer: Layer, top: Path) -> str:
    """RAM is lost; what the next start says."""
    unmount_all(top)
    return ramlayer.mount(layer, ROOT)


# ---- operations, all through the merged view; each leaves a tree alone that it does not fit --------------------------


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _parent_ready(path: Path) -> bool:
    return path.parent.is_dir() and not path.parent.is_symlink()


def _regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def write(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if _parent_ready(path) and (_regular(path) or not os.path.lexists(path)):
        path.write_bytes(bytes([seed % 256]) * (seed * 37 % 9000))


def overwrite_same_size(top: Path, name: str, other: str, seed: int) -> None:
    """Content alone changes: size and, by utime, mtime stay."""
    path = top / name
    if _regular(path):
        status = path.stat()
        with path.open("r+b") as stream:
            stream.write(bytes([seed % 251]) * min(status.st_size, 50))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def store_through_mapping(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if _regular(path) and path.stat().st_size:
        with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
            mapped[: min(len(mapped), 9)] = bytes([seed % 253]) * min(len(mapped), 9)


def truncate(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if _regular(path):
        os.truncate(path, seed * 1031 % 300_000)  # growing makes a hole


def rename(top: Path, name: str, other: str, seed: int) -> None:
    source, target = top / name, top / other
    if not os.path.lexists(source) or not _parent_ready(target) or f"{target}/".startswith(f"{source}/"):
        return
    if f"{source}/".startswith(f"{target}/"):
        return
    if source.is_dir() != target.is_dir() or source.is_symlink() or target.is_symlink():
        _clear(target)
    elif target.is_dir():
        shutil.rmtree(target)
    try:
        source.rename(target)
    except OSError:  # a directory that base has (EXDEV without redirect_dir): as mv(1) does then
        shutil.copytree(source, target, symlinks=True, copy_function=_copy)
        shutil.rmtree(source)


def _copy(source: str, target: str) -> str:
    if stat.S_ISREG(os.lstat(source).st_mode):
        return str(shutil.copy2(source, target))
    os.mknod(target, os.lstat(source).st_mode, os.lstat(source).st_rdev)
    return target


def delete(top: Path, name: str, other: str, seed: int) -> None:
    _clear(top / name)


def recreate_as(top: Path, name: str, other: str, seed: int) -> None:
    """Another type under the same name."""
    path = top / name
    if not _parent_ready(path):
        return
    _clear(path)
    makers: list[Callable[[], object]] = [
        path.mkdir, lambda: path.symlink_to(f"../{other}"), lambda: path.write_bytes(b"r" * (seed % 5000)),
        lambda: os.mkfifo(path), lambda: _socket(path),
        lambda: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, seed % 8)),
    ]  # fmt: skip
    makers[seed % len(makers)]()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")  # a path may be longer than an address
        finally:
            os.close(here)


def make_directory(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if _parent_ready(path) and not os.path.lexists(path):
        path.mkdir(mode=0o700 + seed % 64)


def replace_directory(top: Path, name: str, other: str, seed: int) -> None:
    """rm -r and mkdir of the same name: opaque where base has it."""
    path = top / name
    if path.is_dir() and not path.is_symlink() and path != top:
        shutil.rmtree(path)
        path.mkdir()
        (path / "new").write_bytes(bytes([seed % 256]) * 10)


def attribute(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if _regular(path) or (path.is_dir() and not path.is_symlink()):
        key = ("user.tag", "trusted.note", "user.other")[seed % 3]
        if seed % 4 == 3 and key in os.listxattr(path):
            os.removexattr(path, key)
        else:
            os.setxattr(path, key, str(seed).encode())


def access_list(top: Path, name: str, other: str, seed: int) -> None:
    """A POSIX ACL, in the kernel's own form: user::rw-, user:SEED:r--, group::r--, mask::r--, other::---."""
    path = top / name
    if _regular(path):
        rows = [(1, 6, 0xFFFFFFFF), (2, 4, seed), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
        value = (2).to_bytes(4, "little") + b"".join(
            tag.to_bytes(2, "little") + permission.to_bytes(2, "little") + who.to_bytes(4, "little")
            for tag, permission, who in rows
        )
        os.setxattr(path, "system.posix_acl_access", value)


def hard_link(top: Path, name: str, other: str, seed: int) -> None:
    source, target = top / name, top / other
    if _regular(source) and _parent_ready(target) and not os.path.lexists(target):
        target.hardlink_to(source)


def owner_and_mode(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if os.path.lexists(path):
        os.chown(path, seed % 5000, seed % 700, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o600 + seed % 64)


def times(top: Path, name: str, other: str, seed: int) -> None:
    path = top / name
    if os.path.lexists(path):
        os.utime(path, ns=(seed, 1_500_000_000_000_000_000 + seed), follow_symlinks=False)


def punch(top: Path, name: str, other: str, seed: int) -> None:
    """A file with holes: data at two places, nothing between."""
    path = top / name
    if _parent_ready(path) and (_regular(path) or not os.path.lexists(path)):
        with path.open("wb") as stream:
            stream.seek(seed * 4099 % 700_000)
            stream.write(b"island")
            stream.truncate(stream.tell() + seed % 400_000)


OPERATIONS = (write, overwrite_same_size, store_through_mapping, truncate, rename, delete, recreate_as, make_directory,
              replace_directory, attribute, access_list, hard_link, owner_and_mode, times, punch)  # fmt: skip
