# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors of the lab. Kept apart so that the inventory script needs nothing but the standard library."""

from __future__ import annotations


class LabError(Exception):
    """Something failed: ``str()`` names the object, ``hint`` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LabError):
    """The request itself makes no sense (exit code 2)."""
