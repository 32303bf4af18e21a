# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drives a lab through its command line, as a user does: for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from .config import REPO, Settings, require_state, settings


@dataclass(frozen=True)
class Lab:
    """A lab of a name of its own, so that it never meets one that the user has up; the built tree is shared."""

    name: str

    @property
    def where(self) -> Settings:
        return Settings(self.name, settings().cache)

    def run(self, *words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """``python -m lab WORDS``, without a terminal."""
        own = {"ORGANISM_LAB_NAME": self.name, "ORGANISM_CACHE": str(self.where.cache), "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-m", "lab", *words], cwd=REPO, env={**os.environ, **own}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def must(self, *words: str, timeout: float = 900) -> str:
        """The same, and it has to end with 0; gives its standard output."""
        done = self.run(*words, timeout=timeout)
        if done.returncode:
            raise AssertionError(f"lab {' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def sh(self, node: str, command: str, timeout: float = 120) -> str:
        """Standard output of a shell command on a node, which must succeed."""
        return self.must("ssh", node, command, timeout=timeout)

    def status(self) -> list[dict[str, Any]]:
        return list(json.loads(self.run("status", "--json").stdout)["nodes"])

    def pool(self) -> list[str]:
        """Names of the nodes that have GPUs."""
        return [node.name for node in require_state(self.where).nodes if "gpu_pool" in node.groups]
