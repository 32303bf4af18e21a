# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for what talks to Proxmox VE: a simulated node, and a connection to it by each way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from pvesim.harness import Sim
from pvesim.schema import VARIABLE

from organism.core._pve_client import Pve
from service.pve.support import by_ticket, by_token, local

BACKENDS = ("https-token", "https-ticket", "local")


@pytest.fixture(scope="module")
def sim() -> Iterator[Sim]:
    """One node for the tests of a file; each test uses VMIDs of its own."""
    if os.geteuid() != 0:
        pytest.skip("pvesh and qm answer root alone: run as root")
    with Sim() as made:
        yield made


@pytest.fixture
def checked_by_schema() -> None:
    """For tests of what only the API's schema can refuse."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"requests are not checked: set {VARIABLE} to the dump of the API's schema")


@pytest.fixture(scope="module")
def connected(sim: Sim) -> Callable[[str], Pve]:
    """A connection by the name of its backend."""
    made: dict[str, Pve] = {}
    makers = {"https-token": by_token, "https-ticket": by_ticket, "local": local}

    def get(backend: str) -> Pve:
        if backend not in made:
            made[backend] = makers[backend](sim)
        return made[backend]

    return get


@pytest.fixture(params=BACKENDS)
def pve(request: pytest.FixtureRequest, connected: Callable[[str], Pve]) -> Pve:
    """The node by each of the three ways."""
    backend: str = request.param
    return connected(backend)
