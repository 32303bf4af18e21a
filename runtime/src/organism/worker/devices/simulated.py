# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A GPU that is not there and says so; load and heat follow its jobs, so that a pool can be tried without hardware."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from organism.bus.messages import Device
from organism.core._gpu_metrics import Readings
from organism.worker.devices.base import Binding

AMBIENT_C = 31.0
FULL_LOAD_C = 71.0
TAU_SECONDS = 20.0
"""Time in which 63 % of a change of temperature has happened (first-order, Newton's law of cooling)."""
IDLE_W, FULL_W = 12.0, 150.0
VRAM_MB = 8192
IDLE_VRAM_MB, BUSY_VRAM_MB = 64, 2048
MODEL = "Simulated GPU (no hardware)"


class SimulatedGpu:
    """Deterministic for a given clock (seconds, monotonic)."""

    def __init__(self, address: str, *, vram_mb: int = VRAM_MB, clock: Callable[[], float] = time.monotonic) -> None:
        self.device = Device(backend="simulated", address=address, model=MODEL, vram_mb=vram_mb)
        self._clock = clock
        self._on = False
        self._temp = AMBIENT_C
        self._at = clock()

    def _advance(self) -> None:
        now = self._clock()
        target = FULL_LOAD_C if self._on else AMBIENT_C
        self._temp = target + (self._temp - target) * math.exp(-max(0.0, now - self._at) / TAU_SECONDS)
        self._at = now

    def busy(self, on: bool) -> None:
        self._advance()
        self._on = on

    def readings(self) -> Readings:
        self._advance()
        heat = (self._temp - AMBIENT_C) / (FULL_LOAD_C - AMBIENT_C)
        return Readings(
            gpu_busy_percent=97.0 if self._on else 0.0,
            mem_busy_percent=60.0 if self._on else 0.0,
            temp_c=round(self._temp, 1),
            fan_rpm=round(900 + 1600 * heat),
            power_w=round(FULL_W if self._on else IDLE_W, 1),
            vram_total_mb=self.device.vram_mb,
            vram_used_mb=min(self.device.vram_mb, BUSY_VRAM_MB if self._on else IDLE_VRAM_MB),
        )

    def binding(self, *, confined: bool) -> Binding:  # noqa: ARG002 - the backends' interface
        """No device nodes, and every runtime is told that there is no GPU: a job must not find a real one by chance."""
        return Binding(
            env={
                "ORGANISM_GPU_SIMULATED": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "HIP_VISIBLE_DEVICES": "-1",
                "ROCR_VISIBLE_DEVICES": "-1",
                "GPU_DEVICE_ORDINAL": "-1",
            }
        )
