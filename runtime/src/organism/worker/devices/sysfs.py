# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""AMD (and, with what hwmon tells, Intel) cards through the kernel's own files; nothing of ROCm is needed."""

from __future__ import annotations

from organism.bus.messages import Device
from organism.core._gpu import Gpu, visible_index
from organism.core._gpu_metrics import Readings, read_sysfs
from organism.core._root import Root
from organism.worker.devices.base import Binding, DeviceError


class SysfsGpu:
    def __init__(self, root: Root, gpu: Gpu) -> None:
        self._root = root
        self._gpu = gpu
        self.device = Device(
            backend=gpu.backend, address=gpu.address, uuid=gpu.uuid, model=gpu.model, vram_mb=gpu.vram_mb
        )

    def readings(self) -> Readings:
        if not self._root.exists(self._gpu.sysfs):
            raise DeviceError(f"the GPU at {self._gpu.address} has left the bus (lspci -s {self._gpu.address})")
        return read_sysfs(self._root, self._gpu.sysfs)

    def busy(self, on: bool) -> None:
        """A real card shows it by itself."""

    def binding(self, *, confined: bool) -> Binding:
        if self._gpu.render is None:
            raise DeviceError(f"the GPU at {self._gpu.address} has no render node: is its driver loaded?")
        nodes: tuple[str, ...] = (f"/dev/dri/{self._gpu.render}",)
        if self._gpu.vendor != "amd":
            return Binding(nodes=nodes)
        return Binding(env=self._amd(confined), nodes=(*nodes, "/dev/kfd"))

    def _amd(self, confined: bool) -> dict[str, str]:
        """ROCr filters first and the layers above it count what it left: HIP_VISIBLE_DEVICES and GPU_DEVICE_ORDINAL
        (OpenCL) are therefore 0 whenever ROCR_VISIBLE_DEVICES picks one card (ROCm: "GPU isolation techniques").

        The kernel hides KFD nodes whose render node the device control group forbids, so a confined job's only card is
        number 0.
        """
        if self._gpu.uuid:
            rocr = f"GPU-{self._gpu.uuid.removeprefix('0x')}"
        elif confined:
            rocr = "0"
        else:
            index = visible_index(self._root, self._gpu)
            if index is None:
                # no KFD (Polaris without ROCm): rather none than a wrong one
                return {"ROCR_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "GPU_DEVICE_ORDINAL": "-1"}
            rocr = str(index)
        return {"ROCR_VISIBLE_DEVICES": rocr, "HIP_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "0"}
