# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Takes lab and rigs down, then removes what was made in this checkout: first what runs, then what lies around."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from .places import Places

# what --keep-cache keeps: downloads and what is built of them, so that the next run need not fetch them again
DOWNLOADS = ("pip", "wheels", "rig")
# beside the cache: what checkers and the editable installation leave in the checkout
LEFT_BEHIND = (
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "runtime/src/organism.egg-info",
    "runtime/build",
    ".ansible",
)


def clean(places: Places, *, keep_cache: bool) -> int:
    """Remove everything made here; says what. The cache stays when lab or rig could not be taken down: it has them."""
    for name, words in (("lab", ["lab", "clean"]), ("rig", ["rig", "down", "--all"])):
        if places.python.exists():
            command: list[str | Path] = [places.python, "-m", *words]
            code = subprocess.run(command, cwd=places.repo, env=places.environment(), check=False).returncode
            if code != 0:
                _say(f"the {name} could not be taken down (exit {code}), so {places.cache} stays; see above")
                return 1
        elif (places.cache / name).exists():
            _say(
                f"there is a {name} but no virtual environment to take it down with: './run setup', then './run clean'"
            )
            return 1
    doomed = [places.repo / name for name in LEFT_BEHIND]
    if places.cache.exists():
        doomed += [path for path in sorted(places.cache.iterdir()) if not (keep_cache and path.name in DOWNLOADS)]
    for folder in ("plugins", "runtime", "lab", "rig", "tests", "scripts"):
        doomed += sorted((places.repo / folder).rglob("__pycache__"))
    mounts = _mounts_below(places.cache)
    if mounts:
        _say(f"still mounted, so {places.cache} stays: {' '.join(mounts)}")
        return 1
    removed = 0
    try:
        for path in doomed:
            removed += _remove(path)
        if not keep_cache and places.cache.exists():
            places.cache.rmdir()
    except (OSError, subprocess.CalledProcessError) as error:
        _say(f"{error}; what is left: {places.cache}")
        return 1
    print(f"removed {removed} things; nothing that ./run made is left" + (" but the downloads" if keep_cache else ""))
    return 0


def _say(text: str) -> None:
    print(f"run: {text}", file=sys.stderr)


def _remove(path: Path) -> bool:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        try:
            shutil.rmtree(path)
        except PermissionError:
            # parts of the lab belong to root, which made them for somebody who said sudo
            subprocess.run(["sudo", "rm", "-rf", "--one-file-system", "--", path], check=True)
    else:
        return False
    if path.name != "__pycache__":
        print(f"removed {path}")
    return True


def _mounts_below(folder: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Mount points below `folder`: removing through one would delete what is mounted there.

    The fifth field is the mount point, with blanks and backslashes as octal escapes: proc_pid_mountinfo(5).
    """
    fields = [line.split()[4] for line in mountinfo.read_text(encoding="utf-8").splitlines()]
    points = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields]
    return sorted(point for point in points if point.startswith(f"{folder}/"))
