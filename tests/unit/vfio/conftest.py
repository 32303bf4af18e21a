# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts for the tests of passthrough."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from organism.core._root import Root

from .host import Host


@pytest.fixture
def host(machine: Callable[[str], Root]) -> Callable[[str], Host]:
    """``host("pool_host")``: a recorded host with a kernel."""
    return lambda shape: Host(machine(shape), shape)
