# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of earlier state: first value kept, restored only where nobody else has changed it since."""

from __future__ import annotations

from pathlib import Path

import pytest

from organism.core._earlier import EarlierState, EarlierStateError, Kept
from organism.core._root import Root

FILE = "var/lib/organism/earlier/memory.json"


def test_the_first_value_is_kept_over_later_runs_and_processes(tmp_path: Path) -> None:
    EarlierState("memory", Root(tmp_path)).remember({"vm.swappiness": Kept("60", "10")})
    again = EarlierState("memory", Root(tmp_path))
    again.remember({"vm.swappiness": Kept("10", "20")})
    assert EarlierState("memory", Root(tmp_path)).kept == {"vm.swappiness": Kept("60", "20")}


def test_taking_back_spares_what_somebody_else_has_set_since(tmp_path: Path) -> None:
    state = EarlierState("memory", Root(tmp_path))
    state.remember({"a": Kept("1", "2"), "b": Kept("1", "2"), "c": Kept(None, "2"), "d": Kept("1", "2")})
    back, others = state.to_restore({"a": "2", "b": "7", "c": "2", "d": "1"})
    assert back == {"a": "1", "c": None}
    assert others == {"b": "7"}


def test_the_record_goes_with_its_last_key(tmp_path: Path) -> None:
    state = EarlierState("memory", Root(tmp_path))
    state.remember({"a": Kept("1", "2"), "b": Kept("1", "2")})
    state.forget(["a"])
    assert set(EarlierState("memory", Root(tmp_path)).kept) == {"b"}
    state.forget()
    assert not (tmp_path / FILE).exists()


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    state = EarlierState("memory", Root(tmp_path))
    state.remember({"a": Kept("1", "2")})
    inode = (tmp_path / FILE).stat().st_ino
    state.remember({"a": Kept("9", "2")})
    assert (tmp_path / FILE).stat().st_ino == inode


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 2, "kept": {}}', '{"format": 1, "kept": {"a": 3}}']
)
def test_a_broken_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(EarlierStateError, match="memory.json"):
        EarlierState("memory", Root(tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_capability_is_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        EarlierState(name, Root(tmp_path))
