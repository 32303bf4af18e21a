# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Locks as Proxmox VE takes them: flock on a file, given up after a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Died


@contextmanager
def locked(path: Path, shown: str, timeout: float, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock. ``shown``: the file's name in the message. Raises Died when it was not to be had in time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + timeout
        waited = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited and say is not None:
                    say("trying to acquire lock...")
                waited = True
                if time.monotonic() >= deadline:
                    raise Died(f"can't lock file '{shown}' - got timeout") from None
                time.sleep(0.02)  # a lock with a time-out has no event
        if waited and say is not None:
            say(" OK")
        yield
    finally:
        os.close(descriptor)
