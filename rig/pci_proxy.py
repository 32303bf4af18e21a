# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Serves emulated PCI functions of any vendor to QEMU's x-pci-proxy-dev: identity and capabilities, no function.

QEMU 7.2 forwards accesses over a socket (hw/remote/mpqemu-link.h there): a header (command, padding, size), a body.
Limits: 32-bit base addresses, 256 bytes of configuration space, no interrupts; memory reads as zero.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading

from .hardware import Function

SYNC, RETURN, CONFIG_WRITE, CONFIG_READ, BAR_WRITE, BAR_READ, SET_IRQFD, RESET = range(8)
HEADER = struct.Struct("<iiQ")
ACCESS = struct.Struct("<IIi")
SPACE = 256
POWER, EXPRESS, MSI = 0x50, 0x60, 0xA0
"""Where the capabilities lie, in the order of their chain."""


class Space:
    """A function's configuration space (PCI Local Bus 3.0, chapter 6; PCI Express Base 3.0, 7.8)."""

    def __init__(self, function: Function) -> None:
        config, mask = bytearray(SPACE), bytearray(SPACE)
        struct.pack_into("<HH", config, 0x00, function.vendor, function.device)
        struct.pack_into("<H", mask, 0x04, 0x0547)  # command: the enable bits
        struct.pack_into("<H", config, 0x06, 0x0010)  # status: there is a list of capabilities
        config[0x08] = function.revision
        config[0x09:0x0C] = function.class_code.to_bytes(3, "little")
        mask[0x0C] = 0xFF
        config[0x0E] = 0x80 if function.multifunction else 0
        for number, size in function.bars:
            struct.pack_into("<I", mask, 0x10 + 4 * number, ~(size - 1) & 0xFFFFFFFF)
        for number, size in function.io_bars:
            struct.pack_into("<I", mask, 0x10 + 4 * number, ~(size - 1) & 0xFFFFFFFF)
            config[0x10 + 4 * number] = 1
        struct.pack_into(
            "<HH", config, 0x2C, function.subvendor or function.vendor, function.subdevice or function.device
        )
        config[0x34], config[0x3D], mask[0x3C] = POWER, 1, 0xFF
        struct.pack_into("<BBHHH", config, POWER, 0x01, EXPRESS, 0x0003, 0x0008, 0)
        struct.pack_into("<H", mask, POWER + 4, 0x8103)
        # legacy endpoint; link of 8 GT/s (gen 3) and sixteen lanes, as it is and as it could be
        struct.pack_into("<BBHIHHIHH", config, EXPRESS, 0x10, MSI, 0x0012, 0x00000FA1, 0x2810, 0, 0x00400D03, 0, 0x1103)
        struct.pack_into("<H", mask, EXPRESS + 8, 0x7FFF)
        struct.pack_into("<H", mask, EXPRESS + 0x10, 0x01FF)
        struct.pack_into("<BBH", config, MSI, 0x05, 0x00, 0x0080)
        struct.pack_into("<HIIH", mask, MSI + 2, 0x0001, 0xFFFFFFFC, 0xFFFFFFFF, 0xFFFF)
        self._config, self._mask, self._initial = config, mask, bytes(config)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._config[offset : offset + size].ljust(size, b"\xff"), "little")

    def write(self, offset: int, value: int, size: int) -> None:
        for index in range(offset, min(offset + size, SPACE)):
            bits = value >> 8 * (index - offset) & 0xFF
            self._config[index] = self._config[index] & ~self._mask[index] & 0xFF | bits & self._mask[index]

    def reset(self) -> None:
        self._config[:] = self._initial


class _Closed(Exception):
    """QEMU ended."""


def _receive(connection: socket.socket, size: int) -> bytes:
    """``size`` bytes; descriptors that come along (the guest's memory, interrupts) are of no use here and closed."""
    data = b""
    while len(data) < size:
        part, extra, _, _ = connection.recvmsg(size - len(data), socket.CMSG_SPACE(8 * 4))
        for _level, _kind, content in extra:
            descriptors = array.array("i")
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
            for descriptor in descriptors:
                os.close(descriptor)
        if not part:
            raise _Closed
        data += part
    return data


def _answer(space: Space, command: int, body: bytes) -> int:
    if command == CONFIG_READ:
        offset, _, size = ACCESS.unpack(body[: ACCESS.size])
        return space.read(offset, size)
    if command == CONFIG_WRITE:
        offset, value, size = ACCESS.unpack(body[: ACCESS.size])
        space.write(offset, value, size)
    elif command == RESET:
        space.reset()
    return 0


def serve(connection: socket.socket, function: Function) -> None:
    """Answer QEMU on ``connection`` until it closes."""
    space = Space(function)
    with connection:
        try:
            while True:
                command, _, size = HEADER.unpack(_receive(connection, HEADER.size))
                body = _receive(connection, size) if size else b""
                if command in (SYNC, SET_IRQFD):
                    continue
                answer = _answer(space, command, body)
                connection.sendall(HEADER.pack(RETURN, 0, 8) + struct.pack("<Q", answer))
        except (_Closed, ConnectionError):
            return


def start(function: Function) -> socket.socket:
    """Serve ``function`` in a thread; gives QEMU's end of the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    threading.Thread(target=serve, args=(ours, function), name=function.id, daemon=True).start()
    return theirs
