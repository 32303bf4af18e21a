# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command ``ramlayer``: each verb on a real layer, the archive on a second disk, and runs without the runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from organism.core._host_tools import collect

from .conftest import Machine, mounts_below

REPO = Path(__file__).resolve().parents[3]


def test_a_power_cut_gives_back_the_last_sync(machine: Machine) -> None:
    machine.module()
    (machine.merged / "saved").write_text("saved", encoding="utf-8")
    answer = machine.done("sync")
    assert answer["new"] and answer["number"] == 1
    (machine.merged / "lost").write_text("lost", encoding="utf-8")
    machine.cut()
    assert "generation 1 restored" in machine.done("mount")["message"]
    assert (machine.merged / "saved").exists() and not (machine.merged / "lost").exists()


def test_the_timers_run_mounts_again_what_lost_its_overlay(machine: Machine) -> None:
    machine.module()
    (machine.merged / "kept").write_text("kept", encoding="utf-8")
    subprocess.run(["umount", str(machine.merged)], check=True)
    assert "kept what was in RAM" in machine.done("tend")["message"]
    assert (machine.merged / "kept").exists()


def test_an_older_generation_is_chosen_while_unmounted(machine: Machine) -> None:
    machine.module()
    for text in ("one", "two"):
        (machine.merged / "file").write_text(text * 10, encoding="utf-8")
        machine.done("sync")
    assert "stop ramlayer.service first" in machine.refused("restore", "--generation", "1")
    machine.done("unmount")
    assert "there are: 1, 2" in machine.refused("restore", "--generation", "9")
    assert machine.done("restore", "--generation", "1")["number"] == 1
    machine.done("mount")
    assert (machine.merged / "file").read_text(encoding="utf-8") == "one" * 10
    listed = machine.done("generations")["generations"]
    assert [(g["number"], g["current"], g["whole"]) for g in listed] == [(1, True, True), (2, False, True)]


def test_a_commit_empties_the_layer_into_base(machine: Machine) -> None:
    machine.module()
    (machine.merged / "new").write_text("new", encoding="utf-8")
    assert "is mounted" in machine.refused("commit")
    machine.done("unmount")
    machine.done("commit")
    assert (machine.base / "new").exists()


def test_a_mount_in_another_name_space_is_told_at_the_stop_and_keeps_base_from_a_commit(machine: Machine) -> None:
    machine.merged.mkdir(parents=True)
    (machine.merged / "below").touch()  # somebody's: the mount point cannot be removed, which would end that mount
    machine.module()
    (machine.merged / "new").write_text("new", encoding="utf-8")
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo in; exec sleep 600"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        told = machine.done("unmount")["message"]
        assert f"{other.pid} sleep still sees it" in told and "not saved" in told
        assert f"{other.pid} sleep still sees it mounted" in machine.refused("commit")
        assert not (machine.base / "new").exists()
    finally:
        other.kill()
        other.wait()
    machine.done("commit")
    assert (machine.base / "new").read_text(encoding="utf-8") == "new"


def test_disable_and_enable(machine: Machine) -> None:
    machine.module()
    assert machine.done("disable")["changed"]
    assert not mounts_below(machine.top)
    assert not machine.done("disable")["changed"]
    assert machine.done("enable")["changed"]
    assert machine.mounted()


def test_without_a_second_disk_there_is_no_archive_and_it_says_so(machine: Machine) -> None:
    answer = machine.module()
    assert f"{machine.top}/archive does not exist" in answer["archive"]["reason"]
    assert "no archive" in str(answer["warnings"])
    assert "does not exist" in machine.refused("archive")
    (machine.top / "archive").mkdir()
    assert "on the same file system as PERSIST_DIR" in machine.refused("archive")
    assert "same file system" in machine.done("status")["archive"]["reason"]


def test_the_archive_is_whole_shares_what_did_not_change_and_can_be_restored(
    machine: Machine, second_disk: Path
) -> None:
    machine.settings["ARCHIVE_KEEP"] = 2
    machine.settings["KEEP_GENERATIONS"] = 1
    assert machine.module()["archive"]["reason"] is None
    archive = second_disk / "ram-persist/generations"
    (machine.merged / "big").write_bytes(os.urandom(1_000_000))
    (machine.merged / "sub/old").unlink()
    for number in (1, 2, 3):
        (machine.merged / "count").write_text("x" * number, encoding="utf-8")
        machine.done("sync")
        assert machine.done("archive")["new"]
    assert not machine.done("archive")["new"]
    assert sorted(path.name for path in archive.iterdir()) == ["2", "3"]
    assert (archive / "2/upper/big").stat().st_ino == (archive / "3/upper/big").stat().st_ino
    assert str((second_disk / "ram-persist/current").readlink()) == "generations/3"
    machine.done("unmount")
    assert "has no generation 2" in machine.refused("restore", "--generation", "2")
    assert machine.done("restore", "--generation", "2", "--from-archive")["number"] == 2
    machine.done("mount")
    assert (machine.merged / "count").read_text(encoding="utf-8") == "xx"
    assert (machine.merged / "big").stat().st_size == 1_000_000
    assert not (machine.merged / "sub/old").exists()


def test_the_archive_tells_times_within_one_second_apart(machine: Machine, second_disk: Path) -> None:
    machine.module()
    file = machine.merged / "count"
    second = 1_700_000_000_000_000_000
    for content, time in (("a", second + 1), ("b", second + 2)):
        file.write_text(content, encoding="utf-8")
        for name in (file, machine.merged):
            os.utime(name, ns=(time, time))
        machine.done("sync")
        number = machine.done("archive")["number"]
        copy = second_disk / f"ram-persist/generations/{number}/upper"
        assert (copy / "count").read_text(encoding="utf-8") == content
        assert copy.stat().st_mtime_ns == (copy / "count").stat().st_mtime_ns == time


def test_an_archive_without_room_stays_as_it_was(machine: Machine, second_disk: Path) -> None:
    machine.settings["RAM_MB"] = 128
    machine.module()
    (machine.merged / "small").write_text("small", encoding="utf-8")
    machine.done("sync")
    machine.done("archive")
    (machine.merged / "huge").write_bytes(os.urandom(60_000_000))
    machine.done("sync")
    assert "not archived" in machine.refused("archive")
    assert [path.name for path in (second_disk / "ram-persist/generations").iterdir()] == ["1"]


def test_a_sync_that_fails_leaves_the_last_generation_and_is_told_by_the_metrics(machine: Machine) -> None:
    machine.module()
    disk = machine.persist
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(disk)], check=True)
    (machine.merged / "fits").write_bytes(os.urandom(100_000))
    machine.done("sync")
    (machine.merged / "too-large").write_bytes(os.urandom(8_000_000))
    assert "no space left" in machine.refused("sync").lower()
    text = (machine.top / "textfiles/organism-ramlayer-host.prom").read_text(encoding="utf-8")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['organism_ramlayer_enospc_total{layer="host"}'] == "1"
    assert values['organism_ramlayer_last_sync_success{layer="host"}'] == "0"
    assert int(values['organism_ramlayer_dirty_bytes{layer="host"}']) >= 8_000_000
    assert values['organism_ramlayer_generation{layer="host"}'] == "1"
    status = machine.done("status")
    assert not status["last_sync"]["ok"] and status["counters"]["failed"] == 1


def test_snapshots_are_taken_and_kept_where_zfs_is(machine: Machine, tmp_path: Path) -> None:
    machine.settings["ZFS_SNAPSHOTS"] = 2
    told = machine.module()
    assert "is not on ZFS" in str(told["warnings"])
    (machine.merged / "x").write_text("x", encoding="utf-8")
    assert "no snapshot: PERSIST_DIR is not on ZFS" in machine.done("sync")["message"]


def test_wrong_calls_end_with_2(machine: Machine) -> None:
    assert machine.run("status")[0] == 2  # no configuration yet
    machine.config.write_text("RAM_MB=many\n", encoding="utf-8")
    code, answer = machine.run("status")
    assert code == 2 and "expects a whole number" in answer["error"]
    assert machine.run("dance")[0] == 2


def test_it_runs_from_the_tools_of_the_host_alone(machine: Machine, tmp_path: Path) -> None:
    system = shutil.which("python3", path="/usr/bin")
    if system is None:
        pytest.skip("no python3 in /usr/bin")
    tools = tmp_path / "tools"
    for name, text in collect(REPO / "runtime/src/organism").items():
        file = tools / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    machine.module()
    done = subprocess.run(
        [system, "-I", str(tools / "bin/ramlayer"), "--config", str(machine.config), "status", "--json"],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["overlay"]
    assert sys.executable != system
