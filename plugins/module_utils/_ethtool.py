# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The few things of a network driver that steering needs, asked of the kernel itself (SIOCETHTOOL).

Structures and numbers: include/uapi/linux/ethtool.h. Interfaces are those of the caller's network
namespace.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

_SIOCETHTOOL = 0x8946
_GCOALESCE, _SCOALESCE = 0x0E, 0x0F
_GCHANNELS, _SCHANNELS = 0x3C, 0x3D
_GFLAGS, _SFLAGS = 0x25, 0x26
_LRO_FLAG = 1 << 15

# position in struct ethtool_coalesce, counted in u32 from cmd
COALESCE: Mapping[str, int] = {
    "rx_usecs": 1,
    "rx_frames": 2,
    "tx_usecs": 5,
    "tx_frames": 6,
    "adaptive_rx": 10,
    "adaptive_tx": 11,
}
_COALESCE_WORDS = 23
OFFLOADS: Mapping[str, tuple[int, int]] = {
    "gro": (0x2B, 0x2C),
    "gso": (0x23, 0x24),
    "tso": (0x1E, 0x1F),
    "lro": (_GFLAGS, _SFLAGS),
}


@dataclass(frozen=True)
class Channels:
    """Numbers of channels now, and the driver's maxima."""

    max_rx: int
    max_tx: int
    max_combined: int
    rx: int
    tx: int
    combined: int


class Ethtool:
    """Answers None where the driver has no such thing (EOPNOTSUPP); every other error is an OSError."""

    def channels(self, name: str) -> Channels | None:
        words = self._ask(name, [_GCHANNELS, *[0] * 8])
        return None if words is None else Channels(words[1], words[2], words[4], words[5], words[6], words[8])

    def set_channels(self, name: str, *, rx: int, tx: int, combined: int) -> None:
        words = self._ask(name, [_GCHANNELS, *[0] * 8])
        if words is None:
            raise OSError(errno.EOPNOTSUPP, "the driver has no channels to set")
        self._call(name, [_SCHANNELS, *words[1:5], rx, tx, words[7], combined])

    def coalesce(self, name: str) -> dict[str, int] | None:
        """Values by the names of COALESCE; microseconds, frames, and 0 or 1 for the adaptive ones."""
        words = self._ask(name, [_GCOALESCE, *[0] * (_COALESCE_WORDS - 1)])
        return None if words is None else {key: words[place] for key, place in COALESCE.items()}

    def set_coalesce(self, name: str, values: Mapping[str, int]) -> None:
        words = self._ask(name, [_GCOALESCE, *[0] * (_COALESCE_WORDS - 1)])
        if words is None:
            raise OSError(errno.EOPNOTSUPP, "the driver does not coalesce interrupts")
        for key, value in values.items():
            words[COALESCE[key]] = value
        self._call(name, [_SCOALESCE, *words[1:]])

    def offload(self, name: str, which: str) -> bool | None:
        words = self._ask(name, [OFFLOADS[which][0], 0])
        if words is None:
            return None
        return bool(words[1] & _LRO_FLAG) if which == "lro" else bool(words[1])

    def set_offload(self, name: str, which: str, on: bool) -> None:
        value = int(on)
        if which == "lro":
            flags = self._call(name, [_GFLAGS, 0])[1]
            value = flags | _LRO_FLAG if on else flags & ~_LRO_FLAG
        self._call(name, [OFFLOADS[which][1], value])

    def _ask(self, name: str, words: list[int]) -> list[int] | None:
        try:
            return self._call(name, words)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            raise

    def _call(self, name: str, words: list[int]) -> list[int]:
        memory = array.array("I", words)
        request = struct.pack("16sP16x", name.encode(), memory.buffer_info()[0])  # struct ifreq
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            fcntl.ioctl(channel, _SIOCETHTOOL, request)
        return memory.tolist()
