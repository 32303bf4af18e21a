# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA cards and MIG instances through NVML (package ``nvidia-ml-py``, the distribution's extra ``nvidia``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from organism.bus.messages import Device
from organism.core._gpu_metrics import MIB, Readings
from organism.worker.devices.base import Binding, DeviceError

CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


def load_nvml() -> ModuleType:
    """NVML, initialised. Raises DeviceError that says what to install."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise DeviceError(
            "nvidia-ml-py is not installed: set gpu_worker_nvidia, or install organism[nvidia]"
        ) from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML does not start: {error} (is the NVIDIA driver installed and loaded?)") from error
    return nvml


class NvmlGpu:
    """Found by UUID, or by PCI address for a whole card. A MIG instance shares its parent's sensors."""

    def __init__(self, nvml: Any, *, address: str, uuid: str | None, model: str, vram_mb: int) -> None:
        self._nvml = nvml
        try:
            self._handle = self._find(address, uuid)
            self._mig = bool(uuid and uuid.startswith("MIG-"))
            self._parent = (
                nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle) if self._mig else self._handle
            )
            found_uuid = _text(nvml.nvmlDeviceGetUUID(self._handle))
            memory = nvml.nvmlDeviceGetMemoryInfo(self._handle)
            minor = nvml.nvmlDeviceGetMinorNumber(self._parent)
            name = _text(nvml.nvmlDeviceGetName(self._parent))
        except nvml.NVMLError as error:
            raise DeviceError(f"NVIDIA device {uuid or address} cannot be opened: {error}") from error
        self.device = Device(
            backend="nvml",
            address=address,
            uuid=found_uuid,
            model=model or name,
            vram_mb=vram_mb or int(memory.total) // MIB,
        )
        self._minor = minor

    def _find(self, address: str, uuid: str | None) -> Any:
        if uuid:
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return self._nvml.nvmlDeviceGetHandleByPciBusId(address)

    def busy(self, on: bool) -> None:
        """A real card shows it by itself."""

    def readings(self) -> Readings:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, self._handle)
        # NVML has no utilisation of a MIG instance (NVML API, "MIG"); the parent's belongs to its neighbours as well
        rates = None if self._mig else self._ask(nvml.nvmlDeviceGetUtilizationRates, self._handle)
        watts = self._ask(nvml.nvmlDeviceGetPowerUsage, self._parent)
        return Readings(
            gpu_busy_percent=None if rates is None else float(rates.gpu),
            mem_busy_percent=None if rates is None else float(rates.memory),
            temp_c=_number(self._ask(nvml.nvmlDeviceGetTemperature, self._parent, nvml.NVML_TEMPERATURE_GPU)),
            # NVML tells the fan in percent, never in revolutions
            fan_rpm=None,
            power_w=None if watts is None else watts / 1000,
            vram_total_mb=None if memory is None else round(memory.total / MIB, 1),
            vram_used_mb=None if memory is None else round(memory.used / MIB, 1),
        )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None for what this card does not tell. Raises DeviceError when the card itself is gone."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError as error:
            lost = (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_UNINITIALIZED)
            if getattr(error, "value", None) in lost:
                raise DeviceError(f"NVIDIA device {self.device.uuid} is lost: {error}") from error
            return None

    def binding(self, *, confined: bool) -> Binding:  # noqa: ARG002 - the backends' interface
        """By UUID: it means the same card however many are visible."""
        env = {"CUDA_VISIBLE_DEVICES": str(self.device.uuid), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return Binding(env=env, nodes=(f"/dev/nvidia{self._minor}", *CONTROL_NODES, *self._capabilities()))

    def _capabilities(self) -> tuple[str, ...]:
        """A MIG instance is opened through two capability nodes whose numbers the driver tells in /proc."""
        return ("char-nvidia-caps",) if self._mig else ()


def _text(value: str | bytes) -> str:
    """Older versions of the package answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
