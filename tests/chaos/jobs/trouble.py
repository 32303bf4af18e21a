# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps a run from being made."""

from __future__ import annotations


class Unavailable(Exception):
    """This machine lacks something that the suite needs; the text says what."""


class Stuck(Exception):
    """A part did not do what it must within the hang guard; the text says what to look at."""
