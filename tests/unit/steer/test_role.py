# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role irq_affinity: what a variable gets wrong is found before anything changes."""

from __future__ import annotations

from pathlib import Path

import yaml

TASKS = Path(__file__).parents[3] / "roles/irq_affinity/tasks/present.yml"
MODULE = "organism.proxmox.irq_affinity"


def test_the_wish_is_tried_before_irqbalance_is_stopped() -> None:
    first, *rest = yaml.safe_load(TASKS.read_text(encoding="utf-8"))
    assert first["check_mode"] is True
    (steers,) = [task for task in rest if MODULE in task]
    assert first[MODULE] == steers[MODULE] and "check_mode" not in steers
    assert any("organism.proxmox.host_settings" in task for task in rest[: rest.index(steers)])
