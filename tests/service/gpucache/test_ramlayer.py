# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine on real mounts: what was seen before a stop is seen after a start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from organism.core import _ramlayer as ramlayer
from organism.core._overlay import LayerError, scan
from organism.core._ramlayer import Layer
from organism.core._ramlayer_content import commit, prewarm, restore
from organism.core._root import Root

from .conftest import mounts_below
from .views import view

ROOT = Root()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite_everything(top: Path) -> None:
    """Each kind of change that overlayfs records in its own way."""
    (top / "models/small.bin").unlink()  # whiteout
    shutil.rmtree(top / "full")  # whiteout of a directory ...
    (top / "full").mkdir()  # ... made opaque
    (top / "full/new").write_text("new", encoding="utf-8")
    (top / "models/old.bin").rename(top / "models/moved.bin")
    out = top / "out"
    out.mkdir(mode=0o2775)
    (out / "one").write_text("shared", encoding="utf-8")
    (out / "two").hardlink_to(out / "one")
    (out / "link").symlink_to("./one")
    (out / "owned").write_text("x", encoding="utf-8")
    os.chown(out / "owned", 1234, 4321)
    (out / "owned").chmod(0o640)
    os.setxattr(out / "owned", "user.tag", b"\x00\x01")
    os.setxattr(out / "owned", "trusted.note", b"kept")
    with (out / "sparse").open("wb") as stream:
        stream.truncate(8 * 1024 * 1024)
    (out / "odd [*]?\\ name\n").write_text("odd", encoding="utf-8")
    os.utime(out, ns=(1, 1_500_000_000_123_456_789))


def test_a_restart_shows_the_same_content(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    rewrite_everything(layer.merged)
    before = view(layer.merged)
    ramlayer.sync(layer, ROOT)
    ramlayer.stop(layer, ROOT)
    assert not layer.merged.exists()
    assert "restored" in ramlayer.mount(layer, ROOT)
    after = view(layer.merged)
    assert after == before
    assert after["hard links"] == [["out/one", "out/two"]]
    assert names(layer.merged / "full") == ["new"]
    assert scan(layer.upper)["full"].opaque


def test_what_is_written_after_the_last_sync_is_saved_by_the_stop(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    ramlayer.sync(layer, ROOT)
    (layer.merged / "late").write_text("late", encoding="utf-8")
    ramlayer.stop(layer, ROOT)
    ramlayer.mount(layer, ROOT)
    assert (layer.merged / "late").read_text(encoding="utf-8") == "late"


def test_a_crash_gives_back_the_last_sync(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "saved").write_text("saved", encoding="utf-8")
    ramlayer.sync(layer, ROOT)
    (layer.merged / "lost").write_text("lost", encoding="utf-8")
    for target in mounts_below(layer.ram.parents[1]):  # the machine loses its memory
        subprocess.run(["umount", target], check=True)
    ramlayer.mount(layer, ROOT)
    assert (layer.merged / "saved").exists()
    assert not (layer.merged / "lost").exists()


def test_a_second_sync_copies_only_what_changed(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    rewrite_everything(layer.merged)
    first = ramlayer.sync(layer, ROOT)
    again = ramlayer.sync(layer, ROOT)
    assert (first.new, again.new) == (True, False)
    assert again.generation.number == first.generation.number
    (layer.merged / "out/fresh").write_bytes(b"f" * 5000)
    third = ramlayer.sync(layer, ROOT)
    assert third.new
    assert 5000 < third.written < 6000  # the file, and its line in the manifest
    old, new = layer.store.tree(first.generation.number), layer.store.tree(third.generation.number)
    assert (old / "full/new").stat().st_ino == (new / "full/new").stat().st_ino
    assert (old / "out/owned").stat().st_ino == (new / "out/owned").stat().st_ino


def test_a_changed_mode_does_not_reach_back_into_the_last_generation(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "x").write_text("x", encoding="utf-8")
    (layer.merged / "x").chmod(0o600)
    first = ramlayer.sync(layer, ROOT).generation.number
    (layer.merged / "x").chmod(0o644)
    second = ramlayer.sync(layer, ROOT).generation.number
    modes = [(layer.store.tree(n) / "x").stat().st_mode & 0o777 for n in (first, second)]
    assert modes == [0o600, 0o644]


def test_a_broken_hard_link_stays_broken(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    for name in ("one", "two", "three"):
        (layer.merged / name).write_text("same", encoding="utf-8")
    (layer.merged / "two").unlink()
    (layer.merged / "two").hardlink_to(layer.merged / "one")
    (layer.merged / "three").unlink()
    (layer.merged / "three").hardlink_to(layer.merged / "one")
    ramlayer.sync(layer, ROOT)
    copy = layer.merged / "copy"
    shutil.copy2(layer.merged / "three", copy)  # same size and times, another file
    copy.rename(layer.merged / "three")
    saved = ramlayer.sync(layer, ROOT)
    assert saved.new
    ramlayer.stop(layer, ROOT)
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged)["hard links"] == [["one", "two"]]


def test_only_the_wanted_number_of_generations_is_kept(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    for number in range(5):
        (layer.merged / "n").write_text(str(number), encoding="utf-8")
        ramlayer.sync(layer, ROOT)
    assert layer.store.numbers() == [3, 4, 5]
    assert layer.store.current_number() == 5
    assert [path.name for path in layer.store.folder.iterdir() if path.name.startswith(".")] == [".spare"]


def test_a_damaged_generation_is_passed_over_and_none_is_refused(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    for number in (1, 2):
        (layer.merged / "n").write_text("x" * number, encoding="utf-8")
        ramlayer.sync(layer, ROOT)
    ramlayer.stop(layer, ROOT)
    (layer.store.tree(2) / "n").unlink()
    assert "generation 1 restored (generation 2 is damaged" in ramlayer.mount(layer, ROOT)
    assert (layer.merged / "n").read_text(encoding="utf-8") == "x"
    ramlayer.stop(layer, ROOT)
    for number in layer.store.numbers():
        (layer.store.folder / str(number) / "generation.json").write_text("{", encoding="utf-8")
    with pytest.raises(LayerError, match=r"no generation in .* is whole"):
        ramlayer.mount(layer, ROOT)
    assert not mounts_below(layer.ram.parents[1])


def test_a_generation_larger_than_the_cache_is_not_restored(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "big").write_bytes(os.urandom(20 * 1024 * 1024))
    ramlayer.stop(layer, ROOT)
    small = Layer(**{**vars(layer), "size_mb": 16})
    with pytest.raises(LayerError, match=r"needs 2\d MiB of RAM, the layer has 16"):
        ramlayer.mount(small, ROOT)
    assert not mounts_below(layer.ram.parents[1])


def test_a_mounted_cache_is_resized_in_place_but_never_below_its_content(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "big").write_bytes(b"x" * (20 * 1024 * 1024))
    larger = Layer(**{**vars(layer), "size_mb": 64})
    assert "resized from 32 to 64 MiB" in ramlayer.mount(larger, ROOT)
    assert ramlayer.presence(larger, ROOT).size_mb == 64
    with pytest.raises(LayerError, match="are in use, the limit cannot become 16 MiB"):
        ramlayer.mount(Layer(**{**vars(layer), "size_mb": 16}), ROOT)


def test_syncing_what_is_not_mounted_is_refused(layer: Layer) -> None:
    with pytest.raises(LayerError, match="gpu0 is not mounted"):
        ramlayer.sync(layer, ROOT)
    assert not layer.persist.exists()


def test_a_busy_cache_is_saved_but_not_torn_away(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    with (layer.merged / "log").open("w", encoding="utf-8") as stream:
        stream.write("line")
        stream.flush()
        with pytest.raises(LayerError, match=rf"in use by .*{os.getpid()} .*saved as generation 1"):
            ramlayer.stop(layer, ROOT)
        assert ramlayer.presence(layer, ROOT).mounted
    assert "current" in ramlayer.stop(layer, ROOT)


def test_a_cut_restore_is_begun_again(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "kept").write_text("kept", encoding="utf-8")
    ramlayer.stop(layer, ROOT)
    layer.ram.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "half", str(layer.ram)], check=True)
    layer.upper.mkdir()
    (layer.upper / "half").write_text("half", encoding="utf-8")
    with pytest.raises(LayerError, match="not mounted"):
        ramlayer.sync(layer, ROOT)
    ramlayer.mount(layer, ROOT)
    assert (layer.merged / "kept").exists()
    assert not (layer.merged / "half").exists()


@pytest.fixture
def small_disk(layer: Layer, tmp_path: Path) -> Path:
    """The persistent side on an ext4 of 12 MiB."""
    image = tmp_path / "disk.img"
    with image.open("wb") as stream:
        stream.truncate(12 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)], check=True)
    layer.persist.mkdir(parents=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(layer.persist)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"loop mounts are not permitted here: {done.stderr.decode().strip()}")
    return layer.persist


def test_a_full_disk_leaves_the_last_generation_and_says_so(layer: Layer, small_disk: Path) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "fits").write_bytes(b"f" * 1_000_000)
    ramlayer.sync(layer, ROOT)
    (layer.merged / "too big").write_bytes(os.urandom(14 * 1024 * 1024))
    with pytest.raises(LayerError, match=r"generation 1 stays current: no space left"):
        ramlayer.sync(layer, ROOT)
    assert layer.store.newest_whole() is not None
    assert names(layer.store.folder) == ["1"]
    shown = ramlayer.status(layer, ROOT)
    assert shown["last_sync"]["ok"] is False
    assert "no space left" in shown["last_sync"]["error"]
    with pytest.raises(LayerError, match="its content is still in"):
        ramlayer.stop(layer, ROOT)
    (layer.upper / "too big").unlink()  # the overlay is unmounted now
    ramlayer.sync(layer, ROOT)
    assert ramlayer.status(layer, ROOT)["last_sync"]["ok"] is True


def test_two_syncs_at_once_are_one_after_the_other(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    (layer.merged / "x").write_bytes(os.urandom(4 * 1024 * 1024))
    results: list[ramlayer.Saved] = []
    threads = [threading.Thread(target=lambda: results.append(ramlayer.sync(layer, ROOT))) for _ in range(3)]
    with ramlayer.locked(layer):
        for thread in threads:
            thread.start()
        assert not layer.store.numbers()
    for thread in threads:
        thread.join(60)
    assert sorted(saved.new for saved in results) == [False, False, True]
    assert layer.store.numbers() == [1]


def test_a_copy_that_loses_attributes_is_not_made_current(layer: Layer) -> None:
    layer.persist.parent.mkdir(parents=True, exist_ok=True)
    layer.persist.mkdir()
    # ramfs keeps owners and times but no extended attributes
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(layer.persist)], check=True)
    ramlayer.mount(layer, ROOT)
    rewrite_everything(layer.merged)
    with pytest.raises(LayerError, match="nothing was saved before"):
        ramlayer.sync(layer, ROOT)
    assert layer.store.current_number() is None
    assert layer.store.numbers() == []


def test_prewarming_stays_below_the_watermark_and_newest_first(layer: Layer) -> None:
    for number in range(8):
        path = layer.base / f"models/m{number}.bin"
        path.write_bytes(os.urandom(6 * 1024 * 1024))
        os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))
    (layer.base / "models/huge.bin").write_bytes(os.urandom(9 * 1024 * 1024))
    ramlayer.mount(layer, ROOT)
    (layer.merged / "models/m7.bin").unlink()
    before = view(layer.merged)
    warmed = prewarm(layer, ROOT, largest_mb=8, readers=4)
    assert view(layer.merged) == before
    # the five small files and the newest four large ones that 85 % of 32 MiB hold; m7 is deleted, huge.bin too large
    promoted = {path for path, entry in scan(layer.upper).items() if entry.kind == "file" and entry.size > 1_000_000}
    assert promoted == {f"models/m{n}.bin" for n in (6, 5, 4, 3)}
    assert warmed.files == 9
    assert ramlayer.usage(layer).percent <= 85
    assert prewarm(layer, ROOT, largest_mb=8, readers=4).files == 0


def test_what_was_prewarmed_is_not_written_back(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    first = ramlayer.sync(layer, ROOT)
    prewarm(layer, ROOT, largest_mb=8, readers=2)
    assert (layer.upper / "models/old.bin").exists()
    assert not ramlayer.sync(layer, ROOT).new
    with (layer.merged / "models/old.bin").open("ab") as stream:
        stream.write(b"more")
    saved = ramlayer.sync(layer, ROOT)
    assert saved.generation.number == first.generation.number + 1
    assert (layer.store.tree(saved.generation.number) / "models/old.bin").stat().st_size == 20_004
    assert not (layer.store.tree(saved.generation.number) / "models/small.bin").exists()


def test_a_file_like_the_one_an_opaque_directory_hides_is_saved(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    shutil.copytree(layer.merged / "full", layer.merged / "twin", copy_function=shutil.copy2)
    shutil.rmtree(layer.merged / "full")
    (layer.merged / "twin").rename(layer.merged / "full")  # opaque, and each file just like the hidden one
    before = view(layer.merged)
    ramlayer.stop(layer, ROOT)
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before
    assert names(layer.merged / "full") == ["a", "b", "c"]


def test_a_commit_merges_everything_into_base(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    rewrite_everything(layer.merged)
    (layer.merged / "models/moved.bin").unlink()
    (layer.merged / "models").rmdir()
    (layer.merged / "models").write_text("a file where a directory was", encoding="utf-8")
    before = view(layer.merged)
    with pytest.raises(LayerError, match="gpu0 is mounted"):
        commit(layer, ROOT)
    ramlayer.stop(layer, ROOT)
    generation = commit(layer, ROOT)
    assert generation.merged
    assert view(layer.base) == before
    assert layer.store.numbers() == [generation.number]
    assert commit(layer, ROOT) == generation
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before
    assert len(scan(layer.upper)) == 1


def test_a_commit_can_be_repeated_after_a_cut(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    rewrite_everything(layer.merged)
    before = view(layer.merged)
    ramlayer.stop(layer, ROOT)
    # cut: base already has a part, the generation is still current
    shutil.rmtree(layer.base / "full")
    (layer.base / "models/small.bin").unlink()
    ramlayer.mount(layer, ROOT)
    assert view(layer.merged) == before
    ramlayer.stop(layer, ROOT)
    commit(layer, ROOT)
    assert view(layer.base) == before


def test_an_older_generation_can_be_chosen_while_unmounted(layer: Layer) -> None:
    ramlayer.mount(layer, ROOT)
    for number in (1, 2):
        (layer.merged / "n").write_text(str(number), encoding="utf-8")
        ramlayer.sync(layer, ROOT)
    with pytest.raises(LayerError, match="its next sync would undo this"):
        restore(layer, ROOT, 1)
    ramlayer.stop(layer, ROOT)
    with pytest.raises(LayerError, match="no generation 9; there are: 1, 2"):
        restore(layer, ROOT, 9)
    restore(layer, ROOT, 1)
    ramlayer.mount(layer, ROOT)
    assert (layer.merged / "n").read_text(encoding="utf-8") == "1"
    (layer.merged / "n").write_text("three", encoding="utf-8")
    assert ramlayer.sync(layer, ROOT).generation.number == 3


def test_names_hidden_by_the_mount_are_reported(layer: Layer) -> None:
    layer.merged.mkdir(parents=True)
    (layer.merged / "stray").write_text("stray", encoding="utf-8")
    assert "hides 1 names" in ramlayer.mount(layer, ROOT)
    ramlayer.stop(layer, ROOT)
    assert (layer.merged / "stray").exists()


def test_the_status_tells_the_level(layer: Layer) -> None:
    assert ramlayer.status(layer, ROOT)["level"] == "off"
    ramlayer.mount(layer, ROOT)
    assert ramlayer.status(layer, ROOT)["level"] == "ok"
    (layer.merged / "x").write_bytes(b"x" * (29 * 1024 * 1024))
    assert ramlayer.status(layer, ROOT)["level"] == "high"
    (layer.merged / "y").write_bytes(b"x" * (2 * 1024 * 1024))
    shown = ramlayer.status(layer, ROOT)
    assert shown["level"] == "full"
    json.dumps(shown)
