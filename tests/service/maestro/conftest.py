# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.maestro.stage import ConductorProcess
from service.support import BusServer


@pytest.fixture
def conductors(bus: BusServer, tmp_path: Path) -> Iterator[Callable[..., ConductorProcess]]:
    """A factory of running conductors: ``conductors("b", MAX_QUEUE=3)``."""
    made: list[ConductorProcess] = []

    def make(name: str = "a", **options: Any) -> ConductorProcess:
        conductor = ConductorProcess(bus, tmp_path / "maestro", name, **options)
        made.append(conductor)
        return conductor.start()

    yield make
    for conductor in made:
        conductor.stop()
