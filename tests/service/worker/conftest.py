# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Worker processes that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.support import BusServer
from service.worker.double import WorkerProcess


@pytest.fixture
def workers(tmp_path: Path, bus: BusServer) -> Iterator[Callable[..., WorkerProcess]]:
    """A factory of started workers: ``workers(gpu="gpu0", STOP_GRACE_SEC=1)``."""
    made: list[WorkerProcess] = []

    def make(gpu: str = "gpu0", **settings: Any) -> WorkerProcess:
        made.append(WorkerProcess(tmp_path / f"worker-{gpu}", bus, gpu, **settings).start())
        return made[-1]

    yield make
    for worker in made:
        worker.kill()
