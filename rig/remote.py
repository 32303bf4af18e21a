# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""SSH into the rig, with nothing of the user's own settings: its key is the cache's, its host key changes at will."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .config import Settings


def options(where: Settings) -> list[str]:
    """OpenSSH options; one connection is shared (a new one takes seconds on an emulated processor)."""
    values = {
        "UserKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "no",
        "IdentityFile": where.key,
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "ConnectTimeout": "120",
        "ServerAliveInterval": "20",
        "ServerAliveCountMax": "6",
        "LogLevel": "ERROR",
        "ControlMaster": "auto",
        "ControlPersist": "60s",
        "ControlPath": where.control_path,
    }
    return ["-F", "/dev/null", *(word for key, value in values.items() for word in ("-o", f"{key}={value}"))]


def command(where: Settings, port: int, words: Sequence[str] | str, *, terminal: bool = False) -> list[str]:
    """The ssh command that runs ``words`` (none: a login shell). A text is for the remote shell, a list is quoted."""
    far = words if isinstance(words, str) else shlex.join(words)
    head = ["ssh", *options(where), *(["-t"] if terminal else []), "-p", str(port), "root@127.0.0.1"]
    return [*head, *(["--", far] if far else [])]
