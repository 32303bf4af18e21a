# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real tmpfs and overlay mounts below a test's own directory; nothing of it is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from organism.core._overlay import mounts
from organism.core._ramlayer import Layer
from organism.core._root import Root


def mounts_below(path: Path) -> list[str]:
    """Mount points below a directory, the last mounted first."""
    return [m.target for m in reversed(mounts(Root())) if m.target.startswith(f"{path}/")]


@pytest.fixture(autouse=True)
def _mounting(tmp_path: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    probe = tmp_path / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "probe", str(probe)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    subprocess.run(["umount", str(probe)], check=True)
    yield
    for target in mounts_below(tmp_path):
        subprocess.run(["umount", "-l", target], check=True)


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    """A layer of 32 MiB with a base that has something in it."""
    made = Layer(
        name="gpu0",
        ram=tmp_path / "run/gpu0",
        base=tmp_path / "data/gpu0/base",
        persist=tmp_path / "data/gpu0/persist",
        merged=tmp_path / "srv/gpu0",
        size_mb=32,
        keep=3,
    )
    made.base.mkdir(parents=True)
    (made.base / "models").mkdir()
    (made.base / "models/small.bin").write_bytes(b"s" * 10_000)
    (made.base / "models/old.bin").write_bytes(b"o" * 20_000)
    (made.base / "full").mkdir()
    for name in ("a", "b", "c"):
        (made.base / "full" / name).write_text(name, encoding="utf-8")
    return made
