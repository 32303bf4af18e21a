# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel announces: network links (rtnetlink(7)) and devices (kobject uevents), each as one short line.

Both are multicast sockets that anybody may open; an overflow (ENOBUFS) is itself an announcement: something was missed,
so look.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_RTMGRP_LINK = 1
_RTM_NEWLINK, _RTM_DELLINK = 16, 17
_IFLA_IFNAME = 3
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_BUFFER = 1 << 20

# A change of these brings, takes or resets interrupts or queues.
SUBSYSTEMS = frozenset({"net", "queues", "nvme", "nvme-subsystem", "pci", "virtio", "irq", "msi", "cpu", "drivers"})
MISSED = "events were missed"


def link_socket() -> socket.socket:
    """Announces links coming, going, up and down. Raises OSError."""
    return _bound(socket.NETLINK_ROUTE, _RTMGRP_LINK)


def uevent_socket() -> socket.socket:
    """Announces devices as the kernel itself does, without udev. Raises OSError."""
    return _bound(_NETLINK_KOBJECT_UEVENT, _KERNEL_GROUP)


def _bound(protocol: int, groups: int) -> socket.socket:
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    try:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        channel.bind((0, groups))
    except BaseException:
        channel.close()
        raise
    return channel


def drain(channel: socket.socket, links: bool) -> list[str]:
    """Everything that waits, as lines; what does not concern steering is left out. Raises OSError."""
    lines: list[str] = []
    while True:
        try:
            data, sender = channel.recvfrom(_BUFFER)
        except BlockingIOError:
            return lines
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            lines.append(MISSED)
            continue
        if sender[0] == 0:  # from the kernel; anybody may send a netlink datagram to a socket
            lines += link_lines(data) if links else uevent_lines(data)


def link_lines(data: bytes) -> list[str]:
    """``link eno1 up`` (``down``, ``gone``), for each message of a datagram; a broken one ends it."""
    lines = []
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if length < 16 or length > len(data):
            break
        if kind in (_RTM_NEWLINK, _RTM_DELLINK) and length >= 32:
            flags = struct.unpack_from("=I", data, 24)[0]
            name = _attribute(data[32:length], _IFLA_IFNAME)
            running = flags & _IFF_UP and flags & _IFF_RUNNING
            state = "gone" if kind == _RTM_DELLINK else "up" if running else "down"
            lines.append(f"link {name} {state}")
        data = data[(length + 3) & ~3 :]
    return lines


def _attribute(data: bytes, wanted: int) -> str:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        if kind == wanted:
            return data[4:length].rstrip(b"\0").decode(errors="replace")
        data = data[(length + 3) & ~3 :]
    return "?"


def uevent_lines(data: bytes) -> list[str]:
    """``add queues rx-1``, if the subsystem concerns us (lib/kobject_uevent.c: ``ACTION@PATH``, then ``KEY=VALUE``)."""
    fields = dict(part.split("=", 1) for part in data.decode(errors="replace").split("\0")[1:] if "=" in part)
    if fields.get("SUBSYSTEM") not in SUBSYSTEMS:
        return []
    return [f"{fields.get('ACTION', '?')} {fields['SUBSYSTEM']} {os.path.basename(fields.get('DEVPATH', '?'))}"]  # noqa: PTH119 - the kernel's name, no path of this machine
