# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copying one file, one name or one tree with all that it has: holes, owners, modes, attributes, ACLs, times, nodes.

Everything is written to a name that nobody uses yet; files that exist are replaced by a rename, never written into, so
that an inode shared between two generations stays what it was.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ._overlay import Entry, entry_or_none, read_entry
from ._ramlayer_manifest import Item

CHUNK = 128 * 1024
_ZERO = bytes(CHUNK)
_FICLONE = 0x40049409  # ioctl_ficlone(2)
# "this file system cannot" and "these two cannot share": then the content is copied
_NO_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY,
             errno.EAGAIN)  # fmt: skip
_NODES = {"whiteout": stat.S_IFCHR, "char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO,
          "socket": stat.S_IFSOCK}  # fmt: skip


class Damaged(Exception):
    """What was read is not what the manifest promises; the text names the path."""


def _chunks(descriptor: int, size: int, sparse: bool) -> Iterator[tuple[int, bytes]]:
    """``(index, bytes)`` of the aligned chunks that hold anything but zeros; holes are not read."""
    offset = 0
    while offset < size:
        if sparse:
            try:
                offset = os.lseek(descriptor, offset, os.SEEK_DATA) // CHUNK * CHUNK
            except OSError as error:
                if error.errno != errno.ENXIO:  # a hole up to the end
                    raise
                return
        data = os.pread(descriptor, min(CHUNK, size - offset), offset)
        if not data:
            return
        if data != _ZERO[: len(data)]:
            yield offset // CHUNK, data
        offset += CHUNK


def _open(path: str) -> int:
    # never follow what a job may have put there meanwhile, and leave no trace in the time of access
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC)


def _carry(source: int, target: int | None) -> str:
    """The digest of a file's content, which is also written to ``target``."""
    status = os.fstat(source)
    seen = hashlib.sha256(str(status.st_size).encode())
    reached = 0
    for index, data in _chunks(source, status.st_size, status.st_blocks * 512 < status.st_size):
        seen.update(index.to_bytes(8, "big"))
        seen.update(data)
        if target is not None:
            view = memoryview(data)
            offset = index * CHUNK
            while view:
                written = os.pwrite(target, view, offset)
                view, offset = view[written:], offset + written
            reached = offset
    if target is not None and reached != status.st_size:
        os.ftruncate(target, status.st_size)
    return seen.hexdigest()[:32]


def digest(path: str | Path) -> str:
    """SHA-256 (its first 128 bits, in hex) of a file's size and content; it does not depend on where its holes are."""
    source = _open(str(path))
    try:
        return _carry(source, None)
    finally:
        os.close(source)


def copy_content(source: str | Path, target: str | Path, like: Item | Entry | None = None) -> str:
    """Copy a file's content to a name that does not exist; returns its digest. Raises OSError.

    ``like`` is the metadata that the copy gets.
    """
    reader = _open(str(source))
    try:
        mode = 0o600 if like is None else like.mode & 0o777
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            found = _carry(reader, writer)
            if like is not None:
                _apply_open(writer, like)
            return found
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def clone_content(source: str | Path, target: str | Path) -> bool:
    """Share a file's blocks with a new name (FICLONE); False where the file system cannot. Raises OSError else."""
    reader = _open(str(source))
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(writer, _FICLONE, reader)
            return True
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            os.unlink(target)  # noqa: PTH108 - may be text
            return False
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def apply(path: str, item: Item | Entry) -> None:
    """Give a new name its owner, mode, attributes (ACLs and file capabilities are some) and times.

    In the order that keeps each: chown(2) drops capabilities and set-id bits, chmod(2) rewrites an ACL's mask.
    """
    os.chown(path, item.uid, item.gid, follow_symlinks=False)
    if item.kind != "link":
        os.chmod(path, item.mode)  # noqa: PTH101 - many, and as text
    for name, value in item.attributes:
        os.setxattr(path, name, value, follow_symlinks=False)
    os.utime(path, ns=(item.mtime_ns, item.mtime_ns), follow_symlinks=False)


def _apply_open(descriptor: int, item: Item | Entry) -> None:
    """As ``apply``, for a file that was just made: what it has already is not set again."""
    made = os.fstat(descriptor)
    chown = (made.st_uid, made.st_gid) != (item.uid, item.gid)
    if chown:
        os.chown(descriptor, item.uid, item.gid)
    if chown or stat.S_IMODE(made.st_mode) != item.mode:
        os.chmod(descriptor, item.mode)
    for name, value in item.attributes:
        os.setxattr(descriptor, name, value)
    os.utime(descriptor, ns=(item.mtime_ns, item.mtime_ns))


def apply_to_directory(path: str, item: Item | Entry) -> None:
    """As ``apply``, for a directory that may have attributes which it should not keep."""
    wanted = {name for name, _value in item.attributes}
    for name, _value in read_entry(path).attributes:
        if name not in wanted:
            os.removexattr(path, name)
    apply(path, item)


def make(path: str, item: Item | Entry) -> None:
    """Make anything but a regular file under a name that does not exist, with its metadata. Raises OSError."""
    if item.kind == "dir":
        os.mkdir(path, 0o700)  # noqa: PTH102 - many, and as text
    elif item.kind == "link":
        os.symlink(item.target, path)  # noqa: PTH211 - the bytes as they are: Path would normalise "./x" to "x"
    else:
        os.mknod(path, _NODES[item.kind] | 0o600, 0 if item.kind in ("whiteout", "fifo", "socket") else item.rdev)
    if item.kind != "whiteout":
        apply(path, item)


def fill_tree(source: Path, target: Path, items: dict[str, Item]) -> None:
    """Copy a generation into an empty directory, its files checked against their digests.

    Raises Damaged for a file that is not what the manifest says, OSError for what the system refuses.
    """
    for path in sorted(items):
        item, name = items[path], f"{target}/{path}"
        if path == ".":
            continue
        if item.kind != "file":
            make(name, item)
        elif item.link and item.link != path:
            os.link(f"{target}/{item.link}", name)
        else:
            try:
                found = copy_content(f"{source}/{path}", name, item)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise Damaged(f"{path} is missing") from error
            if found != item.digest:
                raise Damaged(f"{path} has another content than was saved")
    mend_directories(target, items, (path for path, item in items.items() if item.kind == "dir"))


def merge_tree(source: Path, target: Path, items: dict[str, Item]) -> None:
    """Copy a generation over a tree that exists: files are replaced, directories kept. Whiteouts are not copied.

    Raises Damaged before anything is written under a name whose source is not what the manifest says.
    """
    for path in sorted(items):
        item, name = items[path], f"{target}/{path}"
        if item.kind == "whiteout" or path == ".":
            continue
        there = entry_or_none(name)
        if item.kind == "dir":
            if there is None:
                make(name, item)
            continue
        temporary = f"{name.rpartition('/')[0]}/.merging-{os.getpid()}"
        if os.path.lexists(temporary):
            os.unlink(temporary)  # noqa: PTH108 - as text
        if item.kind != "file":
            make(temporary, item)
        elif item.link and item.link != path:
            os.link(f"{target}/{item.link}", temporary)
        else:
            if copy_content(f"{source}/{path}", temporary) != item.digest:
                os.unlink(temporary)  # noqa: PTH108 - as text
                raise Damaged(f"{path} has another content than was saved")
            apply(temporary, item)
        os.replace(temporary, name)  # noqa: PTH105 - as text
        if os.path.lexists(temporary):  # rename(2) of two names of one inode does nothing
            os.unlink(temporary)  # noqa: PTH108 - as text
    mend_directories(target, items, (path for path, item in items.items() if item.kind == "dir"))


def mend_directories(top: Path, items: dict[str, Item], paths: Iterable[str]) -> None:
    """Directories' metadata, the deepest first: making a name in one changes its time."""
    for path in sorted(paths, reverse=True):
        apply_to_directory(str(top) if path == "." else f"{top}/{path}", items[path])


def remove(path: str) -> None:
    """Remove whatever has this name; nothing is no error."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)  # noqa: PTH108 - as text
    except FileNotFoundError:
        return


def sync_filesystem(descriptor: int) -> None:
    """syncfs(2): everything written to the file system of an open file is on the disk after it. Raises OSError.

    An error of writing back that happened since the descriptor was opened is one, too (Linux 5.8 and later).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"not written through: {os.strerror(code)}")
