# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Job ids that sort by the time of their making."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32 in lower case: sorts like the numbers, has no letters that are mistaken for digits."""


def _encode(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def new_task_id() -> str:
    """``job-``, milliseconds since 1970 in 10 characters, 60 random bits in 12."""
    return f"job-{_encode(time.time_ns() // 1_000_000, 10)}{_encode(secrets.randbits(60), 12)}"
