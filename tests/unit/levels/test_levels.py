# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which level needs which, and what a marker proves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from organism.core import _levels
from organism.core._levels import Marker

REPO = Path(__file__).resolve().parents[3]


def _playbook_levels() -> set[int]:
    return {
        int(match[1])
        for file in (REPO / "playbooks").iterdir()
        if (match := re.fullmatch(r"level(\d)\.yml", file.name))
    }


def test_the_levels_declared_are_those_that_have_a_playbook_and_site_imports_them_in_order() -> None:
    assert set(_levels.LEVELS) == _playbook_levels()
    imported = re.findall(r"import_playbook: level(\d)\.yml", (REPO / "playbooks" / "site.yml").read_text())
    assert [int(number) for number in imported] == sorted(_levels.LEVELS)


def test_the_version_is_galaxys() -> None:
    galaxy = (REPO / "galaxy.yml").read_text()
    match = re.search(r"^version: (.*)$", galaxy, re.MULTILINE)
    assert match is not None
    assert match[1] == _levels.COLLECTION_VERSION


@pytest.mark.parametrize(
    ("number", "groups", "needed"),
    [
        (0, ["gpu_pool"], None),
        (1, ["pve"], 0),
        (4, ["pve", "bus"], 3),
        (7, ["gpu_pool"], 0),
        (6, ["pve"], 4),
        (7, ["pve", "gpu_pool"], 6),
        (8, ["conductor", "bus"], 7),
        (9, ["conductor"], 8),
        (9, ["observers"], 0),  # on a host to which neither 7 nor 8 applies only the baseline can have gone before
    ],
)
def test_the_predecessor_is_the_nearest_lower_level_that_applies(
    number: int, groups: list[str], needed: int | None
) -> None:
    found = _levels.predecessor(number, groups)
    assert (found.number if found else None) == needed


def test_an_unknown_level_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="level 5 does not exist; levels are 0, 1, 2, 3, 4, 6, 7, 8, 9"):
        _levels.predecessor(5, [])


def test_a_missing_marker_names_the_command_to_run_first() -> None:
    reason = _levels.obstacle(_levels.level(7), None, "0.1.0")
    assert reason is not None
    assert "has not finished" in reason
    assert reason.endswith("ansible-playbook organism.proxmox.site --tags level7")


@pytest.mark.parametrize(("left", "runs", "allowed"), [
    ("0.1.0", "0.1.3", True),
    ("0.1.3", "0.1.0", True),
    ("0.1.0", "0.2.0", False),
    ("0.2.0", "0.1.9", False),
    ("1.1.0", "0.1.0", False),
])  # fmt: skip
def test_a_marker_counts_within_its_minor_version_only(left: str, runs: str, allowed: bool) -> None:
    marker = Marker(0, left, "2026-11-22T02:40:11Z")
    reason = _levels.obstacle(_levels.level(0), marker, runs)
    assert (reason is None) is allowed
    assert allowed or (reason is not None and left in reason and runs in reason)


def test_a_marker_survives_its_file_and_rubbish_is_none() -> None:
    marker = Marker(7, "0.1.0", "2026-11-22T02:40:11Z")
    assert _levels.parse_marker(marker.render()) == marker
    for text in ("", "{", "[]", '{"level": 7}', '{"level": "x", "version": "1", "finished": ""}', "null"):
        assert _levels.parse_marker(text) is None


def test_a_run_that_skips_a_capability_does_not_finish_its_level() -> None:
    assert _levels.unfinished_parts(7, ["worker", "docs"]) == ["worker"]
    assert _levels.unfinished_parts(7, ["conductor"]) == []
