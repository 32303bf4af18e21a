# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper of the wake-up latency and this machine's own kernel: the request counts while the keeper lives."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEVICE = Path("/dev/cpu_dma_latency")
HARMLESS = 1_000_000_000
"""Microseconds: lower than the kernel's "no request" (2 billion), and longer than any idle state takes to leave."""


def counts() -> int:
    """The lowest of all requests, as the kernel tells whoever opens the device."""
    with DEVICE.open("rb", buffering=0) as stream:
        return int(struct.unpack("=i", stream.read(4))[0])


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_kernel_counts_the_request_for_as_long_as_the_keeper_lives(ending: signal.Signals) -> None:
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{DEVICE} cannot be opened here (no root, or a container)")
    before = counts()
    if before <= HARMLESS:
        pytest.skip(f"something on this machine already holds {DEVICE} at {before}")
    keeper = subprocess.Popen(
        [sys.executable, "-m", "organism.host.dma_latency", "--latency-us", str(HARMLESS)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 60
        while counts() != HARMLESS and keeper.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # the device tells nobody when a request comes
        assert counts() == HARMLESS
        keeper.send_signal(ending)
        assert keeper.wait(60) == (0 if ending == signal.SIGTERM else -ending)
        assert counts() == before
    finally:
        keeper.kill()
        keeper.wait()
