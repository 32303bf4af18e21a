# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a worker wants of its GPU, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from organism.bus.messages import Device
from organism.core._gpu_metrics import Readings


@dataclass(frozen=True)
class Binding:
    """What makes a job use this device and no other."""

    env: dict[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    """Device nodes it needs."""


class DeviceError(RuntimeError):
    """The device of this worker is not there or cannot be used; the text says what to do."""


class Backend(Protocol):
    device: Device

    def readings(self) -> Readings:
        """The sensors now; what they do not tell is None. Raises DeviceError when the device is lost."""

    def binding(self, *, confined: bool) -> Binding:
        """``confined``: the job sees no other GPU's device nodes, so its own is the first that it counts."""

    def busy(self, on: bool) -> None:
        """A job starts or has ended (only a simulated device wants to know)."""
