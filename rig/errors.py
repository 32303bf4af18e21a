# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong with a rig: each error names the object and carries the next step."""

from __future__ import annotations


class RigError(Exception):
    """Something about the rig failed; ``hint`` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(RigError):
    """The caller asked for something that makes no sense."""


class HangsError(RigError):
    """It was up, and no longer answers or does not find all its devices."""


class Unavailable(RigError):
    """This host cannot run a rig at all (no QEMU, no image builder)."""
