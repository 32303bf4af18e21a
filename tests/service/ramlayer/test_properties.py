# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever programs do to a mounted layer, a restore shows what was there at the last committed sync."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from organism.core import _ramlayer as ramlayer
from service.ramlayer.trees import (
    OPERATIONS,
    ROOT,
    Operation,
    crash_and_restore,
    differences,
    make_layer,
    unmount_all,
    view,
)

# few names, so that operations meet; some are in base, some below directories of base
NAMES = (
    "x",
    "a",
    "a/x",
    "a/y",
    "a/new",
    "b",
    "b/c",
    "b/c/x",
    "b/c/n",
    "b/z",
    "d",
    "d/x",
    "d/y",
    "n",
    "n/x",
    "n/m/x",
    "m",
)
EXAMPLES = int(os.environ.get("RAM_EXAMPLES", "40"))

Step = tuple[Operation, str, str, int]
step = st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(0, 9999))
# between the syncs a few operations, then perhaps a restart that keeps what was synced
rounds = st.lists(st.tuples(st.lists(step, min_size=1, max_size=8), st.booleans()), min_size=1, max_size=6)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """What stands for the disk: in RAM, so that no other program's writes are waited for. test_cuts has a real one."""
    made = tmp_path / "disk"
    made.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "disk", str(made)], check=True)
    yield made
    unmount_all(made)
    subprocess.run(["umount", str(made)], check=True)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(rounds, st.lists(step, max_size=4))
def test_a_restore_shows_the_last_sync(disk: Path, course: list[tuple[list[Step], bool]], lost: list[Step]) -> None:
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        top = Path(folder)
        layer = make_layer(top, keep=2)
        try:
            ramlayer.mount(layer, ROOT)
            for steps, restart in course:
                for operation, name, other, seed in steps:
                    operation(layer.merged, name, other, seed)
                ramlayer.sync(layer, ROOT)
                synced = view(layer)
                assert not ramlayer.sync(layer, ROOT).new, "a sync of what has not changed made a generation"
                if restart:
                    crash_and_restore(layer, top)
                    assert view(layer) == synced, differences(view(layer), synced)
            number = layer.store.current_number()
            assert number is not None
            assert layer.store.damage(number, deep=True) == ""
            for operation, name, other, seed in lost:
                operation(layer.merged, name, other, seed)
            told = crash_and_restore(layer, top)
            assert f"generation {number} restored" in told and "damaged" not in told
            assert view(layer) == synced, differences(view(layer), synced)
        finally:
            unmount_all(top)
