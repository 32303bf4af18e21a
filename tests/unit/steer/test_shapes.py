# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shapes of machines in tests/unit/fixtures: every interrupt has a place, every bridge its ports."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from organism.core import _cpu_zones, _irq, _irq_apply, _irq_plan, _netdev, _topology
from organism.core._irq_plan import IrqWish
from organism.core._root import Root

SHAPES = {
    "coffee_lake_12_gpus": 1,
    "epyc_two_sockets": 1,
    "alder_lake_hybrid": 1,
    "amd_apu": 1,
    "nvidia_mig": 1,
    "single_core_vm": 0,
}


@pytest.mark.parametrize(("shape", "drives"), SHAPES.items())
def test_every_interrupt_has_its_place(machine: Callable[[str], Root], shape: str, drives: int) -> None:
    root = machine(shape)
    zones = _cpu_zones.plan(_topology.read(root))
    wish = IrqWish({"host": zones.host, "vcpu": zones.vcpu, "io": zones.io})
    found = _irq.observe(root)
    assert found.vectors and all(vector.device or vector.name for vector in found.vectors)
    kinds = [device.kind for device in found.devices]
    assert kinds.count("nic") >= 1 and kinds.count("nvme") >= drives
    for steering in _irq_plan.plan(found, wish).steerings:
        device = steering.vector.device
        near = device is not None and device.kind in ("nic", "nvme")
        assert set(steering.wanted) <= set(zones.io if near else zones.host)
        assert len(steering.wanted) == 1 or not near
    for bridge in (name for name in _netdev.names(root) if name.startswith("vmbr")):
        assert all(_netdev.address(root, port) for port in _netdev.ports(root, [bridge]))
    _irq_apply.steer(root, wish)
    assert not _irq_apply.steer(root, wish).difference
    _irq_apply.restore(root)
    assert {v.key: v.affinity for v in _irq.observe(root).vectors} == {v.key: v.affinity for v in found.vectors}
