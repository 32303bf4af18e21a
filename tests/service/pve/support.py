# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections to a simulated node."""

from __future__ import annotations

from pvesim.harness import Sim

from organism.core._pve_client import Pve, connect
from organism.core._pve_local import LocalPve

PASSWORD = "secret"
"""Of root@pam on the simulated node."""


def https(sim: Sim, **login: object) -> Pve:
    """A connection with the node's own authority."""
    return connect(
        {
            "api_host": "127.0.0.1",
            "api_port": sim.port,
            "api_ca": str(sim.ca),
            "timeout": 30,
            "backend": "https",
            **login,
        }
    )


def by_ticket(sim: Sim) -> Pve:
    return https(sim, api_user="root@pam", api_password=PASSWORD)


def by_token(sim: Sim, name: str = "ansible", role: str = "Administrator", path: str = "/") -> Pve:
    """A token with privilege separation, granted a role together with its user."""
    user = f"{name}@pve"
    sim.control("user", name=user, password="x")
    secret = sim.control("token", user=user, token_id="t", acl={path: role})
    return https(sim, api_user=user, api_token_id="t", api_token_secret=secret)


def local(sim: Sim) -> Pve:
    return LocalPve(timeout=30, program=str(sim.bin / "pvesh"))
