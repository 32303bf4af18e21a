# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The backends behind one interface: simulated, sysfs (a made tree), NVML (a stand-in for the driver's library)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unit.gpu.trees import Card, kfd_node, make_tree, rx580

from organism.core._gpu import discover
from organism.core._gpu_map import Entry, render_map
from organism.core._gpu_metrics import Readings
from organism.core._root import Root
from organism.worker.devices import open_device
from organism.worker.devices.base import DeviceError
from organism.worker.devices.nvml import NvmlGpu
from organism.worker.devices.simulated import AMBIENT_C, FULL_LOAD_C, TAU_SECONDS, SimulatedGpu
from organism.worker.devices.sysfs import SysfsGpu


def temperature(gpu: SimulatedGpu) -> float:
    told = gpu.readings().temp_c
    assert told is not None
    return told


def test_a_simulated_gpu_warms_up_with_its_job_and_cools_down_after_it() -> None:
    now = [0.0]
    gpu = SimulatedGpu("sim:0", clock=lambda: now[0])
    assert gpu.readings() == Readings(0, 0, AMBIENT_C, 900, 12.0, 8192, 64)
    gpu.busy(True)
    now[0] = TAU_SECONDS
    expected = round(FULL_LOAD_C - (FULL_LOAD_C - AMBIENT_C) / 2.718281828, 1)
    assert temperature(gpu) == expected
    assert gpu.readings().gpu_busy_percent == 97
    now[0] = 1000
    assert temperature(gpu) == FULL_LOAD_C
    gpu.busy(False)
    now[0] = 1000 + 10 * TAU_SECONDS
    assert abs(temperature(gpu) - AMBIENT_C) < 0.2
    assert "no hardware" in gpu.device.model
    assert gpu.device.backend == "simulated"


def test_looking_often_changes_nothing() -> None:
    now = [0.0]
    often, once = SimulatedGpu("sim:0", clock=lambda: now[0]), SimulatedGpu("sim:0", clock=lambda: now[0])
    often.busy(True)
    once.busy(True)
    for step in range(40):
        now[0] = step / 4
        often.readings()
    assert temperature(often) == temperature(once)


def sysfs(tmp_path: Path, cards: list[Card], address: str) -> SysfsGpu:
    root = Root(make_tree(tmp_path, cards))
    return SysfsGpu(root, next(gpu for gpu in discover(root) if gpu.address == address))


def test_an_amd_card_is_bound_by_its_place_among_what_the_job_sees(tmp_path: Path) -> None:
    gpu = sysfs(tmp_path, [rx580("0000:03:00.0", 128), rx580("0000:04:00.0", 129)], "0000:04:00.0")
    kfd_node(tmp_path, 0, simd=0)
    kfd_node(tmp_path, 1, simd=144, minor=128)
    kfd_node(tmp_path, 2, simd=144, minor=129)
    alone, among = gpu.binding(confined=True), gpu.binding(confined=False)
    assert alone.nodes == ("/dev/dri/renderD129", "/dev/kfd")
    assert (alone.env["ROCR_VISIBLE_DEVICES"], among.env["ROCR_VISIBLE_DEVICES"]) == ("0", "1")
    # above ROCr just one card is left to count
    assert among.env["HIP_VISIBLE_DEVICES"] == among.env["GPU_DEVICE_ORDINAL"] == "0"


def test_an_amd_card_that_says_what_is_unique_is_bound_by_it(tmp_path: Path) -> None:
    card = Card("0000:03:00.0", device="0x66af", minor=128, unique_id="1c8a3f0e9d")
    gpu = sysfs(tmp_path, [card], "0000:03:00.0")
    assert gpu.binding(confined=False).env["ROCR_VISIBLE_DEVICES"] == "GPU-1c8a3f0e9d"
    assert gpu.device.uuid == "1c8a3f0e9d"


def test_a_card_that_rocm_does_not_know_is_refused_rather_than_mistaken(tmp_path: Path) -> None:
    gpu = sysfs(tmp_path, [rx580("0000:03:00.0", 128), rx580("0000:04:00.0", 129)], "0000:04:00.0")
    assert set(gpu.binding(confined=False).env.values()) == {"-1"}


def test_a_card_that_has_left_the_bus_is_an_error_and_not_idle(tmp_path: Path) -> None:
    gpu = sysfs(tmp_path, [rx580("0000:03:00.0", 128)], "0000:03:00.0")
    assert gpu.readings().temp_c == 54
    (tmp_path / "sys/bus/pci/devices").rename(tmp_path / "gone")
    with pytest.raises(DeviceError, match=r"0000:03:00\.0 has left the bus"):
        gpu.readings()


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


NOT_SUPPORTED, NOT_FOUND, LOST = 3, 6, 15


@dataclass
class FakeNvml:
    """The functions of pynvml that are used. No real NVIDIA card was at hand when this was written."""

    broken: int | None = None
    NVMLError: Any = FakeNvmlError
    NVML_ERROR_GPU_IS_LOST: int = LOST
    NVML_ERROR_UNINITIALIZED: int = 1
    NVML_TEMPERATURE_GPU: int = 0

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in ("GPU-1", "MIG-1"):
            raise FakeNvmlError(NOT_FOUND)
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:
        return "GPU-1"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "GPU-1"

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMinorNumber(self, handle: str) -> int:
        assert handle == "GPU-1"
        return 4

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        total = 18 if handle.startswith("MIG") else 141
        return SimpleNamespace(total=total * 1024**3, used=1024**3)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if self.broken is not None:
            raise FakeNvmlError(self.broken)
        return SimpleNamespace(gpu=55, memory=20)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 345_600


def nvml_gpu(nvml: FakeNvml, uuid: str | None = "GPU-1") -> NvmlGpu:
    return NvmlGpu(nvml, address="0000:65:00.0", uuid=uuid, model="", vram_mb=0)


def test_an_nvidia_card_through_nvml() -> None:
    gpu = nvml_gpu(FakeNvml())
    assert (gpu.device.uuid, gpu.device.model, gpu.device.vram_mb) == ("GPU-1", "NVIDIA H200", 141 * 1024)
    assert gpu.readings() == Readings(55, 20, 61, None, 345.6, 141 * 1024, 1024)
    binding = gpu.binding(confined=False)
    assert binding.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert binding.nodes[0] == "/dev/nvidia4"
    assert nvml_gpu(FakeNvml(), uuid=None).device.uuid == "GPU-1"


def test_a_mig_instance_has_its_own_memory_and_no_utilisation() -> None:
    gpu = nvml_gpu(FakeNvml(), "MIG-1")
    readings = gpu.readings()
    assert (readings.gpu_busy_percent, readings.vram_total_mb, readings.temp_c) == (None, 18 * 1024, 61)
    binding = gpu.binding(confined=True)
    assert binding.env["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    assert "char-nvidia-caps" in binding.nodes


def test_nvml_tells_unknown_from_lost() -> None:
    nvml = FakeNvml()
    gpu = nvml_gpu(nvml)
    nvml.broken = NOT_SUPPORTED
    assert gpu.readings().gpu_busy_percent is None
    nvml.broken = LOST
    with pytest.raises(DeviceError, match="NVIDIA device GPU-1 is lost"):
        gpu.readings()
    with pytest.raises(DeviceError, match="GPU-9 cannot be opened"):
        nvml_gpu(FakeNvml(), "GPU-9")


def mapped(tmp_path: Path, *entries: Entry) -> Root:
    (tmp_path / "etc/organism").mkdir(parents=True)
    (tmp_path / "etc/organism/gpus.json").write_text(render_map(entries))
    return Root(tmp_path)


MAP = "/etc/organism/gpus.json"


def test_the_map_leads_to_the_device(tmp_path: Path) -> None:
    make_tree(tmp_path, [rx580("0000:03:00.0", 128), Card("0000:07:00.0", minor=129, unique_id="aa")])
    root = mapped(
        tmp_path,
        Entry("gpu0", "amdgpu", "0000:03:00.0"),
        Entry("gpu1", "amdgpu", "0000:04:00.0", uuid="aa"),  # plugged in elsewhere since
        Entry("gpu2", "simulated", "sim:0", vram_mb=4096),
        Entry("gpu3", "nvml", "0000:65:00.0", uuid="GPU-1"),
        Entry("gpu4", "amdgpu", "0000:09:00.0", model="RX 580"),
    )
    assert open_device(root, MAP, "gpu0").device.address == "0000:03:00.0"
    assert open_device(root, MAP, "gpu1").device.address == "0000:07:00.0"
    assert open_device(root, MAP, "gpu2").device.vram_mb == 4096
    assert open_device(root, MAP, "gpu3", FakeNvml).device.backend == "nvml"
    with pytest.raises(DeviceError, match=r"gpu4 is RX 580 at 0000:09:00\.0, but no such card is there now"):
        open_device(root, MAP, "gpu4")
    with pytest.raises(DeviceError, match="the map has no GPU gpu5"):
        open_device(root, MAP, "gpu5")


def test_another_card_in_the_slot_is_not_taken_for_the_one_in_the_map(tmp_path: Path) -> None:
    make_tree(tmp_path, [Card("0000:03:00.0", minor=128, unique_id="bb")])
    root = mapped(tmp_path, Entry("gpu0", "amdgpu", "0000:03:00.0", uuid="aa"))
    with pytest.raises(DeviceError, match="no such card is there now"):
        open_device(root, MAP, "gpu0")


def test_without_a_map_the_error_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"organism\.proxmox\.gpu_map writes"):
        open_device(Root(tmp_path), MAP, "gpu0")
