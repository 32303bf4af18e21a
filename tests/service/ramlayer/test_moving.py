# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A layer that is written to while it is saved, that is full, and generations that are damaged."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.ram.disks import Disk, Unavailable

from organism.core import _ramlayer as ramlayer
from organism.core import _ramlayer_read as reading
from organism.core import _ramlayer_seen as remembered
from organism.core._overlay import LayerError
from organism.core._ramlayer import Layer
from service.ramlayer.trees import ROOT, crash_and_restore, make_layer

PAGE = 4096


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return tmp_path / "machine"


@pytest.fixture
def layer(top: Path) -> Layer:
    made = make_layer(top)
    ramlayer.mount(made, ROOT)
    return made


def saved(layer: Layer, name: str) -> bytes:
    return (layer.store.current_tree() / name).read_bytes()


def test_a_mapping_that_is_gone_again_was_seen(layer: Layer) -> None:
    path = layer.merged / "model"
    path.write_bytes(b"a" * PAGE)
    ramlayer.sync(layer, ROOT)
    before = (layer.upper / "model").stat()
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        assert mapped[:3] == b"aaa"  # the page is there, and writable: the store below makes no fault
        mapped[:3] = b"new"
    after = (layer.upper / "model").stat()
    assert (before.st_ctime_ns, before.st_mtime_ns) == (after.st_ctime_ns, after.st_mtime_ns)  # the reason of this test
    assert ramlayer.sync(layer, ROOT).new
    assert saved(layer, "model")[:3] == b"new"


def test_a_mapping_of_a_promoted_file_is_saved(layer: Layer) -> None:
    ramlayer.sync(layer, ROOT)
    with (layer.merged / "a/x").open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[:3] = b"new"
    assert ramlayer.sync(layer, ROOT).new
    assert saved(layer, "a/x")[:3] == b"new"


def test_what_is_still_mapped_is_told_and_compared_each_time(layer: Layer, top: Path) -> None:
    path = layer.merged / "model"
    path.write_bytes(b"a" * PAGE)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        assert ramlayer.sync(layer, ROOT).not_quiescent == ("model",)
        mapped[:3] = b"one"
        again = ramlayer.sync(layer, ROOT)
        assert again.new and again.not_quiescent == ("model",) and again.generation.not_quiescent == 1
        note = ramlayer.last_sync(layer)
        assert note is not None and note["not_quiescent"] == ["model"]
        assert not ramlayer.sync(layer, ROOT).new
        mapped[:3] = b"two"
    last = ramlayer.sync(layer, ROOT)
    assert last.new and last.not_quiescent == ()
    crash_and_restore(layer, top)
    assert path.read_bytes()[:3] == b"two"


def test_a_mapping_for_reading_alone_is_none(layer: Layer) -> None:
    path = layer.merged / "model"
    path.write_bytes(b"a" * PAGE)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ):
        assert ramlayer.sync(layer, ROOT).not_quiescent == ()


def test_a_mapping_of_another_process_is_seen(layer: Layer) -> None:
    path = layer.merged / "model"
    path.write_bytes(b"a" * PAGE)
    code = (
        "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\nf.close()\n"
        "print('mapped',flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "mapped\n"
        assert ramlayer.sync(layer, ROOT).not_quiescent == ("model",)
        process.communicate()
    assert ramlayer.sync(layer, ROOT).not_quiescent == ()


def test_a_file_that_changes_whenever_it_is_read_stays_as_it_was(
    layer: Layer, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layer.merged / "log"
    path.write_text("whole", encoding="utf-8")
    ramlayer.sync(layer, ROOT)
    (layer.merged / "other").write_text("other", encoding="utf-8")
    path.write_text("torn 0", encoding="utf-8")
    real, writes = reading.read_entry, iter(range(1, 1000))

    def restless(name: Path) -> object:
        if str(name).endswith("upper/log"):
            path.write_text(f"torn {next(writes)}", encoding="utf-8")
        return real(name)

    monkeypatch.setattr(reading, "read_entry", restless)
    done = ramlayer.sync(layer, ROOT)
    assert done.unsettled == ("log",) and done.generation.unsettled == 1
    assert saved(layer, "log") == b"whole"
    assert saved(layer, "other") == b"other"
    monkeypatch.undo()
    calm = ramlayer.sync(layer, ROOT)
    assert calm.unsettled == ()
    assert saved(layer, "log").startswith(b"torn")
    crash_and_restore(layer, top)
    assert path.read_bytes() == saved(layer, "log")


def test_writers_never_tear_a_generation(layer: Layer) -> None:
    """Programs rewrite files as a whole, each of one letter, while syncs run: no generation holds two letters."""
    ended = threading.Event()

    def program(number: int) -> None:
        letters = 0
        while not ended.is_set():
            with (layer.merged / f"w{number}").open("r+b" if letters else "w+b", buffering=0) as stream:
                for place in range(0, 64 * PAGE, 16 * PAGE):
                    stream.seek(place)
                    stream.write(b"abcdefghij"[letters % 10 : letters % 10 + 1] * 16 * PAGE)
            letters += 1
            ended.wait(0.05)

    programs = [threading.Thread(target=program, args=(number,)) for number in range(3)]
    for thread in programs:
        thread.start()
    whole = 0
    try:
        for _sync in range(8):
            number = ramlayer.sync(layer, ROOT).generation.number
            for path in sorted(layer.store.tree(number).glob("w*")):
                content = path.read_bytes()
                # a program's own half-done rewrite is a state that others saw, too: one border, where it paused
                borders = [at for at in range(1, len(content)) if content[at] != content[at - 1]]
                assert all(at % (16 * PAGE) == 0 for at in borders) and len(borders) <= 1
                whole += 1
    finally:
        ended.set()
        for thread in programs:
            thread.join()
    assert whole


def test_a_clock_that_was_set_back_hides_nothing(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layer.merged / "x"
    path.write_text("one", encoding="utf-8")
    ramlayer.sync(layer, ROOT)
    path.write_text("two", encoding="utf-8")
    # to find(1) the change is older than the last look, as it is when the clock goes back
    monkeypatch.setattr(remembered, "touched", lambda *_a, **_k: set())
    monkeypatch.setattr("organism.core._ramlayer_save.touched", lambda *_a, **_k: set())
    monkeypatch.setattr("organism.core._ramlayer_save.clock", lambda: remembered.clock() - 3_600_000_000_000)
    assert ramlayer.sync(layer, ROOT).new
    assert saved(layer, "x") == b"two"


def test_a_lost_memory_costs_time_and_nothing_else(layer: Layer) -> None:
    (layer.merged / "n").write_text("n", encoding="utf-8")
    first = ramlayer.sync(layer, ROOT)
    layer.memory.path.write_bytes(b"no memory")
    assert not ramlayer.sync(layer, ROOT).new
    assert layer.store.current_number() == first.generation.number
    assert layer.memory.head() is not None


def test_a_changed_mode_writes_no_content_where_blocks_can_be_shared(top: Path, tmp_path: Path) -> None:
    try:
        disk = Disk(tmp_path, "xfs")
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        layer = make_layer(top, disk=disk.place)
        ramlayer.mount(layer, ROOT)
        (layer.merged / "big").write_bytes(os.urandom(3_000_000))
        ramlayer.sync(layer, ROOT)
        (layer.merged / "big").chmod(0o600)
        done = ramlayer.sync(layer, ROOT)
        assert done.new and done.written < 10_000
        old, new = ((layer.store.tree(number) / "big").stat() for number in (1, 2))
        assert (old.st_mode & 0o777, new.st_mode & 0o777) == (0o644, 0o600) and old.st_ino != new.st_ino
        ramlayer.stop(layer, ROOT)
    finally:
        disk.remove()


def test_a_renamed_file_is_not_written_again(layer: Layer, top: Path) -> None:
    (layer.merged / "one").write_bytes(os.urandom(500_000))
    content = (layer.merged / "one").read_bytes()
    ramlayer.sync(layer, ROOT)
    (layer.merged / "one").rename(layer.merged / "two")
    done = ramlayer.sync(layer, ROOT)
    assert done.new and done.written < 5_000
    crash_and_restore(layer, top)
    assert (layer.merged / "two").read_bytes() == content
    assert not (layer.merged / "one").exists()


def test_a_bit_that_flipped_on_disk_is_found_by_the_restore(layer: Layer, top: Path) -> None:
    for text in ("old", "new"):
        (layer.merged / "n").write_text(text, encoding="utf-8")
        ramlayer.sync(layer, ROOT)
    path = layer.store.current_tree() / "n"
    status = path.stat()
    path.write_text("nEw", encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert layer.store.damage(2) == ""
    assert "n has another content" in layer.store.damage(2, deep=True)
    assert "generation 1 restored (generation 2 is damaged" in crash_and_restore(layer, top)
    assert (layer.merged / "n").read_text(encoding="utf-8") == "old"


def test_a_damaged_current_generation_does_not_stop_the_next_sync(layer: Layer, top: Path) -> None:
    for text in ("one", "two", "three", "four", "five"):
        (layer.merged / "n").write_text(text, encoding="utf-8")
        (layer.merged / text).write_text(text, encoding="utf-8")
        ramlayer.sync(layer, ROOT)
    (layer.store.current_tree() / "four").unlink()
    (layer.merged / "six").write_text("six", encoding="utf-8")
    (layer.merged / "four").rename(layer.merged / "four again")
    number = ramlayer.sync(layer, ROOT).generation.number
    assert layer.store.damage(number, deep=True) == ""
    assert f"generation {number} restored" in crash_and_restore(layer, top)


def _fill_up(descriptor: int) -> None:
    try:
        while os.write(descriptor, b"f" * 1024 * 1024):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def test_a_full_layer_is_saved(layer: Layer, top: Path) -> None:
    with (layer.merged / "fill").open("wb", buffering=0) as stream:
        _fill_up(stream.fileno())
    assert ramlayer.sync(layer, ROOT).new
    size = (layer.merged / "fill").stat().st_size
    assert "restored" in crash_and_restore(layer, top)
    assert (layer.merged / "fill").stat().st_size == size


@pytest.fixture
def small(tmp_path: Path, top: Path) -> Iterator[Layer]:
    """A layer on a disk that it fills up."""
    try:
        disk = Disk(tmp_path, "ext4")
    except Unavailable as error:
        pytest.skip(str(error))
    made = make_layer(top, size_mb=128, disk=disk.place)
    ramlayer.mount(made, ROOT)
    yield made
    ramlayer.unmount(made.merged)
    ramlayer.unmount(made.ram)
    disk.remove()


def test_a_full_disk_gives_up_the_spare_generation_first(small: Layer) -> None:
    for number in range(5):
        (small.merged / "big").write_bytes(os.urandom(14 * 1024 * 1024))
        (small.merged / f"n{number}").write_text("n", encoding="utf-8")
        ramlayer.sync(small, ROOT)
    assert small.store.spare.exists()
    number = small.store.current_number()
    (small.merged / "big").write_bytes(os.urandom(30 * 1024 * 1024))
    ramlayer.sync(small, ROOT)
    (small.merged / "big").write_bytes(os.urandom(80 * 1024 * 1024))
    with pytest.raises(LayerError, match=r"stays current: no space left on the disk; free some"):
        ramlayer.sync(small, ROOT)
    note = ramlayer.last_sync(small)
    assert note is not None and note["no_space"] is True
    kept = small.store.current_number()
    assert kept is not None and number is not None and kept > number
    assert small.store.damage(kept, deep=True) == ""
