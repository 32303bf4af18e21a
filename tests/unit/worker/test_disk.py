# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job that fills the disk: what counts as its own, when it has to end, and what is removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from organism.worker import disk
from organism.worker.disk import MIB, DiskGuard, DiskLimits

ME = os.getuid()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def guard(work: Path, limits: DiskLimits | None = None, *, uid: int = ME, since: float = 0) -> DiskGuard:
    return DiskGuard(limits or DiskLimits(), (work,), uid, since)


def full(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, inodes: tuple[int, int] = (0, 0)) -> None:
    """``free`` and ``total`` in MiB; ``inodes``: free and all."""
    status = os.statvfs_result((MIB, MIB, total, free, free, inodes[1], inodes[0], inodes[0], 0, 255))
    monkeypatch.setattr(disk.os, "statvfs", lambda _: status)


def test_a_job_counts_what_it_wrote_and_nothing_older(work: Path) -> None:
    (work / "deep/er").mkdir(parents=True)
    (work / "deep/er/file").write_bytes(b"x" * (2 * MIB))
    (work / "twin").hardlink_to(work / "deep/er/file")
    (work / "link").symlink_to("/etc")
    taken = guard(work).measure()
    assert taken.files == 5  # two directories, one file by two names, one link
    assert 2 * MIB <= taken.bytes < 2 * MIB + 64 * 1024
    assert guard(work, since=work.stat().st_ctime + 3600).measure().files == 0
    assert guard(work, uid=ME + 1).measure().files == 0


def test_a_file_without_a_name_counts_as_long_as_it_is_open(work: Path) -> None:
    with (work / "file").open("wb") as stream:
        stream.write(b"x" * MIB)
        stream.flush()
        (work / "file").unlink()
        assert guard(work).measure().bytes >= MIB
    assert guard(work).measure().bytes == 0


def test_nobody_walks_a_tree_without_a_reason(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, free=50, total=100)
    monkeypatch.setattr(DiskGuard, "measure", lambda _: pytest.fail("nothing is low and there is no limit"))
    assert guard(work, DiskLimits(free_percent=5)).look() == ""


def test_who_filled_the_disk_ends_and_nobody_else(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, free=1, total=100)
    limits = DiskLimits(free_percent=5)
    (work / "file").write_bytes(b"x" * (4 * MIB))
    assert guard(work, limits).look() == ""  # less than the reserve: someone else's doing
    (work / "more").write_bytes(b"x" * (4 * MIB))
    assert "has filled the disk with 8 MiB in 2 files" in guard(work, limits).look()
    assert guard(work, DiskLimits(free_percent=0)).look() == ""


def test_inodes_are_space_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, free=90, total=100, inodes=(1, 100))
    for number in range(10):
        (work / str(number)).touch()
    assert "in 10 files" in guard(work, DiskLimits(free_percent=5)).look()


def test_a_jobs_own_limit_holds_on_an_empty_disk(work: Path) -> None:
    (work / "file").write_bytes(b"x" * (3 * MIB))
    assert guard(work, DiskLimits(max_bytes=2 * MIB)).look() == "it has written 3 MiB (JOB_DISK_MAX_MB is 2)"
    assert guard(work, DiskLimits(max_bytes=4 * MIB)).look() == ""


def test_a_tree_too_deep_to_count_is_no_hiding_place(work: Path) -> None:
    above = os.open(work, os.O_RDONLY)
    for _ in range(disk.MOST_DEEP + 10):
        os.mkdir("d", dir_fd=above)
        below = os.open("d", os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    assert "too deep" in guard(work, DiskLimits(max_bytes=MIB)).look()


def test_what_it_wrote_is_removed_and_nothing_else(work: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("stays")
    (work / "deep").mkdir()
    (work / "deep/file").write_text("goes")
    (work / "link").symlink_to(outside)
    guard(work).wipe()
    assert [path.name for path in work.rglob("*")] == ["deep"]
    assert outside.read_text() == "stays"
    (work / "old").write_text("stays")
    guard(work, since=work.stat().st_ctime + 3600).wipe()
    assert (work / "old").exists()
