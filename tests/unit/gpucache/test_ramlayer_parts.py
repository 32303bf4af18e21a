# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The manifest, the memory of the last look, what maps say, and digests."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from organism.core._overlay import Entry, read_entry, scan
from organism.core._ramlayer_copy import CHUNK, copy_content, digest
from organism.core._ramlayer_manifest import Item, append, decode, encode, item, touched
from organism.core._ramlayer_mapped import mapped_inodes, may_write, parse_maps
from organism.core._ramlayer_read import settled
from organism.core._ramlayer_seen import SLACK, Memory, Seen, clock, follow, same_clock
from organism.core._ramlayer_seen import touched as touched_since
from organism.core._root import Root

MAPS = b"""\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/dbus-daemon
7fa7c9db6000-7fa7c9db8000 rw-s 00000000 00:2b 8 /srv/gpucache/gpu0/f
7fa7c9dc0000-7fa7c9dc1000 r--s 00000000 00:2b 9 /srv/gpucache/gpu0/read only
7fa7c9dd0000-7fa7c9dd1000 r--s 00000000 00:2b 10 /srv/gpucache/gpu0/may become writable
7fa7c9de0000-7fa7c9de1000 rw-p 00000000 00:2b 11 /srv/gpucache/gpu0/private
7fa7c9df0000-7fa7c9df1000 rw-s 00000000 00:01 12 /dev/shm/x
7fa7c9e00000-7fa7c9e01000 rw-s 00000000 00:00 0
"""
SMAPS = b"""\
7fa7c9dc0000-7fa7c9dc1000 r--s 00000000 00:2b 9 /srv/gpucache/gpu0/read only
Size: 4 kB
VmFlags: rd mr me ms sd
7fa7c9dd0000-7fa7c9dd1000 r--s 00000000 00:2b 10 /srv/gpucache/gpu0/may become writable
Size: 4 kB
VmFlags: rd sh mr mw me ms sd
"""

names = st.text(st.characters(exclude_characters="\0/", exclude_categories=()), min_size=1, max_size=8)
items = st.builds(
    Item, st.sampled_from(("file", "dir", "link", "whiteout")), st.integers(0, 0o7777), st.integers(0, 70000),
    st.integers(0, 70000), st.integers(0, 1 << 40), st.integers(-(1 << 60), 1 << 60), st.just(0), names,
    st.lists(st.tuples(names, st.binary(max_size=9)), unique_by=lambda pair: pair[0]).map(tuple),
    st.integers(0, 1 << 40), names, st.text("0123456789abcdef", max_size=32), st.integers(1, 99),
)  # fmt: skip
trees = st.dictionaries(names, items, max_size=4)


def test_mappings_that_may_be_stored_into_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "proc/77"
    folder.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir()
    (folder / "maps").write_bytes(MAPS)
    (folder / "smaps").write_bytes(SMAPS)
    assert [mapping.inode for mapping in parse_maps(MAPS)] == [8, 9, 10, 12]
    assert mapped_inodes(Root(tmp_path), {os.makedev(0, 0x2B)}) == {8, 10}
    assert mapped_inodes(Root(tmp_path), {os.makedev(0, 0x2C)}) == set()


def test_a_mapping_that_smaps_does_not_know_counts_as_writable() -> None:
    assert not may_write(SMAPS, "7fa7c9dc0000-7fa7c9dc1000")
    assert may_write(SMAPS, "7fa7c9dd0000-7fa7c9dd1000")
    assert may_write(SMAPS, "7fa7c9aaaaaa-7fa7c9bbbbbb")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(trees, trees)
def test_a_chain_of_parts_says_what_its_last_tree_was(one: dict[str, Item], two: dict[str, Item]) -> None:
    root = item(Entry("dir", 0o755, 0, 0, 0, 0), born=1)
    one, two = {**one, ".": root}, {**two, ".": root}
    changed = {path: entry for path, entry in two.items() if one.get(path) != entry}
    parts = [encode(one, full=True), encode(changed, one.keys() - two.keys(), full=False)]
    chain = [(part, hashlib.sha256(part).hexdigest()) for part in parts]
    assert decode(chain[:1]) == one
    assert decode(chain) == two
    assert touched(parts[1]) == changed.keys() | (one.keys() - two.keys())


def test_a_part_that_is_not_what_it_was_is_refused() -> None:
    part = encode({".": item(Entry("dir", 0o755, 0, 0, 0, 0), born=1)}, full=True)
    sha = hashlib.sha256(part).hexdigest()
    with pytest.raises(ValueError, match="part 0 of the manifest is damaged"):
        decode([(part + b" ", sha)])
    late = encode({}, ["x"], full=False)
    with pytest.raises(ValueError, match="does not begin with a full list"):
        decode([(late, hashlib.sha256(late).hexdigest())])


def test_a_manifest_is_written_anew_before_its_chain_costs_more_than_that() -> None:
    assert not append(0, 1, 100, 0)
    assert append(1, 1, 100, 0)
    assert not append(1, 101, 100, 0)
    assert not append(2, 50, 100, 51)
    assert not append(16, 1, 100_000, 16)


def test_what_was_touched_is_followed(tmp_path: Path) -> None:
    for path in ("a/b/f", "a/g", "c/h", "k"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path, encoding="utf-8")
    known = scan(tmp_path)
    time.sleep(0.03)  # the clock's tick: ctime is no finer on some kernels
    since = time.time_ns()
    time.sleep(0.03)
    (tmp_path / "a/b").rename(tmp_path / "c/moved")
    (tmp_path / "k").unlink()
    (tmp_path / "a/g").chmod(0o600)
    (tmp_path / "new").mkdir()
    names = touched_since(tmp_path, since)
    assert names is not None
    assert {"a", "a/g", "c", "c/moved", "new", "."} <= names and "c/h" not in names
    now, fresh = follow(tmp_path, known, names)
    assert now.keys() == scan(tmp_path).keys()
    assert {path: entry.state for path, entry in now.items()} == {p: e.state for p, e in scan(tmp_path).items()}
    assert "c/moved/f" in fresh and "c/h" not in fresh
    assert touched_since(tmp_path / "absent", since) is None


def test_a_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("f", encoding="utf-8")
    memory = Memory(tmp_path / "state/layer.seen")
    assert memory.head() is None
    entries = scan(tmp_path)
    seen = Seen("token", 3, 5, clock(), {"f"}, entries, {"f": item(entries["f"], digest="0", born=3)}, {"p": "1"})
    memory.keep(seen)
    again = memory.head()
    assert again is not None and (again.token, again.generation, again.since, again.compare) == ("token", 3, 5, {"f"})
    assert memory.fill(again)
    assert (again.entries, again.items, again.promoted) == (seen.entries, seen.items, seen.promoted)
    assert same_clock(again.clock, clock())
    memory.path.write_bytes(memory.path.read_bytes()[:-9])
    cut = memory.head()
    assert cut is not None and not memory.fill(cut)
    memory.forget()
    assert memory.head() is None


def test_a_digest_does_not_depend_on_where_the_holes_are(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    content = b"head" + bytes(5 * CHUNK) + b"tail"
    dense.write_bytes(content)
    with sparse.open("wb") as stream:
        stream.write(b"head")
        stream.seek(4 + 5 * CHUNK)
        stream.write(b"tail")
    assert digest(dense) == digest(sparse) == copy_content(dense, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "copy").stat().st_blocks < dense.stat().st_blocks
    shorter = tmp_path / "shorter"
    shorter.write_bytes(content[:-4])
    longer = tmp_path / "longer"
    longer.write_bytes(content[:-4] + bytes(4))
    assert len({digest(path) for path in (dense, shorter, longer)}) == 3


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o4755, 0o2775, 0o1777])
def test_a_copy_is_made_like_its_entry(tmp_path: Path, mode: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5000)
    source.chmod(mode)
    os.utime(source, ns=(1, 1_234_567_890_123_456_789))
    entry = read_entry(source)
    copy_content(source, tmp_path / "copy", entry)
    assert read_entry(tmp_path / "copy").state == entry.state


def test_an_empty_tail_is_part_of_a_copy(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.write(b"head")
        stream.truncate(3 * CHUNK + 5)
    copy_content(tmp_path / "sparse", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()


def test_an_entry_seen_before_the_reading_counts_only_while_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old", encoding="utf-8")
    known = read_entry(path)
    path.write_text("newer", encoding="utf-8")
    reads: list[str] = []

    def read() -> str:
        reads.append(path.read_text(encoding="utf-8"))
        return digest(path)

    later = time.time_ns() + 10**9
    found = settled(str(path), read, mapped=(), looked=later, known=known)
    assert found is not None and found[0].size == 5 and reads == ["newer", "newer"]
    # and while it does, nothing is asked twice
    time.sleep(3 * SLACK / 1e9)
    reads.clear()
    now = read_entry(path)
    again = settled(str(path), read, mapped=(), looked=time.time_ns() + 10**9, known=now)
    assert again is not None and again[1] == found[1] and len(reads) == 1


def test_how_xfs_stores_an_acl_is_no_attribute_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ["trusted.SGI_ACL_FILE", "user.note", "trusted.SGI_ACL_DEFAULT"]
    monkeypatch.setattr(os, "listxattr", lambda *_path, **_follow: shown)
    monkeypatch.setattr(os, "getxattr", lambda *_path, **_follow: b"v")
    assert read_entry(tmp_path).attributes == (("user.note", b"v"),)
