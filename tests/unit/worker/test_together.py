# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job with several devices sees all of them and no other; what a cache has is told within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from organism.worker.devices.base import Binding, together
from organism.worker.warm import MOST, Warm


def amd(rocr: str, node: str) -> Binding:
    env = {"ROCR_VISIBLE_DEVICES": rocr, "HIP_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "0"}
    return Binding(env, (f"/dev/dri/{node}", "/dev/kfd"))


def test_named_devices_are_named_and_counted_ones_counted() -> None:
    both = together([amd("GPU-a", "renderD128"), amd("GPU-b", "renderD129")])
    assert both.env == {
        "ROCR_VISIBLE_DEVICES": "GPU-a,GPU-b",
        "HIP_VISIBLE_DEVICES": "0,1",
        "GPU_DEVICE_ORDINAL": "0,1",
    }
    assert both.nodes == ("/dev/dri/renderD128", "/dev/kfd", "/dev/dri/renderD129")


def test_a_confined_job_counts_what_it_sees() -> None:
    both = together([amd("0", "renderD128"), amd("0", "renderD129")])
    assert both.env["ROCR_VISIBLE_DEVICES"] == "0,1"


def test_nvidia_is_named_by_uuid_and_other_variables_stay() -> None:
    cards = [
        Binding(
            {"CUDA_VISIBLE_DEVICES": f"GPU-{n}", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ("/dev/nvidiactl", f"/dev/n{n}")
        )
        for n in range(3)
    ]
    assert together(cards).env == {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1,GPU-2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize("none", ["", "-1"])
def test_where_there_is_no_device_none_is_made_up(none: str) -> None:
    assert together([Binding({"CUDA_VISIBLE_DEVICES": none})] * 2).env == {"CUDA_VISIBLE_DEVICES": none}
    mixed = together([amd("-1", "a"), amd("GPU-b", "b")])
    assert mixed.env["ROCR_VISIBLE_DEVICES"] == "-1"


def test_one_device_is_as_before() -> None:
    assert together([amd("GPU-a", "renderD128")]) == amd("GPU-a", "renderD128")


def test_a_cache_tells_its_top_and_deep_inputs(tmp_path: Path) -> None:
    for path in ("data/a", "data/b", "models/llama/8b", "tasks/job", ".order"):
        (tmp_path / path).mkdir(parents=True)
    warm = Warm(tmp_path)
    assert warm.look() == ["data", "data/a", "data/b", "models", "models/llama"]
    warm.wanted(["models/llama/8b/", "models/absent"])
    assert warm.look()[0] == "models/llama/8b"
    assert "models/absent" not in warm.look()


def test_a_cache_with_many_entries_tells_a_bounded_part(tmp_path: Path) -> None:
    for number in range(MOST + 50):
        (tmp_path / f"{number:04}").touch()
    warm = Warm(tmp_path)
    warm.wanted(f"{number:04}" for number in range(MOST, MOST + 10))
    assert len(warm.look()) == MOST
    assert set(warm.look()) >= {f"{number:04}" for number in range(MOST, MOST + 10)}
    assert Warm(tmp_path / "absent").look() == []
