# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a worker wants of its GPU, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence
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


NUMBERED = ("HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Variables that count what ROCR_VISIBLE_DEVICES has left."""
NONE = ("", "-1")


def together(bindings: Sequence[Binding]) -> Binding:
    """Of a job that has several devices of one kind, in this order.

    What counts devices counts all of them; what names them names all. Where no device is to be seen it stays so.
    """
    env = dict(bindings[0].env)
    for name in [name for name in env if name.endswith("_VISIBLE_DEVICES") or name in NUMBERED]:
        values = [binding.env.get(name, "") for binding in bindings]
        if any(value in NONE for value in values):
            env[name] = next(value for value in values if value in NONE)
        elif name in NUMBERED or len(set(values)) < len(values):  # each is number 0 where it is alone
            env[name] = ",".join(str(number) for number in range(len(bindings)))
        else:
            env[name] = ",".join(values)
    return Binding(env, tuple(dict.fromkeys(node for binding in bindings for node in binding.nodes)))


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
