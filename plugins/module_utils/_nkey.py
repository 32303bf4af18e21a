# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Public nkeys as text: are they whole? (Making and signing is the work of the `nkeys` library, in the runtime.)

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import base64


def is_public(text: str) -> bool:
    """Is it a user's public nkey: prefix, base32, 32 bytes, and its checksum (CRC-16/XMODEM)?"""
    if len(text) != 56 or not text.startswith("U"):
        return False
    try:
        raw = base64.b32decode(text)
    except ValueError:
        return False
    return int.from_bytes(raw[-2:], "little") == _crc16(raw[:-2])


def _crc16(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte << 8
        for _bit in range(8):
            value = ((value << 1) ^ 0x1021 if value & 0x8000 else value << 1) & 0xFFFF
    return value
