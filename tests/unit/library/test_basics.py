# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The library's smallest parts: the root, whole files, and differences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from organism.core._atomic import write_atomic
from organism.core._difference import Difference
from organism.core._root import Root


def test_root_reads_below_its_top_and_never_the_machine(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    (tmp_path / "sys/value").write_text("0x10\n")
    root = Root(tmp_path)
    assert root.read("/sys/value") == "0x10"
    assert root.read_int("/sys/value") == 16
    assert not root.exists("/etc/passwd")
    assert root.listdir("/nowhere") == []
    assert root.glob("/sys/*") == ["/sys/value"]


def test_an_unreadable_value_is_unknown_and_not_zero(tmp_path: Path) -> None:
    (tmp_path / "busy").mkdir()  # reading a directory fails as sysfs does for a value that the hardware lacks
    assert Root(tmp_path).read_int("/busy") is None
    (tmp_path / "text").write_text("n/a\n")
    assert Root(tmp_path).read_int("/text") is None


def test_link_name_of_a_driver(tmp_path: Path) -> None:
    (tmp_path / "driver").symlink_to("../../../bus/pci/drivers/amdgpu")
    assert Root(tmp_path).link_name("/driver") == "amdgpu"
    assert Root(tmp_path).link_name("/absent") is None


def test_write_atomic_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "conf"
    write_atomic(target, "one\n", mode=0o640)
    inode = target.stat().st_ino
    write_atomic(target, b"two\n", mode=0o600)
    assert target.read_text() == "two\n"
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_ino != inode, "a reader of the old file must keep the old content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["conf"]


def test_write_atomic_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "conf"
    target.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["conf"]


def test_one_difference_feeds_changed_diff_and_message() -> None:
    difference = Difference()
    difference.add("same", 1, 1)
    assert not difference.changed
    assert difference.message == "nothing to change"
    assert difference.as_diff() == {"before_header": "", "after_header": "", "before": "", "after": ""}
    difference.add("new", None, {"a": 1})
    difference.add("old", "x", None)
    difference.add("size", 1, 2)
    assert difference.changed
    assert difference.message == "create new; remove old; change size: 1 -> 2"
    diff = difference.as_diff("bus")
    assert '"old": "x"' in diff["before"]
    assert '"new"' not in diff["before"]
    assert '"old"' not in diff["after"]
