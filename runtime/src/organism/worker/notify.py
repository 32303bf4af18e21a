# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd's notification protocol (sd_notify(3)): ready, watchdog, status. Nothing happens without systemd."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping


class Notifier:
    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # a leading @ stands for the abstract namespace
        self._address = "\0" + address[1:] if address.startswith("@") else address
        wanted = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        self.watchdog = int(environ.get("WATCHDOG_USEC", "0")) / 1_000_000 if wanted else 0.0
        """Seconds without a sign of life after which systemd restarts the service; 0: no watchdog."""

    def send(self, text: str) -> None:
        """Raises OSError when systemd said that it listens and does not."""
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.sendto(text.encode(), self._address)

    async def keep_alive(self) -> None:
        """From the event loop itself, so that a loop that hangs is found out."""
        while self.watchdog:
            self.send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog / 3)
