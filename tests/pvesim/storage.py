# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Storages and volumes: enough of PVE::Storage for disks, snippets and listings. A volume is a sparse file."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import Died

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
CAPACITY = 500 * 1024**3


@dataclass
class Storage:
    """One entry of storage.cfg. ``kind``: ``dir`` or ``zfspool``; others are not simulated."""

    id: str
    kind: str
    content: set[str]
    path: Path
    options: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        found = {"storage": self.id, "type": self.kind, "content": ",".join(sorted(self.content)), **self.options}
        if self.kind == "dir":
            found["path"] = str(self.path)
        return found


class Storages:
    """What ``pvesm`` knows. ISO installers leave ``snippets`` out of ``local``'s content, so it is left out here."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.lock = threading.RLock()
        self.by_id: dict[str, Storage] = {}
        self.add("local", "dir", {"iso", "vztmpl", "backup", "import"}, top / "var/lib/vz")
        self.add("fast", "zfspool", {"images", "rootdir"}, top / "zfs/fast", pool="fast")

    def add(self, name: str, kind: str, content: set[str], path: Path, **options: Any) -> Storage:
        with self.lock:
            if name in self.by_id:
                raise Died(f"storage ID '{name}' already defined")
            made = self.by_id[name] = Storage(name, kind, content, path, dict(options))
        for folder in ("snippets", "images", "template/iso", "import") if kind == "dir" else ("",):
            (path / folder).mkdir(parents=True, exist_ok=True)
        self.write()
        return made

    def write(self) -> None:
        """``storage.cfg``, for what reads there."""
        sections = []
        for each in self.by_id.values():
            told = {key: value for key, value in each.shown().items() if key not in ("storage", "type")}
            sections.append(f"{each.kind}: {each.id}\n" + "".join(f"\t{key} {value}\n" for key, value in told.items()))
        file = self.top / "etc/pve/storage.cfg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(sections), encoding="utf-8")

    def remove(self, name: str) -> None:
        """The entry; what lies there stays. Raises Died."""
        with self.lock:
            del self.by_id[self.find(name).id]
            self.write()

    def find(self, name: str) -> Storage:
        if name not in self.by_id:
            raise Died(f"storage '{name}' does not exist")
        return self.by_id[name]

    # ---- volumes -----------------------------------------------------------------------------------------------------

    def path(self, volume: str) -> tuple[Path, str]:
        """File and kind of content of a volume id. Raises Died for what cannot be read as one."""
        name, colon, rest = volume.partition(":")
        if not colon or not rest:
            raise Died(f"unable to parse volume ID '{volume}'")
        storage = self.find(name)
        if storage.kind == "zfspool":
            if not re.fullmatch(r"(base|vm|subvol)-\d+-\S+", rest):
                raise Died(f"unable to parse zfs volume name '{rest}'")
            return storage.path / rest, "images"
        found = re.fullmatch(r"(snippets|iso|import|vztmpl|backup)/([^/]+)", rest)
        if found:
            folder = {"iso": "template/iso", "vztmpl": "template/cache", "backup": "dump"}.get(found[1], found[1])
            return storage.path / folder / found[2], found[1]
        if re.fullmatch(r"\d+/[^/]+", rest):
            return storage.path / "images" / rest, "images"
        raise Died(f"unable to parse directory volume name '{rest}'")

    def allocate(self, storage_id: str, vmid: int, size: int, name: str | None = None) -> str:
        """A new image of ``size`` bytes; its volume id. Raises Died."""
        with self.lock:
            storage = self.find(storage_id)
            if "images" not in storage.content:
                raise Died(f"storage '{storage_id}' does not support vm images")
            for candidate in [name] if name else [f"vm-{vmid}-disk-{index}" for index in range(1000)]:
                rest = candidate if storage.kind == "zfspool" else f"{vmid}/{candidate}.raw"
                path, _kind = self.path(f"{storage_id}:{rest}")
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as image:
                    image.truncate(size)
                return f"{storage_id}:{rest}"
        raise Died(f"unable to create image: '{name}' exists on storage '{storage_id}'")

    def free(self, volume: str) -> None:
        path, _kind = self.path(volume)
        path.unlink(missing_ok=True)

    def size(self, volume: str) -> int:
        path, _kind = self.path(volume)
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise Died(f"volume {volume} does not exist") from None

    def volumes(self, storage: Storage) -> Iterator[dict[str, Any]]:
        """As ``/storage/{storage}/content`` lists them."""
        if storage.kind == "zfspool":
            places = [("images", storage.path, "*", "")]
        else:
            places = [
                ("images", storage.path / "images", "*/*", ""),
                ("iso", storage.path / "template/iso", "*.iso", "iso/"),
                ("snippets", storage.path / "snippets", "*", "snippets/"),
                ("import", storage.path / "import", "*", "import/"),
            ]
        for content, folder, pattern, prefix in places:
            if content not in storage.content:
                continue
            for path in sorted(folder.glob(pattern)):
                rest = prefix + str(path.relative_to(folder))
                found: dict[str, Any] = {
                    "volid": f"{storage.id}:{rest}",
                    "content": content,
                    "format": "snippet" if content == "snippets" else path.suffix.lstrip(".") or "raw",
                    "size": path.stat().st_size,
                    "ctime": int(path.stat().st_mtime),
                }
                if owner := re.search(r"vm-(\d+)-", rest):
                    found["vmid"] = int(owner[1])
                yield found

    def status(self, storage: Storage) -> dict[str, Any]:
        used = sum(each["size"] for each in self.volumes(storage))
        return {
            "storage": storage.id,
            "type": storage.kind,
            "content": ",".join(sorted(storage.content)),
            "active": 1,
            "enabled": 1,
            "shared": 0,
            "total": CAPACITY,
            "used": used,
            "avail": CAPACITY - used,
            "used_fraction": used / CAPACITY,
        }


def parse_size(text: str) -> int | None:
    """Bytes of ``32G`` (PVE::JSONSchema, parse_size), None for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def format_size(size: int) -> str:
    """The shortest exact form, as PVE::JSONSchema, format_size: ``32G``, ``528K``."""
    for unit in ("T", "G", "M", "K"):
        if size and size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return str(size)
