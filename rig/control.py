# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests to a rig's keeper: one line of JSON each way over its socket."""

from __future__ import annotations

import json
from typing import Any

from . import state
from .config import Settings
from .errors import RigError
from .qmp import connect

CONTROL = "control.sock"


def alive(where: Settings) -> bool:
    """Does the rig's keeper answer?"""
    try:
        ask(where, "status")
    except OSError:
        return False
    return True


def ask(where: Settings, verb: str, timeout: float = 60.0, **more: Any) -> state.State:
    """The rig's state after the request. Raises OSError when no keeper listens, `RigError` when it refuses."""
    with connect(where.run / CONTROL, timeout) as connection:
        connection.sendall(json.dumps({"do": verb, **more}).encode() + b"\n")
        with connection.makefile("rb") as reader:
            line = reader.readline()
    if not line:
        raise ConnectionError(f"the keeper of rig {where.name} ended")
    answer = json.loads(line)
    if answer.get("error") and "phase" not in answer:
        raise RigError(f"rig {where.name}: {answer['error']}", f"see {where.run / 'keeper.log'}")
    return state.from_dict(answer)
