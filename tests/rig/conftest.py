# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig tier: a real kernel in a virtual machine. Skipped aloud where no QEMU or image builder can be had.

`./run rig-test` runs it; tests marked `whole` boot and reboot, the others start from the snapshot. Those marked `fast`
are a first answer, and part of `./run test`: some minutes once the machine is built, which takes some more. It leaves
them out, aloud, when it has run for long already, so that a slow machine's clock is not spent on them.
The tests' rigs have names of their own, so they never meet one that the user has up; image and snapshot are shared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig import debian, qemu
from rig.config import settings
from rig.driver import Rig
from rig.errors import Unavailable
from rig.hardware import Machine

START_UNTIL = 35 * 60.0  # s after the start of `./run test`: on time for a clock of an hour


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ORGANISM_RIG_WHOLE"):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("fast") is None:
            item.add_marker(pytest.mark.skip(reason="reboots and whole levels take hours: ./run rig-test runs it"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    spent = time.monotonic() - item.config.pluginmanager.get_plugin("organism-account").started
    if spent > START_UNTIL and not os.environ.get("ORGANISM_RIG_WHOLE"):
        pytest.skip(f"this run has taken {spent / 60:.0f} min already: ./run rig-test -m fast runs it by itself")


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
    with Rig("test") as started:
        yield started


@pytest.fixture(scope="module")
def cold_rig(able: None) -> Iterator[Rig]:
    """A rig that was booted by its boot loader, with the thirteenth GPU beside a network card."""
    with Rig("cold", Machine(cold=True, shared_group=True)) as started:
        yield started
