# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where rigs live: one folder of the cache for all of them, one below it for each."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

REPO = Path(__file__).resolve().parent.parent
DEFAULT_NAME = "rig"
SUITE = "trixie"
# a host name, and short enough for sockets below the cache's folder
_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")


@dataclass(frozen=True)
class Settings:
    """Set by ``ORGANISM_CACHE`` (folder) and ``ORGANISM_RIG_NAME`` (several rigs side by side)."""

    name: str
    cache: Path

    @property
    def shared(self) -> Path:
        """What all rigs use: the image, its snapshot, built modules, keys."""
        return self.cache / "rig"

    @property
    def images(self) -> Path:
        return self.shared / "images"

    @property
    def modules(self) -> Path:
        """Built ZFS modules, a tar for each kernel release."""
        return self.shared / "zfs"

    @property
    def logs(self) -> Path:
        return self.shared / "log"

    @property
    def key(self) -> Path:
        return self.shared / "id_ed25519"

    @property
    def runs(self) -> Path:
        return self.shared / "run"

    @property
    def run(self) -> Path:
        """This rig's own folder: its disks, sockets and logs; goes with ``down``."""
        return self.runs / self.name

    @property
    def state_file(self) -> Path:
        return self.run / "state.json"

    @property
    def control_path(self) -> Path:
        """OpenSSH's connection-sharing socket; a temporary suffix takes 17 of the 107 characters of a socket path."""
        near = self.run / "ssh"
        if len(str(near)) + 17 < 107:
            return near
        place = hashlib.sha256(str(self.run).encode()).hexdigest()[:12]
        return Path(f"/tmp/organism-rig-{os.getuid()}-{place}")  # noqa: S108 - only where the cache's path is too long

    def named(self, name: str) -> Settings:
        return Settings(checked(name), self.cache)


def checked(name: str) -> str:
    """``name`` if it can name a rig, or `UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a rig", "use up to 20 lower-case letters, digits and dashes")
    return name


def settings(name: str = "") -> Settings:
    """Settings from the environment. Raises `UsageError` for a name or a folder that cannot work."""
    cache = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").resolve()
    if any(character.isspace() or character in "'\"%\\,:" for character in str(cache)):
        raise UsageError(
            f"the folder {cache} has a blank, quote, comma or colon in its path, which OpenSSH and QEMU cannot carry",
            "set ORGANISM_CACHE to another folder, for example ORGANISM_CACHE=/var/cache/organism",
        )
    return Settings(checked(name or os.environ.get("ORGANISM_RIG_NAME") or DEFAULT_NAME), cache)
