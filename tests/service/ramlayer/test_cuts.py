# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The short crash tier: a sync that is killed, or loses power, before system calls spread over all that it makes.

``./run chaos SUITE=ram`` goes over each of them, on more trees and file systems.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.ram.cuts import HOW, KILL, cut, length
from chaos.ram.disks import Disk, Unavailable
from chaos.ram.stepper import run_until

SEED = int(os.environ.get("SEED", "1"))
CUTS_EACH = 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path)
    except Unavailable as error:
        pytest.skip(f"loop mounts are not possible here: {error}")
    yield made
    made.remove()


def test_a_cut_comes_before_the_call_that_is_named(tmp_path: Path) -> None:
    def work() -> None:
        for number in range(5):
            os.close(os.open(tmp_path / str(number), os.O_CREAT | os.O_WRONLY))

    calls = run_until(work)
    assert calls >= 5
    for path in tmp_path.iterdir():
        path.unlink(missing_ok=True) if path.is_file() else path.rmdir()
    seen = set()
    for last in range(1, calls + 1):
        run_until(work, last)
        seen.add(len(list(tmp_path.iterdir())))
        for path in tmp_path.iterdir():
            path.unlink()
    assert seen == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("how", HOW)
def test_a_cut_sync_leaves_a_whole_generation(tmp_path: Path, disk: Disk, how: str) -> None:
    calls = length(tmp_path / "machine", disk, SEED)
    assert calls > 60
    chance = random.Random(f"{SEED} {how}")
    # the last calls are where names change and the switch is made
    points = {
        *chance.sample(range(1, calls + 1), CUTS_EACH // 2),
        *chance.sample(range(calls - 30, calls + 1), CUTS_EACH // 2),
    }
    for call in sorted(points):
        cut(tmp_path / "machine", disk, SEED, call, how)
    assert KILL in HOW
