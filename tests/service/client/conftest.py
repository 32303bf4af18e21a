# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of the users that the test's bus knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from organism.core._client_settings import ClientSettings
from service.support import BusServer

SettingsOf = Callable[..., ClientSettings]


def settings_for(bus: BusServer, user: str = "alice", kind: str = "submitter", **other: Any) -> ClientSettings:
    """As client.toml would have them."""
    key = str(bus.credentials(kind, user)) if "nkey_file" not in other else other.pop("nkey_file")
    return ClientSettings(
        servers=(bus.url,), user=user, kind=kind, nkey_file=key, ca_file=bus.ca_file, source="the test", **other
    )


@pytest.fixture
def settings_of(bus: BusServer) -> SettingsOf:
    def make(user: str = "alice", kind: str = "submitter", **other: Any) -> ClientSettings:
        return settings_for(bus, user, kind, **other)

    return make
