# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Emptying a layer between jobs on real mounts: the view stays the same, RAM becomes free, and a cut costs nothing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from pathlib import Path

import pytest

from organism.core import _ramlayer as ramlayer
from organism.core import _ramlayer_spill as spilling
from organism.core._overlay import LayerError
from organism.core._ramlayer import Layer
from organism.core._ramlayer_content import commit, prewarm
from organism.core._root import Root

from .conftest import mounts_below
from .views import view

ROOT = Root()
MIB = 1024 * 1024
NOW = 1_700_000_000


def fill(layer: Layer, *names: str, each: int = 4 * MIB) -> None:
    """Files that were used one after the other, the first the longest ago."""
    for name in names:
        path = layer.merged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(each))
    used(layer, *names)


def used(layer: Layer, *names: str) -> None:
    """Looking at the view counts as use, so the times of access are set again after it."""
    for age, name in enumerate(names):
        mtime = (layer.merged / name).stat().st_mtime_ns
        os.utime(layer.merged / name, ns=((NOW + age) * 10**9, min(mtime, NOW * 10**9)))


def spill(layer: Layer, to_percent: float, *pins: str, wait: float = 0) -> spilling.Spilled:
    return spilling.spill(layer, ROOT, to_percent=to_percent, pins=pins, wait=wait)


def test_the_coldest_leave_and_the_view_stays_the_same(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    names = ("out/a", "out/b", "new/deep/c", "models/d", "e")
    fill(layer, *names)
    (layer.merged / "models/small.bin").unlink()
    before = view(layer.merged)
    used(layer, *names)
    done = spill(layer, 30)
    assert (done.files, done.size, done.written) == (3, 12 * MIB, 12 * MIB)
    assert ramlayer.usage(layer).percent < 30
    assert view(layer.merged) == before
    assert not (layer.upper / "out/a").exists()
    assert (layer.base / "new/deep/c").stat().st_size == 4 * MIB
    assert (layer.upper / "e").exists()
    ramlayer.stop(layer, ROOT)
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before


def test_what_is_not_above_the_mark_is_left_alone(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a")
    assert spill(layer, 50) == spilling.Spilled()
    assert (layer.upper / "a").exists()


def test_a_power_cut_right_after_it_loses_nothing(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "out/a", "out/b", "c")
    before = view(layer.merged)
    spill(layer, 10)
    for target in mounts_below(layer.ram.parents[1]):
        subprocess.run(["umount", target], check=True)
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before


def test_pinned_files_hard_links_and_hidden_directories_stay(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "models/pinned", "linked")
    (layer.merged / "twin").hardlink_to(layer.merged / "linked")
    for name in ("a", "b", "c"):
        (layer.merged / "full" / name).unlink()
    (layer.merged / "full").rmdir()
    fill(layer, "full/over-a-whiteout")
    before = view(layer.merged)
    assert spill(layer, 1, "models/*") == spilling.Spilled()
    assert view(layer.merged) == before


def test_prewarmed_files_leave_without_a_write(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "models").mkdir(exist_ok=True)
    assert prewarm(layer, ROOT, largest_mb=1, readers=2).files == 5
    base = {name: (layer.base / name).stat().st_ino for name in ("models/small.bin", "models/old.bin")}
    done = spill(layer, 0)
    assert (done.files, done.written) == (5, 0)
    assert {name: (layer.base / name).stat().st_ino for name in base} == base
    assert (layer.store.items(1) or {}).keys() == {"."}


def test_a_running_job_is_waited_for_and_then_goes_first(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a", "b")
    _gate, jobs = spilling.lock_files(layer.notes, layer.name)
    jobs.parent.mkdir(parents=True, exist_ok=True)
    with jobs.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        with pytest.raises(LayerError, match="a job is using it"):
            spill(layer, 1)
        waiting = threading.Thread(target=spill, args=(layer, 1), kwargs={"wait": 60})
        waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert not (layer.upper / "a").exists()


def test_a_busy_view_is_refused_and_stays_mounted(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a", "b")
    with (layer.merged / "a").open("rb"), pytest.raises(LayerError, match=f"in use by {os.getpid()}"):
        spill(layer, 1)
    assert ramlayer.presence(layer, ROOT).mounted
    assert (layer.upper / "a").exists()


def test_a_mount_name_space_that_keeps_the_view_is_refused(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a", "b")
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo in; exec sleep 600"],
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(LayerError, match=f"{other.pid} s.* still sees it mounted"):
            spill(layer, 1)
        other.kill()
    assert ramlayer.presence(layer, ROOT).mounted
    assert spill(layer, 1).files == 2


def test_a_disk_without_room_is_refused_before_anything_moves(layer: Layer, tmp_path: Path) -> None:
    small = tmp_path / "data/gpu0/small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", str(small)], check=True)
    narrow = Layer(**{**vars(layer), "base": small / "base"})
    ramlayer.mount(narrow, ROOT)
    fill(narrow, "a", "b")
    before = view(narrow.merged)
    with pytest.raises(LayerError, match="MiB left and 8 MiB would go there"):
        spill(narrow, 1)
    assert view(narrow.merged) == before
    assert ramlayer.presence(narrow, ROOT).mounted


def test_a_commit_after_a_spill_merges_the_rest(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a", "b", "c")
    before = view(layer.merged)
    spill(layer, 20)
    ramlayer.stop(layer, ROOT)
    assert commit(layer, ROOT).entries == 1
    assert (layer.base / "c").exists()
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before


def test_an_older_generation_is_barred_once_base_has_changed(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    fill(layer, "a")
    first = ramlayer.sync(layer, ROOT).generation.number
    fill(layer, "b")
    spill(layer, 1)
    assert first not in layer.store.restorable()
    assert layer.store.newest_whole() is not None
