# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recorded machines for every unit test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from organism.core._root import Root
from organism.host import record

# how long an example takes says how busy this machine is, and nothing of what is tested
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[str], Root]:
    """``machine("amd_apu")``: a fresh tree of tests/unit/fixtures/amd_apu.json, free to be changed by the test."""

    def unpacked(shape: str) -> Root:
        top = tmp_path / "machines" / shape
        if not top.exists():
            record.unpack(record.load(FIXTURES / f"{shape}.json"), top)
        return Root(top)

    return unpacked
