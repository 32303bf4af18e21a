# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A wheelhouse: every Python wheel that a node needs, so that the node itself needs no package index.

Runs on the controller. The runtime's own wheel is built from sources (their link to the library resolved) under a
version that names those sources; the rest is downloaded for each Python that the nodes may have, pinned by hash.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._difference import ABSENT, Difference

STAMP = "wheelhouse.json"
# bump when the same inputs give other wheels (for example after a change of the platform tags)
RECIPE = 1
# glibc 2.36 is Debian 12's, the oldest system of a node; pip does not derive older tags from a newer one
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)), "manylinux2014_x86_64")
# zip archives cannot hold an older date; a fixed one makes equal sources give equal wheels
SOURCE_DATE_EPOCH = "315532800"


class WheelhouseError(Exception):
    """Building failed; the text names the step, and what pip said last."""


@dataclass(frozen=True)
class Wanted:
    """What the wheelhouse shall hold: the version of the runtime's wheel, and a digest over what decides the rest."""

    version: str
    digest: str


@dataclass(frozen=True)
class Present:
    """What a directory holds: the stamp of the last build, and whether all its files are still there, unaltered."""

    version: str | None = None
    digest: str | None = None
    wheel: str | None = None
    whole: bool = False
    files: tuple[str, ...] = ()


def source_files(runtime: Path) -> Iterator[tuple[str, Path]]:
    """(name in the build tree, file) of everything that goes into the runtime's wheel, sorted by name."""
    found = {"pyproject.toml": runtime / "pyproject.toml"}
    top = runtime / "src"
    for folder, folders, names in os.walk(top, followlinks=True):  # src/organism/core is a link to the library
        folders[:] = [name for name in folders if name != "__pycache__" and not name.endswith(".egg-info")]
        for name in names:
            if not name.endswith((".pyc", ".pyo")):
                file = Path(folder, name)
                found[str(file.relative_to(runtime))] = file
    yield from sorted(found.items())


def source_version(runtime: Path) -> str:
    """``0.1.0+src.<12 hex>``: the declared version, with a digest of the sources as PEP 440 local version.

    Raises WheelhouseError when `runtime` is not the runtime's source.
    """
    declared = runtime / "src" / "organism" / "_version.py"
    if not declared.is_file() or not (runtime / "src" / "organism" / "core" / "_wheelhouse.py").is_file():
        raise WheelhouseError(f"{runtime} does not hold the runtime's sources (no src/organism with its core)")
    match = re.search(r'^VERSION = "([^"+]+)"$', declared.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise WheelhouseError(f'{declared} has no line VERSION = "..."')
    digest = hashlib.sha256()
    for name, file in source_files(runtime):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{match[1]}+src.{digest.hexdigest()[:12]}"


def wanted(runtime: Path, requirements: Path, python_versions: Sequence[str]) -> Wanted:
    """What a wheelhouse of these inputs is. Raises WheelhouseError, OSError."""
    for version in python_versions:
        if re.fullmatch(r"3\.\d+", version) is None:
            raise WheelhouseError(f"{version!r} is not a Python version such as 3.11")
    parts = [str(RECIPE), requirements.read_text(encoding="utf-8"), *sorted(python_versions)]
    return Wanted(source_version(runtime), hashlib.sha256("\0".join(parts).encode()).hexdigest())


def present(dest: Path) -> Present:
    """What lies in `dest`; a directory that is no wheelhouse, or none at all, is an empty Present."""
    try:
        stamp = json.loads((dest / STAMP).read_text(encoding="utf-8"))
        files: dict[str, str] = stamp["files"]
        here = {file.name: _sha256(file) for file in dest.iterdir() if file.name != STAMP}
        return Present(stamp["version"], stamp["digest"], stamp["wheel"], files == here, tuple(sorted(files)))
    except (FileNotFoundError, NotADirectoryError):
        return Present()
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return Present(version="unreadable")


def plan(have: Present, want: Wanted | None) -> Difference:
    """The difference between what lies there and what is wanted (None: nothing)."""
    difference = Difference()
    if want is None:
        difference.add("wheelhouse", have.version, ABSENT)
        return difference
    difference.add("version", have.version, want.version)
    difference.add("pinned wheels", have.digest, want.digest)
    if not difference and not have.whole:
        difference.add("files", "altered", "as built")
    return difference


def build(dest: Path, runtime: Path, requirements: Path, python_versions: Sequence[str], want: Wanted) -> None:
    """Build the wheelhouse beside `dest`, then put it in its place. Raises WheelhouseError, OSError."""
    refuse_foreign(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
        new, work = Path(scratch, "new"), Path(scratch, "work")
        new.mkdir()
        work.mkdir()
        wheel = _build_runtime(runtime, want.version, work / "runtime", new)
        have = present(dest)
        if have.whole and have.digest == want.digest:  # only the runtime has changed
            for name in set(have.files) - {have.wheel, wheel}:
                shutil.copyfile(dest / name, new / name)
        else:
            _collect(requirements, python_versions, work, new)
        files = {file.name: _sha256(file) for file in sorted(new.iterdir())}
        stamp: dict[str, Any] = {"version": want.version, "digest": want.digest, "wheel": wheel, "files": files}
        (new / STAMP).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        new.chmod(0o755)
        if dest.exists():
            dest.rename(Path(scratch, "old"))
        new.rename(dest)


def remove(dest: Path) -> None:
    """Remove a wheelhouse. Raises WheelhouseError when `dest` is something else."""
    refuse_foreign(dest)
    if dest.exists():
        shutil.rmtree(dest)


def refuse_foreign(dest: Path) -> None:
    """Raise WheelhouseError when `dest` holds something that this library did not put there."""
    if not dest.exists():
        return
    if not dest.is_dir() or (not (dest / STAMP).exists() and any(dest.iterdir())):
        raise WheelhouseError(
            f"{dest} exists and is not a wheelhouse (it has no {STAMP}): name another place, or move it away"
        )


def _build_runtime(runtime: Path, version: str, tree: Path, into: Path) -> str:
    for name, file in source_files(runtime):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    declared = tree / "src" / "organism" / "_version.py"
    text = declared.read_text(encoding="utf-8")
    declared.write_text(
        re.sub(r'^VERSION = ".*"$', f'VERSION = "{version}"', text, flags=re.MULTILINE), encoding="utf-8"
    )
    built = _build_wheel(tree, tree.parent / "runtime.d", "building the runtime's wheel")
    built.replace(into / built.name)
    return built.name


def _collect(requirements: Path, python_versions: Sequence[str], work: Path, into: Path) -> None:
    for version in python_versions:
        _download(requirements, version, work / version)
    for file in sorted(work.glob("3.*/*.whl")):
        file.replace(into / file.name)
    # a project that publishes source only: built here, once, and it has to be pure Python
    for name, file in {file.name: file for file in work.glob("3.*/*.tar.gz")}.items():
        built = _build_wheel(file, work / f"{name}.d", f"building the wheel of {name}")
        if not built.name.endswith("-none-any.whl"):
            raise WheelhouseError(f"{name} has no wheel and is not pure Python: it cannot be built for other Pythons")
        built.replace(into / built.name)


def _build_wheel(source: Path, into: Path, step: str) -> Path:
    _pip(["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(into), str(source)], step)
    return next(into.glob("*.whl"))


def _download(requirements: Path, python_version: str, into: Path) -> None:
    digits = python_version.replace(".", "")
    tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    tags += [word for abi in (f"cp{digits}", "abi3", "none") for word in ("--abi", abi)]
    _pip(
        [
            *("download", "--require-hashes", "--no-deps", "--no-build-isolation", "--requirement", str(requirements)),
            *("--python-version", python_version, "--implementation", "cp", *tags, "--dest", str(into)),
        ],
        f"downloading the wheels for Python {python_version}",
    )


def _pip(words: Sequence[str], step: str) -> None:
    """Run the pip of this interpreter; what it says is shown only when it fails."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH, "LC_ALL": "C.UTF-8"}
    environment.pop("PYTHONPATH", None)  # Ansible sets it for the module; the build must not see it
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise WheelhouseError(f"{step} failed (pip of {sys.executable} ended with {done.returncode}):\n{tail}")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
