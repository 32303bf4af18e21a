# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Molecule's scenarios are read by molecule itself: settings, inventory, and each playbook that a sequence names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
SCENARIOS = sorted(path.parent.name for path in (REPO / "molecule").glob("*/molecule.yml"))
OF_CONVERGE = {"check", "idempotence"}


def test_there_are_scenarios() -> None:
    assert SCENARIOS == ["default", "rig"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_is_whole(gate: Any, scenario: str) -> None:
    folder = REPO / "molecule" / scenario
    steps = yaml.safe_load((folder / "molecule.yml").read_text())["scenario"]["test_sequence"]
    books = {folder / f"{step}.yml" for step in steps if step not in OF_CONVERGE}
    assert books == {path for path in folder.glob("*.yml") if path.name != "molecule.yml"}
    said = gate.run("molecule", "syntax", "--scenario-name", scenario)
    assert "successful=1" in said and "playbook:" in said
    inventory = REPO / "inventories" / {"default": "lab", "rig": "rig"}[scenario]
    gate.run("ansible-playbook", "--syntax-check", "--inventory", inventory, *sorted(books))
