# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlay file systems: what is mounted, what a directory tree holds, and which of it is overlay bookkeeping.

Facts from the kernel's Documentation/filesystems/overlayfs.rst: a deleted name is a character device 0/0 in upper (a
whiteout), a directory that hides the lower one carries ``trusted.overlay.opaque`` = ``y``, and changing upper or lower
underneath a mounted overlay is undefined.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ._root import Root

# Explicit, so that a distribution's module parameters cannot change what lies on disk: no index, no metadata-only
# copies and no redirects means that upper is plain files, whiteouts and opaque directories. xino=off: what stat(2) says
# of a file is its inode in upper. strictatime: most stores through a shared mapping change neither mtime nor ctime
# on tmpfs, but mmap(2) sets the time of access: that is how a sync finds files that were mapped and are not any more.
OPTIONS = "index=off,metacopy=off,redirect_dir=off,xino=off,strictatime"
# The only overlay attribute with a meaning beyond one mount. origin and impure name inodes of the lower file system
# that was mounted then; restoring them over another mount would be a lie.
KEPT_ATTRIBUTES = frozenset({"trusted.overlay.opaque"})
_OVERLAY = "trusted.overlay."
_NESTED = "trusted.overlay.overlay."  # an overlay's own attributes within an overlay are escaped so: they are a user's
# XFS shows root the store of its ACLs as well, which system.posix_acl_* tell already: a copy elsewhere has none of it
_STORES = frozenset({"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"})
_OCTAL = re.compile(r"\\([0-7]{3})")


class LayerError(Exception):
    """A layer could not be brought where it was asked to be; the text names it, the reason and the next step."""


@dataclass(frozen=True)
class Mount:
    """One line of ``/proc/self/mountinfo``; ``options`` joins the mount's own and the file system's."""

    target: str
    kind: str
    source: str
    options: frozenset[str]

    def option(self, name: str) -> str | None:
        """The value of ``name=value``, or None."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(f"{name}=")), None)


def parse_mountinfo(text: str) -> list[Mount]:
    """Mounts in the order in which they were made (proc(5)); blanks in paths are octal escapes there."""
    found = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if separator and len(fields) >= 6 and len(tail) >= 3:
            options = frozenset(fields[5].split(",")) | frozenset(tail[2].split(","))
            found.append(Mount(_plain(fields[4]), tail[0], _plain(tail[1]), options))
    return found


def mounts(root: Root) -> list[Mount]:
    return parse_mountinfo(root.read("/proc/self/mountinfo"))


def mount_at(found: Iterable[Mount], path: str | os.PathLike[str]) -> Mount | None:
    """The mount on a path that is on top there, or None."""
    wanted = os.path.normpath(path)
    top = None
    for mount in found:
        if mount.target == wanted:
            top = mount
    return top


def holding_mount(found: Iterable[Mount], path: str | os.PathLike[str]) -> Mount | None:
    """The mount whose file system a path (that need not exist) belongs to."""
    wanted = os.path.normpath(path)
    best = None
    for mount in found:
        inside = mount.target == "/" or wanted == mount.target or wanted.startswith(mount.target + "/")
        if inside and (best is None or len(mount.target) >= len(best.target)):
            best = mount
    return best


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), text)


class Entry(NamedTuple):
    """One name of a tree with everything that a copy has to keep, and the inode that tells its hard links.

    ``kind`` is ``file``, ``dir``, ``link``, ``whiteout``, ``fifo``, ``socket``, ``char`` or ``block``; ``allocated`` is
    bytes of blocks. ``ctime_ns`` and ``atime_ns`` tell whether it was touched since; copies do not keep them.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int = 0
    target: str = ""
    attributes: tuple[tuple[str, bytes], ...] = ()
    inode: int = 0
    links: int = 1
    allocated: int = 0
    ctime_ns: int = 0
    atime_ns: int = 0

    @property
    def opaque(self) -> bool:
        return ("trusted.overlay.opaque", b"y") in self.attributes

    @property
    def state(self) -> tuple[object, ...]:
        """What two copies of the same thing have in common. A whiteout is only its name."""
        if self.kind == "whiteout":
            return (self.kind,)
        return (
            self.kind, self.mode, self.uid, self.gid, self.mtime_ns, self.attributes,
            self.size if self.kind == "file" else 0, self.rdev if self.kind in ("char", "block") else 0, self.target,
        )  # fmt: skip


def read_entry(path: Path | str) -> Entry:
    """One name, its link not followed. Raises OSError."""
    status = os.lstat(path)
    kind, target = _kind(status), ""
    if kind == "link":
        target = os.readlink(path)  # noqa: PTH115 - the bytes as they are: Path would normalise "./x" to "x"
    attributes = () if kind == "whiteout" else _attributes(path)
    return Entry(
        kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns,
        status.st_rdev, target, attributes, status.st_ino, status.st_nlink, status.st_blocks * 512,
        status.st_ctime_ns, status.st_atime_ns,
    )  # fmt: skip


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo",
          stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block"}  # fmt: skip


def _kind(status: os.stat_result) -> str:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    return "whiteout" if kind == "char" and status.st_rdev == 0 else kind


def _attributes(path: Path | str) -> tuple[tuple[str, bytes], ...]:
    found = []
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        if name in _STORES:
            continue
        if name in KEPT_ATTRIBUTES or name.startswith(_NESTED) or not name.startswith(_OVERLAY):
            try:
                found.append((name, os.getxattr(path, name, follow_symlinks=False)))
            except OSError as error:
                if error.errno != errno.ENODATA:  # removed since it was listed
                    raise
    return tuple(found)


def scan(top: Path, below: str = ".") -> dict[str, Entry]:
    """Every name of a tree by its relative path, parents first; ``.`` is the directory itself.

    ``below`` restricts it to one name and what is under it. A name that disappears while the tree is read is left out:
    a live layer is allowed to change. Raises OSError else.
    """
    found: dict[str, Entry] = {below: read_entry(top if below == "." else f"{top}/{below}")}
    pending = [("" if below == "." else f"{below}/")] if found[below].kind == "dir" else []
    while pending:
        folder = pending.pop()
        try:
            names = sorted(os.listdir(f"{top}/{folder}"))  # noqa: PTH208 - names are wanted, and many
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            relative = f"{folder}{name}"
            try:
                entry = read_entry(f"{top}/{relative}")
            except FileNotFoundError:
                continue
            found[relative] = entry
            if entry.kind == "dir":
                pending.append(f"{relative}/")
    return found


def link_groups(entries: Mapping[str, Entry]) -> set[frozenset[str]]:
    """The sets of names that are one file. Whiteouts do not count: overlayfs shares one inode among them."""
    groups: dict[int, list[str]] = {}
    for path, entry in entries.items():
        if entry.kind == "file" and entry.links > 1:
            groups.setdefault(entry.inode, []).append(path)
    return {frozenset(paths) for paths in groups.values() if len(paths) > 1}


def without_clean(
    upper: Mapping[str, Entry], base: Path, *, fresh: Collection[str] | None = None, dirty: Collection[str] = ()
) -> dict[str, Entry]:
    """Upper without what only mirrors base: copies made by prewarming, and the directories that lead to nothing else.

    Leaving them out changes nothing in the merged view, so that promoted files are neither written to disk at each sync
    nor hide a newer file of base after a restart. Contents are not read; ``dirty`` names what is known to differ.
    ``fresh`` restricts the comparison: all other names are clean unless they are ``dirty``.
    """
    lower: dict[str, Entry | None] = {}

    def shown(path: str) -> Entry | None:
        """What base has under a path, where upper lets it show through."""
        if path not in lower:
            # below an opaque directory, or one that base does not have, nothing of base shows through
            over = None if path == "." else upper.get(parent(path))
            visible = path == "." or (
                over is not None and not over.opaque and over.kind == "dir"
                and (beneath := shown(parent(path))) is not None and beneath.kind == "dir"
            )  # fmt: skip
            lower[path] = entry_or_none(base / path) if visible else None
        return lower[path]

    def mirrors(path: str, entry: Entry) -> bool:
        # hard links in upper are recorded as such, a copy of base would lose them
        if entry.kind not in ("file", "dir", "link") or entry.opaque or (entry.kind == "file" and entry.links > 1):
            return False
        below = shown(path)
        return below is not None and below.state == entry.state

    compared = upper if fresh is None else fresh
    kept = {".", *(path for path in dirty if path in upper)}
    kept.update(path for path in compared if path in upper and path not in kept and not mirrors(path, upper[path]))
    above: set[str] = set()
    for path in kept:
        while path != "." and (path := parent(path)) not in above:
            above.add(path)
    return {path: entry for path, entry in upper.items() if path in kept or path in above}


def parent(path: str) -> str:
    """The directory of a relative path; ``.`` is its own."""
    return path.rpartition("/")[0] or "."


def entry_or_none(path: Path | str) -> Entry | None:
    """One name, or None when there is none. Raises OSError."""
    try:
        return read_entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def run(argv: list[str], *, feed: bytes | None = None, accept: tuple[int, ...] = (0,)) -> None:
    """Run a system tool. Raises LayerError with what it said."""
    try:
        done = subprocess.run(argv, input=feed, stdin=None if feed is not None else subprocess.DEVNULL,
                              capture_output=True, check=False)  # fmt: skip
    except FileNotFoundError:
        raise LayerError(f"{argv[0]} is not installed; install it and try again") from None
    if done.returncode not in accept:
        said = " / ".join(done.stderr.decode(errors="replace").strip().splitlines()[-3:])
        raise LayerError(f"{' '.join(argv[:1])} ended with {done.returncode}: {said or 'without a word'}")


def mount_tmpfs(target: Path, size_mb: int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}M,nosuid,nodev,mode=0755", f"ram-{target.name}", str(target)])


def resize_tmpfs(target: Path, size_mb: int) -> None:
    """Change the limit of a mounted tmpfs in place; the kernel refuses one below what is used."""
    run(["mount", "-o", f"remount,size={size_mb}M,nosuid,nodev", str(target)])


def mount_overlay(target: Path, *, lower: Path, upper: Path, work: Path) -> None:
    """Mount with the explicit options of this engine. Raises LayerError, also for a path that overlayfs would split."""
    for path in (lower, upper, work):
        if set(str(path)) & set(",:\\"):
            raise LayerError(f"{path}: a layer's path must not contain a comma, a colon or a backslash")
    target.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work},{OPTIONS}"
    run(["mount", "-t", "overlay", "-o", options, f"layer-{target.name}", str(target)])


def unmount(target: Path) -> None:
    """Unmount, never lazily: a lazy one only hides that somebody still writes. Raises LayerError when busy."""
    run(["umount", str(target)])


def holders(root: Root, target: Path, limit: int = 5) -> list[str]:
    """``pid name`` of processes with a working directory, root, program, open file or mapping below a path."""
    prefix = str(target)
    found = []
    for pid in root.listdir("/proc"):
        if not pid.isdigit():
            continue
        links = ["cwd", "root", "exe", *(f"fd/{n}" for n in root.listdir(f"/proc/{pid}/fd"))]
        paths = (_link(root, f"/proc/{pid}/{link}") for link in links)
        if any(p == prefix or p.startswith(prefix + "/") for p in paths) or f" {prefix}/" in (
            root.read_or_none(f"/proc/{pid}/maps") or ""
        ):
            found.append(f"{pid} {root.read_or_none(f'/proc/{pid}/comm') or '?'}")
    return found[:limit]


def _link(root: Root, path: str) -> str:
    try:
        return os.readlink(root.path(path))  # noqa: PTH115 - /proc links may be "name (deleted)", which is no path
    except OSError:
        return ""
