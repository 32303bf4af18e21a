# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A network of one's own: each part of the pool in a network namespace behind a cable that can be cut.

The suite's own process is the router in the middle. A cut cable loses packets in both directions and tells nobody, as
a dead switch does. All of it ends with the process.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from chaos.jobs.trouble import Unavailable

_NEWNET = 0x40000000
_PLACE = "/run/netns"


class Network:
    """Make one before any thread: it moves this process into a network namespace."""

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_NEWNET) != 0:
            raise Unavailable(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        Path(_PLACE).mkdir(exist_ok=True)
        # in a mount namespace of our own (chaos.ram.alone): names that collide with nobody's
        _run("mount", "-t", "tmpfs", "netns", _PLACE)
        _run("ip", "link", "set", "lo", "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        self._numbers: dict[str, int] = {}

    def join(self, name: str) -> str:
        """A namespace for this part; returns its address."""
        number = self._numbers[name] = len(self._numbers) + 1
        space, cable = f"n{number}", f"v{number}"
        here, there = f"10.77.{number}.1", f"10.77.{number}.2"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "addr", "add", f"{here}/30", "dev", cable)
        _run("ip", "link", "set", cable, "up")
        _run("ip", "-n", space, "addr", "add", f"{there}/30", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", space, "link", "set", device, "up")
        _run("ip", "-n", space, "route", "add", "default", "via", here)
        return there

    def inside(self, name: str) -> list[str]:
        """Words that put a command into the part's namespace: of the network alone, so that nobody keeps a disk."""
        return ["nsenter", f"--net={_PLACE}/n{self._numbers[name]}", "--"]

    def cut(self, name: str) -> None:
        _run("ip", "link", "set", f"v{self._numbers[name]}", "down")

    def heal(self, name: str) -> None:
        _run("ip", "link", "set", f"v{self._numbers[name]}", "up")


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable(f"{words[0]} is not installed") from None
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(words)}: {done.stderr.strip()}")
