# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's layer on real mounts below a test's own directory: the module and the command as programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from organism.core._earlier import FOLDER
from organism.core._overlay import mounts
from organism.core._ramlayer_units import CAPABILITY
from organism.core._root import Root

COLLECTIONS = next(path for path in sys.path if (Path(path) / "ansible_collections/organism/proxmox").exists())
EARLIER = Path(FOLDER) / f"{CAPABILITY}.json"


def mounts_below(path: Path) -> list[str]:
    """Mount points below a directory, the last mounted first."""
    return [m.target for m in reversed(mounts(Root())) if m.target.startswith(f"{path}/")]


@pytest.fixture(autouse=True)
def _mounting(tmp_path: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd is the manager here: units would be touched (the rig does that)")
    if EARLIER.exists():
        pytest.skip(f"this machine has a RAM layer of its own ({EARLIER})")
    probe = tmp_path / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "probe", str(probe)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    subprocess.run(["umount", str(probe)], check=True)
    yield
    for target in mounts_below(tmp_path):
        subprocess.run(["umount", "-l", target], check=True)
    EARLIER.unlink(missing_ok=True)


class Machine:
    """Runs the module as Ansible does, and the command as an operator."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.config = top / "etc/ramlayer.conf"
        self.merged, self.base, self.persist = top / "fast/active", top / "disk/base", top / "disk/persist"
        self.settings: dict[str, Any] = {
            "LOWERDIR": str(self.base),
            "RAMDIR": f"{top}/ramlayer",
            "MERGED": str(self.merged),
            "PERSIST_DIR": str(self.persist),
            "STATE_DIR": f"{top}/run/state",
            "ARCHIVE_DIR": f"{top}/archive/ram-persist",
            "RAM_MB": 32,
            "TEXTFILE_COLLECTOR": f"{top}/textfiles",
        }
        (self.base / "sub").mkdir(parents=True)
        (self.base / "sub/old").write_text("from base", encoding="utf-8")
        self.config.parent.mkdir()
        (top / "textfiles").mkdir()

    def module(self, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
        if arguments.get("state", "present") == "present" and "keep_existing" not in arguments:
            arguments.setdefault("settings", self.settings)
        given = {"path": str(self.config), "_ansible_check_mode": check, "_ansible_diff": True, **arguments}
        file = self.top / "arguments.json"
        file.write_text(json.dumps({"ANSIBLE_MODULE_ARGS": given}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.organism.proxmox.plugins.modules.ramlayer", str(file)],
            capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": COLLECTIONS},
        )  # fmt: skip
        assert done.stdout, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def run(self, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "organism.host.ramlayer", "--config", str(self.config), "--json", *arguments],
            capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment},
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else {"usage": done.stderr}

    def done(self, *arguments: str, **environment: str) -> dict[str, Any]:
        code, answer = self.run(*arguments, **environment)
        assert code == 0, answer
        return answer

    def refused(self, *arguments: str) -> str:
        code, answer = self.run(*arguments)
        assert code == 1, answer
        return str(answer["error"])

    def mounted(self) -> bool:
        return str(self.merged) in mounts_below(self.top)

    def cut(self) -> None:
        """The machine loses its memory."""
        for target in mounts_below(self.top):
            if not target.endswith("/archive"):
                subprocess.run(["umount", target], check=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def second_disk(machine: Machine) -> Path:
    """An ext4 of its own at the directory above ARCHIVE_DIR."""
    place, image = machine.top / "archive", machine.top / "archive.img"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(48 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"loop mounts are not permitted here: {done.stderr.strip()}")
    return place
