# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest in 512 bytes: it starts all processors, and each of them spins. Assembled here, byte by byte.

The boot processor writes a two-byte loop to address 0x8000, opens the whole 4 GiB to its data segment (protected mode
and back, "unreal mode"), and broadcasts INIT and STARTUP through the local APIC's interrupt command register. STARTUP
with vector 8 makes the other processors begin at 0x8000 in real mode (Intel SDM volume 3, 10.4.4 and 11.6.1).
"""

from __future__ import annotations

import struct
from pathlib import Path

ORIGIN = 0x7C00  # where the firmware loads a boot sector
LOOP = 0x8000  # where the other processors begin: 4 KiB times the vector
ICR = 0xFEE00300  # the local APIC's interrupt command register, low half
INIT_OTHERS = 0x000C4500  # all but self, level assert, INIT
STARTUP_OTHERS = 0x000C4600 | LOOP >> 12  # all but self, level assert, STARTUP, vector


def send(command: int) -> bytes:
    """mov dword [ICR], command - with 32-bit operand (66) and address (67), since this is 16-bit code."""
    return b"\x66\x67\xc7\x05" + struct.pack("<II", ICR, command)


def pause(rounds: int) -> bytes:
    """mov ecx, rounds; here: loop here (67: counts in ecx). The SDM wants 10 ms after INIT, 200 us after STARTUP."""
    return b"\x66\xb9" + struct.pack("<I", rounds) + b"\x67\xe2\xfd"


def code(gdtr: int) -> bytes:
    """The program; ``gdtr``: address of the table's descriptor."""
    return b"".join(
        (
            b"\xfa",  # cli
            b"\x31\xc0",  # xor ax, ax
            b"\x8e\xd8",  # mov ds, ax
            b"\xc7\x06" + struct.pack("<HH", LOOP, 0xFEEB),  # mov word [LOOP], "jmp to itself" (eb fe)
            b"\x0f\x01\x16" + struct.pack("<H", gdtr),  # lgdt [gdtr]
            b"\x0f\x20\xc0",  # mov eax, cr0
            b"\x0c\x01",  # or al, 1: protection on
            b"\x0f\x22\xc0",  # mov cr0, eax
            b"\xeb\x00",  # jmp to the next instruction
            b"\xbb\x08\x00",  # mov bx, 8: the data segment of the table
            b"\x8e\xdb",  # mov ds, bx: its limit of 4 GiB stays when protection is off again
            b"\x24\xfe",  # and al, 0xfe
            b"\x0f\x22\xc0",  # mov cr0, eax
            b"\xeb\x00",  # jmp to the next instruction
            send(INIT_OTHERS),
            pause(3_000_000),
            send(STARTUP_OTHERS),
            pause(300_000),
            send(STARTUP_OTHERS),
            b"\xeb\xfe",  # jmp to itself: the boot processor spins, too
        )
    )


def sector() -> bytes:
    """The whole sector: program, table of segments (empty, flat data), its descriptor, signature."""
    length = len(code(0))
    table = bytes(8) + struct.pack("<HHBBBB", 0xFFFF, 0, 0, 0x92, 0xCF, 0)
    descriptor = struct.pack("<HI", len(table) - 1, ORIGIN + length)
    text = code(ORIGIN + length + len(table)) + table + descriptor
    return text.ljust(510, b"\0") + b"\x55\xaa"


def write_disk(path: Path) -> Path:
    """A disk of 1 MiB that boots the sector."""
    path.write_bytes(sector().ljust(1 << 20, b"\0"))
    return path
