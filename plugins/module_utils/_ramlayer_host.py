# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's RAM layer: its settings, whether this machine can carry it, and the memory of all layers together.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from . import _gpucache as gpucache
from ._keyvalue import Key, Schema, Settings, SettingsError
from ._overlay import holding_mount, mount_at, mounts
from ._ramlayer import Layer
from ._ramlayer_answers import Habits
from ._root import Root

CONFIG = "/etc/organism/ramlayer.conf"
NAME = "host"
SERVICE = "ramlayer.service"
VOLATILE = ("tmpfs", "ramfs", "devtmpfs")

_PATH = r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+"
_PLACES = ("LOWERDIR", "RAMDIR", "MERGED", "PERSIST_DIR")


def _apart(settings: Settings) -> Iterable[str]:
    """None of the layer's directories may lie in another: a sync would save itself, or a mount hide its own source."""
    for one, other in permutations((*_PLACES, "STATE_DIR"), 2):
        inner, outer = settings.text(one), settings.text(other)
        if inner == outer and one < other:
            yield f"{one} and {other} are both {inner}; give each a directory of its own"
        elif inner.startswith(f"{outer}/"):
            yield f"{one} {inner} must not lie below {other} {outer}"
    if settings["ARCHIVE_DIR"]:
        inside = f"{settings.text('ARCHIVE_DIR')}/"
        for place in _PLACES:
            if inside.startswith(f"{settings.text(place)}/"):
                yield f"ARCHIVE_DIR {settings.text('ARCHIVE_DIR')} must not lie in {place} {settings.text(place)}"


SCHEMA = Schema(
    "ramlayer",
    [
        Key("LOWERDIR", "path", "/mnt/fast/base", "Base on disk: what is below the RAM layer. It must exist.",
            pattern=_PATH),
        Key("RAMDIR", "path", "/ramlayer", "Where the tmpfs is mounted.", pattern=_PATH),
        Key("MERGED", "path", "/fast/active", "What programs see: base with the RAM layer above it.", pattern=_PATH),
        Key("PERSIST_DIR", "path", "/mnt/fast/ram-persist", "On disk: the generations that each sync saves.",
            pattern=_PATH),
        Key("STATE_DIR", "path", "/run/ramlayer",
            "Locks, notes and counters. It must end with the content of RAM, so name a place on a tmpfs.",
            pattern=_PATH),
        Key("RAM_MB", "integer", 8192, "Limit of the tmpfs in MiB.", minimum=16, maximum=4194304),
        Key("SYNC_SEC", "integer", 60, "Seconds between two syncs: what a power cut can cost.",
            minimum=5, maximum=86400),
        Key("KEEP_GENERATIONS", "integer", 3, "Generations kept on disk, the current one included.",
            minimum=1, maximum=1000),
        Key("ZFS_SNAPSHOTS", "integer", 0,
            "ZFS snapshots kept of the file system of PERSIST_DIR, one a generation. 0: none are made.",
            minimum=0, maximum=1000),
        Key("ARCHIVE_DIR", "path", "/mnt/archive/ram-persist",
            "Daily copy of the current generation, on another pool or disk. Empty: none.", pattern=_PATH,
            optional=True),
        Key("ARCHIVE_KEEP", "integer", 7, "Archived generations kept.", minimum=1, maximum=1000),
        Key("PREWARM_ON_BOOT", "boolean", False, "Bring files of base into RAM when the layer is mounted."),
        Key("PREWARM_MAX_FILE_MB", "integer", 128, "Only files below this many MiB are brought into RAM.", minimum=1),
        Key("PREWARM_PARALLEL", "integer", 4, "Files that are brought into RAM at once.", minimum=1, maximum=64),
        Key("PREWARM_QUOTA_PERCENT", "integer", 50, "Prewarming fills at most this share of the layer.",
            minimum=1, maximum=95),
        Key("PIN", "list", [],
            "Shell patterns of paths in the layer (db/*.idx) that prewarming brings in first, of any size."),
        Key("HIGH_WATERMARK_PERCENT", "integer", 85,
            "Prewarming stops here, and the status says 'high' above it: room for writes.", minimum=10, maximum=95),
        Key("MEMORY_SHARE_PERCENT", "integer", 50,
            "All RAM layers together, the GPUs' caches included, may take this share of the memory; more is refused.",
            minimum=1, maximum=90),
        Key("TEXTFILE_COLLECTOR", "path", "/var/lib/prometheus/node-exporter",
            "Where each sync leaves its metrics, if the directory exists. Empty: nowhere.", optional=True),
    ],
    checks=[_apart],
)  # fmt: skip


def load(root: Root, path: str = CONFIG) -> Settings:
    """The settings in force. Raises SettingsError; a missing file is one, and says how to get it."""
    try:
        return SCHEMA.load(root, path)
    except FileNotFoundError:
        raise SettingsError([f"{path} does not exist; run the role ramlayer, or give --config"]) from None
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}"]) from None


def layer(settings: Settings) -> Layer:
    """Where the host's layer lives."""
    return Layer(
        name=NAME,
        ram=Path(settings.text("RAMDIR")),
        base=Path(settings.text("LOWERDIR")),
        persist=Path(settings.text("PERSIST_DIR")),
        merged=Path(settings.text("MERGED")),
        size_mb=settings.integer("RAM_MB"),
        keep=settings.integer("KEEP_GENERATIONS"),
        high_percent=settings.integer("HIGH_WATERMARK_PERCENT"),
        service=SERVICE,
        state=Path(settings.text("STATE_DIR")),
        command="ramlayer {verb}",
        size_key="RAM_MB",
    )


def habits(settings: Settings) -> Habits:
    """How the layer is tended. Programs of the host keep it in use, so that it is not emptied while it is mounted."""
    return Habits(
        largest_mb=settings.integer("PREWARM_MAX_FILE_MB"),
        readers=settings.integer("PREWARM_PARALLEL"),
        quota_percent=settings.integer("PREWARM_QUOTA_PERCENT"),
        pins=tuple(settings.words("PIN")),
        textfiles=settings.text("TEXTFILE_COLLECTOR"),
    )


@dataclass(frozen=True)
class Budget:
    """Memory that RAM layers may fill, in MiB: this one, the GPUs' caches, and what is allowed for all."""

    own_mb: int
    caches_mb: int
    machine_mb: int
    share_percent: int

    @property
    def total_mb(self) -> int:
        return self.own_mb + self.caches_mb

    @property
    def allowed_mb(self) -> int:
        return self.machine_mb * self.share_percent // 100

    @property
    def sum_text(self) -> str:
        caches = f" and {self.caches_mb} MiB of GPU caches" if self.caches_mb else ""
        return (
            f"{self.own_mb} MiB of RAM layer{caches} = {self.total_mb / 1024:.1f} GiB, the machine has "
            f"{self.machine_mb / 1024:.1f} GiB"
        )

    @property
    def refusal(self) -> str | None:
        """Why it is too much and what to do, or None."""
        if self.total_mb <= self.allowed_mb:
            return None
        left = max(self.allowed_mb - self.caches_mb, 0)
        way = f"lower RAM_MB to {left}" if left >= 16 else "make the GPUs' caches smaller"
        return f"{self.sum_text}; at most {self.share_percent} % are allowed: {way} or raise MEMORY_SHARE_PERCENT"


def budget(settings: Settings, root: Root) -> Budget:
    """Raises SettingsError when the machine's memory or the configuration of the GPUs' caches cannot be read."""
    machine = gpucache.machine_mb(root)
    caches = gpucache.configured_mb(root)
    return Budget(settings.integer("RAM_MB"), caches, machine, settings.integer("MEMORY_SHARE_PERCENT"))


def configured_mb(root: Root, path: str = CONFIG) -> int:
    """MiB that a configured layer of this host may take; 0 without one. Raises SettingsError."""
    return load(root, path).integer("RAM_MB") if root.exists(path) else 0


def problems(settings: Settings, root: Root, config: str = CONFIG) -> list[str]:
    """What this machine must not or cannot do, each with the way out."""
    found = []
    refusal = budget(settings, root).refusal
    if refusal:
        found.append(refusal)
    present = mounts(root)
    for key in ("PERSIST_DIR", "LOWERDIR"):
        place = settings.text(key)
        held = holding_mount(present, place)
        if held is not None and held.kind in VOLATILE:
            found.append(f"{key} {place} is on a {held.kind} ({held.target}): it would not survive; name a disk")
    lower = root.path(settings.text("LOWERDIR"))
    if not lower.is_dir():
        what = "is not a directory" if lower.exists() else "does not exist"
        found.append(f"LOWERDIR {settings.text('LOWERDIR')} {what}; create it (role zfs_layout) or name another")
    merged = mount_at(present, settings.text("MERGED"))
    if merged is not None and (merged.kind != "overlay" or merged.option("lowerdir") != settings.text("LOWERDIR")):
        where = merged.option("lowerdir") or merged.source
        found.append(f"MERGED {settings.text('MERGED')} holds another mount ({merged.kind} of {where}); unmount it, or "
                     f"name another path; the settings in force are in {config}")  # fmt: skip
    ram = mount_at(present, settings.text("RAMDIR"))
    if ram is not None and ram.kind != "tmpfs":
        found.append(f"RAMDIR {settings.text('RAMDIR')} holds a {ram.kind} mount; unmount it, or name another path")
    return found


def warnings(settings: Settings, root: Root) -> list[str]:
    """What an operator should know and may accept."""
    told = []
    memory = budget(settings, root)
    if not memory.refusal and memory.total_mb * 2 > memory.allowed_mb:
        told.append(memory.sum_text)
    held = holding_mount(mounts(root), settings.text("PERSIST_DIR"))
    if held is not None and held.target == "/":
        told.append(f"PERSIST_DIR {settings.text('PERSIST_DIR')} is on the root file system, which it may fill")
    if settings.integer("ZFS_SNAPSHOTS") and (held is None or held.kind != "zfs"):
        told.append(f"no ZFS snapshots: PERSIST_DIR {settings.text('PERSIST_DIR')} is not on ZFS")
    reason = no_archive(settings, root)
    if reason:
        told.append(f"no archive: {reason}")
    return told


def no_archive(settings: Settings, root: Root) -> str | None:
    """Why there is no daily archive, or None when there is one.

    The directory above ARCHIVE_DIR must be there (the pool is mounted), on another file system than PERSIST_DIR: a copy
    beside the original would die with it.
    """
    if not settings["ARCHIVE_DIR"]:
        return "ARCHIVE_DIR is empty"
    place = settings.text("ARCHIVE_DIR")
    above = place.rsplit("/", 1)[0] or "/"
    if not root.path(above).is_dir():
        return f"{above} does not exist (ARCHIVE_DIR {place})"
    present = mounts(root)
    one, other = holding_mount(present, place), holding_mount(present, settings.text("PERSIST_DIR"))
    if one is not None and one.kind in VOLATILE:
        return f"ARCHIVE_DIR {place} is on a {one.kind}"
    if one is not None and other is not None and (one.target, one.source) == (other.target, other.source):
        return f"ARCHIVE_DIR {place} is on the same file system as PERSIST_DIR ({one.target})"
    return None
