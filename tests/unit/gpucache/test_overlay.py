# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mount tables, trees and what of an upper directory is worth saving."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from organism.core._overlay import (
    Entry,
    holding_mount,
    link_groups,
    mount_at,
    parse_mountinfo,
    read_entry,
    scan,
    without_clean,
)
from organism.core._ramlayer import Presence
from organism.core._ramlayer_content import Candidate, choose
from organism.core._ramlayer_generations import Store
from organism.core._ramlayer_manifest import item, memory_needed

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /run/gpucache/gpu0 rw,nosuid,nodev shared:9 master:2 - tmpfs ram-gpu0 rw,size=512000k,mode=755
31 22 0:31 / /srv/with\\040blank rw - overlay layer rw,lowerdir=/a,upperdir=/b
32 22 0:32 / /srv/gpu0 rw - ext4 /dev/sdb rw
33 32 0:33 / /srv/gpu0 rw - overlay layer rw
"""


def test_a_mount_table_is_read_with_its_blanks_and_layers() -> None:
    found = parse_mountinfo(TABLE)
    assert [mount.target for mount in found][2] == "/srv/with blank"
    assert (mount_at(found, "/srv/gpu0") or found[0]).kind == "overlay"
    assert mount_at(found, "/srv/none") is None
    assert (holding_mount(found, "/srv/gpu0/x/y") or found[0]).kind == "overlay"
    assert (holding_mount(found, "/srv/gpu01") or found[1]).target == "/"
    assert Presence(found[1], None, True).size_mb == 500


def test_a_scan_lists_parents_before_children(tmp_path: Path) -> None:
    for path in ("b/c/d", "a", "b/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    listed = list(scan(tmp_path))
    assert sorted(listed) == [".", "a", "b", "b/c", "b/c/d", "b/x"]
    assert all(str(Path(path).parent) in (".", *listed[:place]) for place, path in enumerate(listed))


def twins(tmp_path: Path) -> tuple[Path, Path]:
    """An upper and a base that are the same in all but their place."""
    upper, base = tmp_path / "upper", tmp_path / "base"
    for top in (upper, base):
        (top / "d/e").mkdir(parents=True)
        (top / "d/f").write_text("f", encoding="utf-8")
        (top / "d/e/g").write_text("g", encoding="utf-8")
        for path in (top / "d/f", top / "d/e/g", top / "d/e", top / "d", top):
            os.utime(path, (1000, 1000))
    return upper, base


def test_what_mirrors_base_is_not_saved(tmp_path: Path) -> None:
    upper, base = twins(tmp_path)
    assert list(without_clean(scan(upper), base)) == ["."]


def test_a_change_is_saved_with_the_directories_that_lead_to_it(tmp_path: Path) -> None:
    upper, base = twins(tmp_path)
    os.utime(upper / "d/e/g", (2000, 2000))
    assert sorted(without_clean(scan(upper), base)) == [".", "d", "d/e", "d/e/g"]


def test_nothing_below_an_opaque_directory_mirrors_base(tmp_path: Path) -> None:
    upper, base = twins(tmp_path)
    entries = scan(upper)
    entries["d"] = entries["d"]._replace(attributes=(("trusted.overlay.opaque", b"y"),))
    assert sorted(without_clean(entries, base)) == [".", "d", "d/e", "d/e/g", "d/f"]


def test_a_link_in_base_does_not_stand_for_a_directory(tmp_path: Path) -> None:
    upper, base = twins(tmp_path)
    (base / "d").rename(base / "elsewhere")
    (base / "d").symlink_to("elsewhere")
    assert "d/e/g" in without_clean(scan(upper), base)


def test_hard_links_in_upper_are_saved(tmp_path: Path) -> None:
    upper, base = twins(tmp_path)
    (upper / "h").hardlink_to(upper / "d/f")
    saved = without_clean(scan(upper), base)
    assert {"h", "d/f"} <= saved.keys()
    assert link_groups(saved) == {frozenset({"h", "d/f"})}


def test_memory_is_counted_in_pages_and_links_once() -> None:
    file = Entry("file", 0o644, 0, 0, 5000, 0, allocated=8192)
    tiny = Entry("file", 0o644, 0, 0, 1, 0, allocated=512)
    folder = Entry("dir", 0o755, 0, 0, 4096, 0, allocated=4096)
    first, second = item(file, link="a", born=1), item(file, link="a", born=1)
    items = {"a": first, "b": second, "c": item(tiny, born=1), ".": item(folder, born=1)}
    assert memory_needed(items) == 8192 + 4096


def test_reading_an_entry_keeps_the_link_as_written(tmp_path: Path) -> None:
    (tmp_path / "l").symlink_to("./x/../y")
    assert read_entry(tmp_path / "l").target == "./x/../y"


candidates = st.lists(
    st.builds(Candidate, st.text("abc", min_size=1, max_size=3), st.integers(1, 100_000), st.integers(0, 5)),
    unique_by=lambda c: c.path,
)


@given(candidates, st.integers(1, 100_000), st.integers(-10, 200_000))
def test_prewarming_keeps_its_budget_and_prefers_the_newest(found: list[Candidate], largest: int, budget: int) -> None:
    chosen, left_out = choose(found, largest=largest, budget=budget)
    pages = [-(-c.size // 4096) * 4096 for c in chosen]
    assert sum(pages) <= max(budget, 0)
    assert all(c.size < largest for c in chosen)
    assert len(chosen) + left_out == len(found)
    assert [c.mtime_ns for c in chosen] == sorted((c.mtime_ns for c in chosen), reverse=True)
    room = budget - sum(pages)
    for candidate in found:
        if candidate not in chosen and candidate.size < largest:
            assert -(-candidate.size // 4096) * 4096 > room


def test_unreadable_records_are_no_generations(tmp_path: Path) -> None:
    store = Store("gpu0", tmp_path)
    assert (store.current_number(), store.numbers(), store.newest_whole()) == (None, [], None)
    (tmp_path / "generations/3/upper").mkdir(parents=True)
    record = tmp_path / "generations/3/generation.json"
    for text in ("", "[]", "3", '{"version": 9}', '{"version": 2, "number": 4}', '{"version": 2, "number": 3}'):
        record.write_text(text, encoding="utf-8")
        assert store.read(3) is None
    assert store.whole(3) is None
