# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole output of a finished job whose result has head and tail only.

Its last worker keeps it for KEEP_HOURS, and the bus for as long as there is room (``organism.bus.outputs``). Both have
the same bytes, so any piece can come from either. Users get it from the conductor alone, which knows whose job it is.
"""

from __future__ import annotations

import logging

from organism.bus import messages, outputs
from organism.bus.errors import BusError
from organism.bus.messages import Control, ControlReply, Result
from organism.bus.rpc_types import LogsReply, LogsRequest
from organism.core import _bus
from organism.maestro.conductor import Conductor

log = logging.getLogger(__name__)

LOG_TIMEOUT = 10.0
"""Seconds that a worker has to read a piece of a log."""


async def kept_log(conductor: Conductor, result: Result, request: LogsRequest) -> LogsReply | None:
    """A piece of it; None when nothing was left out of the result, or nobody has more."""
    text = str(result.data.get(request.stream) or "")
    total = int(result.data.get(f"{request.stream}_bytes") or 0)
    gpu = result.data.get("gpu_id")
    if not gpu or outputs.is_whole(text, total):
        return None
    offset = request.offset if request.attempt in (0, result.attempts) else 0
    sources = [_of_worker, _of_bus]
    seen = conductor.fleet.gpus.get(gpu)
    if seen is None or not seen.alive:
        sources.reverse()  # a machine that is gone may cost the whole time-out, for each piece
    for source in sources:
        try:
            reply = await source(conductor, result, request.stream, str(gpu), offset)
        except (BusError, messages.BadMessage) as problem:
            log.info("the whole output of %s on %s is not to be had here: %s", result.task_id, gpu, problem)
            continue
        if reply is not None:
            return reply
    return None


async def _of_worker(conductor: Conductor, result: Result, stream: str, gpu: str, offset: int) -> LogsReply | None:
    order = Control(op="logs", task_id=result.task_id, attempt=result.attempts, offset=offset)
    order.stream = "stderr" if stream == "stderr" else "stdout"
    answer = await conductor.nc.ask(_bus.control_subject(gpu), messages.encode(order), timeout=LOG_TIMEOUT)
    reply = messages.decode(answer.data, ControlReply)
    if not reply.ok:
        return None
    return LogsReply(
        text=reply.text, next_offset=reply.next_offset, eof=reply.eof, state=result.state, attempt=result.attempts
    )


async def _of_bus(conductor: Conductor, result: Result, stream: str, gpu: str, offset: int) -> LogsReply | None:
    name = outputs.OutputName(gpu, result.task_id, result.attempts, stream)
    found = await outputs.load(conductor.js, name, offset, finished=str(result.data.get("finished")))
    if found is None:
        return None
    return LogsReply(
        text=found.text, next_offset=found.following, eof=found.eof, state=result.state, attempt=result.attempts
    )
