# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several of the product's workers in one process: ``python -m bench.jobs_crowd gpu0=FILE gpu1=FILE ...``.

The same parts as of ``organism-gpu-worker``, each with a connection and a key of its own; it ends with its parent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from organism.bus.connection import connect
from organism.core import _bus
from organism.core._root import Root
from organism.core._worker_settings import load_settings
from organism.worker.daemon import build_runner
from organism.worker.service import Pace, Worker
from organism.worker.state import WorkerState


async def serve(gpu: str, config: str) -> None:
    """One worker, for ever."""
    root = Root()
    settings = load_settings(root, gpu, config)
    runner = build_runner(settings, root, gpu)
    bus = await connect(
        servers=settings.words("NATS_URL"),
        label=_bus.Component("worker", gpu).label,
        nkey_file=settings.text("NKEY_FILE"),
    )
    state = WorkerState(
        gpu=gpu,
        host=socket.gethostname(),
        device=runner.device.device,
        workdir=str(runner.settings.cache),
        nats_url=",".join(settings.words("NATS_URL")),
        types=runner.types,
    )
    pace = Pace(heartbeat=settings.number("HEARTBEAT_SEC"), metrics=settings.number("METRICS_SEC"))
    worker = Worker(bus, state, runner, pace)
    await worker.prepare()
    await bus.listen(_bus.control_subject(gpu), worker.control)
    await bus.hear(_bus.order_subject(gpu), worker.order)
    await worker.run()


async def main(words: list[str]) -> None:
    async with asyncio.TaskGroup() as group:
        for gpu, _, config in (word.partition("=") for word in words):
            group.create_task(serve(gpu, config))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(main(sys.argv[1:]))
