# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A tap device with several queues that needs no root and leaves nothing.

A child makes it in user and network name spaces of its own and hands over its queues. The device lives in that name
space, out of the host's sight, and ends with the last descriptor of it. Frames that the guest sends end there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from .errors import RigError

# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NAME = b"port0"


def _make(queues: int) -> list[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    # root needs no user name space, and some hosts forbid it to others
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    found = []
    for _ in range(queues):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", NAME, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE))
        found.append(fd)
    return found


def queues(count: int) -> list[int]:
    """Descriptors of ``count`` queues of one new tap device. Raises `RigError` when the kernel refuses."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ours.close()
            socket.send_fds(theirs, [b"ok"], _make(count))
            code = 0
        except OSError as error:
            theirs.send(str(error).encode())
        finally:
            os._exit(code)
    theirs.close()
    with ours:
        message, found, _, _ = socket.recv_fds(ours, 1024, count)
    os.waitpid(child, 0)
    if message != b"ok" or len(found) != count:
        raise RigError(
            f"no tap device with {count} queues: {message.decode() or 'its maker died'}",
            "it needs /dev/net/tun, and user name spaces unless you are root (sysctl kernel.unprivileged_userns_clone)",
        )
    return found
