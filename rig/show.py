# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Progress for the one who waits: a line with the time of day; machines read other things."""

from __future__ import annotations

import sys
import time


def say(text: str) -> None:
    """One line of progress, on stderr: stdout belongs to the command's own answer."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
