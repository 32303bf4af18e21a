# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the service tier: real servers, which end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.support import BusServer

MEMBERS = (
    ("conductor", "a"),
    ("conductor", "b"),
    ("worker", "gpu0"),
    ("worker", "gpu1"),
    ("cache", "host0"),
    ("submitter", "alice"),
    ("submitter", "bob"),
    ("operator", "olga"),
    ("observer", "console"),
)


@pytest.fixture
def bus_servers(tmp_path: Path) -> Iterator[Callable[..., BusServer]]:
    """A factory of nats-servers (not started): ``bus_servers(members=[("worker", "gpu0")], ...)``."""
    made: list[BusServer] = []

    def make(**options: Any) -> BusServer:
        server = BusServer(tmp_path / f"bus{len(made)}", **{"members": MEMBERS, **options})
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def bus(bus_servers: Callable[..., BusServer]) -> BusServer:
    """A running nats-server with the whole topology for gpu0 and gpu1 and a key for each of ``MEMBERS``."""
    return bus_servers().ready()
