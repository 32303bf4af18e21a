# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The alert rules as Prometheus reads them (promtool), each tested on made-up series, on metrics that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from organism.core import _ramlayer_metrics as metrics

REPO = Path(__file__).resolve().parents[2]
RULES = sorted((REPO / "docs/alerts").glob("*.rules.yml"))
TESTS = REPO / "tests/gates/alerts"


def promtool(*arguments: str | Path) -> str:
    """What it says against them; nothing when they are fine."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, cwd=TESTS
    )
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("rules", RULES, ids=lambda path: path.name)
def test_rules_are_valid_and_ring_when_they_should(rules: Path) -> None:
    assert not promtool("check", "rules", rules)
    assert not promtool("test", "rules", TESTS / rules.name.replace(".rules.", ".test."))


def test_a_rule_that_does_not_ring_is_noticed(tmp_path: Path) -> None:
    for file in (REPO / "docs/alerts/ramlayer.rules.yml", TESTS / "ramlayer.test.yml"):
        text = file.read_text(encoding="utf-8").replace("../../../docs/alerts/", "").replace("> 0.9", "> 0.99")
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    assert "RamLayerNearlyFull" in promtool("test", "rules", tmp_path / "ramlayer.test.yml")


def test_the_alerts_of_ram_layers_are_about_metrics_that_exist() -> None:
    text = (REPO / "docs/alerts/ramlayer.rules.yml").read_text(encoding="utf-8")
    written = metrics.render("x", {name: 1 for name, _kind, _about in metrics.FAMILIES})
    known = set(re.findall(r"^(\w+)\{", written, re.MULTILINE))
    assert set(re.findall(rf"{metrics.PREFIX}_\w+", text)) <= known
