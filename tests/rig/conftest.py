# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig tier: a real kernel in a virtual machine. Skipped aloud where no QEMU or image builder can be had.

`./run rig-test` runs it; tests marked `whole` boot and reboot, the others start from the snapshot. `./run test` runs
those marked `fast` and leaves the others out, aloud: emulated, all of them take hours.
The tests' rigs have names of their own, so they never meet one that the user has up; image and snapshot are shared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig import debian, qemu
from rig.config import REPO, settings
from rig.driver import Rig
from rig.errors import RigError, Unavailable
from rig.hardware import Machine

WHOLE = bool(os.environ.get("ORGANISM_RIG_WHOLE"))
PATIENCE = (
    1500  # seconds for image, ZFS and snapshot from nothing: about six minutes of a machine with nothing else to do
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and not (WHOLE or item.get_closest_marker("fast")):
            item.add_marker(pytest.mark.skip(reason="emulated, the whole tier takes hours: ./run rig-test runs it"))


@pytest.fixture(scope="session")
def able() -> None:
    try:
        debian.require_tools()
        qemu.find(settings())
    except Unavailable as error:
        pytest.skip(f"{error}; {error.hint}")


@pytest.fixture(scope="session")
def rig(able: None) -> Iterator[Rig]:
    """A rig from the snapshot. Tests leave it as they found it, or restore it."""
    if WHOLE:
        with Rig("test") as started:
            yield started
        return
    try:
        yield _started_or_skipped(Rig("test"))
    finally:
        Rig("test").down()


def _started_or_skipped(rig: Rig) -> Rig:
    """A machine that cannot be made or started here says nothing about the product, so its tests are skipped aloud."""
    command = [sys.executable, "-B", "-m", "rig", "--name", rig.where.name, "up"]
    try:
        done = subprocess.run(
            command, cwd=REPO, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"no virtual machine within {PATIENCE} s; ./run rig shows where it stands")
    if done.returncode != 0:
        pytest.skip(f"no virtual machine: {' / '.join(done.stderr.strip().splitlines()[-2:])}")
    try:
        rig.start()
    except RigError as error:
        pytest.skip(f"no virtual machine: {error}")
    return rig


@pytest.fixture(scope="module")
def cold_rig(able: None) -> Iterator[Rig]:
    """A rig that was booted by its boot loader, with the thirteenth GPU beside a network card."""
    with Rig("cold", Machine(cold=True, shared_group=True)) as started:
        yield started
