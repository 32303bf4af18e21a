# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A GPU's worker without the bus, inside the rig: job specifications in on stdin, reports out on stdout, as JSON.

Everything between the two is the product's own: settings, policy, map, user, directories, unit, supervision, output.
Only the device is a stand-in, since the rig's GPUs have no driver: ``/dev/dri/renderD128`` for gpu0, 129 for gpu1.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec

from organism.bus import messages
from organism.bus.messages import JobSpec, RunOrder
from organism.core._root import Root
from organism.core._worker_settings import load_settings
from organism.worker.daemon import build_runner
from organism.worker.devices.base import Binding
from organism.worker.runner import Runner, Stop


class OneNode:
    """A device of which a job needs one node."""

    def __init__(self, backend: Any, node: str) -> None:
        self.device = backend.device
        self.readings = backend.readings
        self.busy = backend.busy
        self._node = node

    def binding(self, *, confined: bool) -> Binding:
        assert confined
        return Binding(env={}, nodes=(self._node,))


async def run(runner: Runner, gpu: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    reports = []
    for job in jobs:
        spec = msgspec.convert(job, JobSpec)
        assert spec.task_id is not None
        order = RunOrder(
            ts=messages.now(),
            task_id=spec.task_id,
            attempt=1,
            gpu=gpu,
            incarnation="rig",
            user="mallory",
            timeout=spec.timeout or 240,
            spec=spec,
            enq_seq=1,
        )
        report = await runner.run(order, Stop())
        assert report is not None
        # with what has its default value, which messages leave out
        reports.append({name: msgspec.to_builtins(getattr(report, name)) for name in report.__struct_fields__})
    return reports


def main(gpu: str) -> None:
    root = Root()
    runner = build_runner(load_settings(root, gpu), root, gpu)
    runner.device = OneNode(runner.device, f"/dev/dri/renderD{128 + int(gpu.removeprefix('gpu'))}")
    json.dump(asyncio.run(run(runner, gpu, json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
