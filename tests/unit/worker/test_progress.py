# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What jobs say of their progress: read leniently, trusted never."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.bus import messages
from organism.bus.messages import PROGRESS_TEXT, TaskRef
from organism.client import progress
from organism.worker.progress import parse, read_progress

REF = TaskRef("job", 1)


@pytest.mark.parametrize(
    ("text", "fraction", "shown"),
    [
        ('{"fraction": 0.4, "text": "epoch 4"}', 0.4, "epoch 4"),
        ('{"fraction": 7}', 1.0, ""),
        ('{"text": "loading"}', None, "loading"),
        ("40% epoch 4\n", 0.4, "epoch 4"),
        ("0.4", 0.4, ""),
        ("loading the weights", None, "loading the weights"),
        ("three\x1b[2J  lines\nof text", None, "three\x1b[2J lines of text"),
    ],
)
def test_what_is_understood(text: str, fraction: float | None, shown: str) -> None:
    told = parse(text, REF)
    assert told is not None
    assert (told.fraction, told.text) == (fraction, shown)


@pytest.mark.parametrize("text", ["", " \n", '{"fraction": ', '{"fraction": "x"}', "{}", '{"fraction": true}'])
def test_what_says_nothing(text: str) -> None:
    assert parse(text, REF) is None


@given(st.text())
def test_anything_fits_into_a_heartbeat(text: str) -> None:
    told = parse(text, REF)
    if told is not None:
        assert len(told.text) <= PROGRESS_TEXT
        assert told.fraction is None or 0 <= told.fraction <= 1
        messages.decode(messages.encode(told), messages.Progress)


def test_a_file_that_is_none_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    for name in ("link", "fifo", "dir", "absent"):
        assert read_progress(tmp_path / name, REF) is None
    (tmp_path / "big").write_bytes(b"x" * 1_000_000)
    told = read_progress(tmp_path / "big", REF)
    assert told is not None and len(told.text) == PROGRESS_TEXT


def test_the_jobs_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORGANISM_PROGRESS", raising=False)
    assert not progress(0.5)
    monkeypatch.setenv("ORGANISM_PROGRESS", str(tmp_path / "progress"))
    assert progress(0.5, "half" * 100)
    told = read_progress(tmp_path / "progress", REF)
    assert told is not None and told.fraction == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["progress"]
    with pytest.raises(ValueError, match="from 0 to 1"):
        progress(40)
    monkeypatch.setenv("ORGANISM_PROGRESS", str(tmp_path / "absent/progress"))
    assert not progress(0.5)
