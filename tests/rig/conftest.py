# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig tier: a real kernel in a virtual machine. Skipped aloud where no QEMU or image builder can be had.

`./run rig-test` runs it; tests marked `whole` boot and reboot, the others start from the snapshot. Those marked `fast`
are a first answer, and part of `./run test` where the machine is built already (`./run rig`): to build it and boot it
for the first time takes, emulated, as long as a third of all other tests.
The tests' rigs have names of their own, so they never meet one that the user has up; image and snapshot are shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig import debian, prepared, qemu
from rig.config import settings
from rig.driver import Rig
from rig.errors import Unavailable
from rig.hardware import Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ORGANISM_RIG_WHOLE"):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("fast") is None:
            item.add_marker(pytest.mark.skip(reason="reboots and whole levels take hours: ./run rig-test runs it"))


def pytest_runtest_setup() -> None:
    if not os.environ.get("ORGANISM_RIG_WHOLE") and not prepared.exists(settings(), Machine()):
        pytest.skip("the virtual machine is not built: ./run rig builds it (minutes), or ./run rig-test")


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
