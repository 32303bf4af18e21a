# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Output is bounded in memory, in the report and on disk, and nothing of it is lost silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.worker.output import Capture, read_log


def capture(path: Path, chunks: list[bytes], *, report: int = 1000, file: int = 10**9) -> Capture:
    with Capture(path, report_bytes=report, file_bytes=file) as made:
        for chunk in chunks:
            made.feed(chunk)
    return made


def test_what_fits_is_reported_as_it_is(tmp_path: Path) -> None:
    made = capture(tmp_path / "log", [b"a" * 999, b"\n"])
    assert made.text() == "a" * 999 + "\n"
    assert (tmp_path / "log").read_bytes() == b"a" * 999 + b"\n"


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 700), max_size=30))
def test_head_and_tail_halves_around_what_was_left_out(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    whole = bytes(ord("a") + position % 26 for position in range(sum(sizes)))
    chunks, at = [], 0
    for size in sizes:
        chunks.append(whole[at : at + size])
        at += size
    made = capture(tmp_path_factory.mktemp("output") / "log", chunks, report=1000)
    text = made.text().encode()
    assert made.total == len(whole)
    assert len(text) <= 1000
    assert made.path.read_bytes() == whole
    if len(whole) <= 1000:
        assert text == whole
    else:
        head, notice, tail = text.split(b"\n")[0], text.split(b"\n")[1], text.split(b"\n")[2]
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert notice == b"[organism: %d bytes left out; the log has them]" % (len(whole) - len(head) - len(tail))
        assert len(head) == len(tail) == 460


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    assert capture(tmp_path / "log", [b"\xff\x00ok"]).text() == "\ufffd\x00ok"


def test_the_file_stops_at_its_limit_and_says_so(tmp_path: Path) -> None:
    made = capture(tmp_path / "log", [b"x" * 70, b"y" * 70, b"z" * 70], file=100)
    text = (tmp_path / "log").read_text()
    assert text.startswith("x" * 70 + "y" * 30 + "\n[organism: the log's limit of 100 bytes is reached")
    assert text.count("organism") == 1
    assert made.total == 210


def test_a_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Capture(tmp_path / "log", report_bytes=10, file_bytes=10)


def test_reading_by_offset_never_splits_a_character(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes("\u20ac\u20ac".encode()[:5])
    assert read_log(path, 0, finished=False) == ("\u20ac", 3, False)
    assert read_log(path, 3, finished=False) == ("", 3, False)
    assert read_log(path, 3, finished=True) == ("\ufffd", 5, True)
    assert read_log(path, 99, finished=False) == ("", 5, False)
    assert read_log(path, -2, finished=True)[1:] == (5, True)


@given(text=st.text(max_size=50), limit=st.integers(4, 20))
def test_the_pieces_of_a_log_make_the_log(tmp_path_factory: pytest.TempPathFactory, text: str, limit: int) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text(text, encoding="utf-8", newline="")
    seen, offset, eof = "", 0, False
    while not eof:
        piece, offset, eof = read_log(path, offset, finished=True, limit=limit)
        seen += piece
    assert seen == text
