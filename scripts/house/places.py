# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where things lie: the checkout, and the one folder that everything which is made goes to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Paths of one checkout. `cache` is `.cache` in it, or the folder that ORGANISM_CACHE names."""

    repo: Path
    cache: Path

    @classmethod
    def here(cls) -> Places:
        repo = Path(__file__).resolve().parents[2]
        named = os.environ.get("ORGANISM_CACHE", "")
        return cls(repo, Path(named).expanduser().absolute() if named else repo / ".cache")

    @property
    def venv(self) -> Path:
        return self.cache / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def nats(self) -> Path:
        return self.cache / "nats"

    @property
    def bin(self) -> Path:
        return self.cache / "bin"

    @property
    def wheels(self) -> Path:
        return self.cache / "wheels"

    @property
    def log(self) -> Path:
        return self.cache / "log"

    @property
    def collection_link(self) -> Path:
        """The name under which Python and Ansible import this checkout as a collection."""
        return self.cache / "collections" / "ansible_collections" / "organism" / "proxmox"

    @property
    def requirements(self) -> Path:
        return self.repo / "requirements"

    def environment(self) -> dict[str, str]:
        """Variables for everything that runs inside the house: its own tools first, its writes into the cache."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        system = env.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").split(":")
        # a plain user's PATH on Debian lacks sbin, where mkfs, ip and losetup live
        path = [str(self.venv / "bin"), str(self.bin), *system, "/usr/sbin", "/sbin"]
        env.update(
            ORGANISM_CACHE=str(self.cache),
            PATH=":".join(dict.fromkeys(path)),
            VIRTUAL_ENV=str(self.venv),
            ANSIBLE_CONFIG=str(self.repo / "ansible.cfg"),
            ANSIBLE_HOME=str(self.cache / "ansible"),
            ANSIBLE_COLLECTIONS_PATH=str(self.cache / "collections"),
        )
        env.setdefault("PIP_CACHE_DIR", str(self.cache / "pip"))
        env.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        return env
