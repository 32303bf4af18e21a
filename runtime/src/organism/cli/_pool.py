# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The operations of ``maestroctl`` on the pool: GPUs, queue, dead letters."""

from __future__ import annotations

import argparse
import asyncio

from organism.bus import rpc_types
from organism.cli._output import EXIT_OK, Output, shorten, stamp
from organism.client import AsyncMaestro, BusUnreachableError, ConductorUnreachableError

HEADS = (
    "GPU", "STATE", "JOB", "DONE", "ATTEMPT", "USER", "BUSY", "TEMP", "POWER", "FAN", "VRAM", "BEAT", "HOST", "MODEL",
)  # fmt: skip


def _with_unit(value: float | None, unit: str) -> str:
    """Unknown is a dash, never zero."""
    return "-" if value is None else f"{value:.0f}{unit}"


def _memory(gpu: rpc_types.GpuInfo) -> str:
    if gpu.vram_total_mb is None:
        return "-"
    used = "?" if gpu.vram_used_mb is None else f"{gpu.vram_used_mb:.0f}"
    return f"{used}/{gpu.vram_total_mb:.0f} MB"


def top_lines(output: Output, reply: rpc_types.TopReply) -> list[str]:
    """The pool as a table."""
    rows = [
        (
            gpu.id,
            gpu.state,
            gpu.job or "",
            "" if gpu.progress is None else f"{100 * gpu.progress:.0f}%",
            gpu.attempt or "",
            gpu.user or "",
            _with_unit(gpu.gpu_busy_percent, "%"),
            _with_unit(gpu.temp_c, "°C"),
            _with_unit(gpu.power_w, "W"),
            _with_unit(gpu.fan_rpm, "rpm"),
            _memory(gpu),
            "never" if gpu.heartbeat_age is None else f"{gpu.heartbeat_age:.0f}s",
            gpu.host,
            f"{gpu.model} (simulated)"
            if gpu.backend == "simulated" and "simul" not in gpu.model.lower()
            else gpu.model,
        )
        for gpu in sorted(reply.gpus, key=lambda gpu: _natural(gpu.id))
    ]
    queue = "  ".join(f"{state} {count}" for state, count in reply.queue.items() if count) or "empty"
    if reply.paused:
        queue += f"  (paused: {', '.join(reply.paused)})"
    leader = reply.conductor
    return [
        f"conductor {leader.name} {leader.version}, epoch {leader.epoch}, leads since {stamp(leader.since)} UTC",
        f"queue     {queue}",
        "",
        *(output.table(HEADS, rows) if rows else ["no GPU has been heard of: do the workers run?"]),
    ]


def _natural(name: str) -> tuple[str, int, str]:
    """gpu2 before gpu10."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    return stem, int(digits) if digits else -1, name


async def top(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    reply = await maestro.top()
    if output.as_json or arguments.once or not output.stdout.isatty():
        fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
        output.answer(lines=top_lines(output, reply), **fields)
        return EXIT_OK
    # a tenth of a second to import, which only the live table is worth
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=output.stdout), auto_refresh=False, screen=True) as live:
        while True:
            shown = "\n".join([*top_lines(output, reply), "", "Ctrl-C ends"])
            live.update(Text.from_ansi(shown, no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(arguments.interval)
            try:
                reply = await maestro.top()
            except (BusUnreachableError, ConductorUnreachableError) as error:
                # keep looking: the one who watches wants to see it come back
                live.update(Text(str(error)), refresh=True)


async def drain(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    on = arguments.operation == "drain"
    gpu = await maestro.drain(arguments.gpu_id, on)
    rest = f"; {gpu.job} still runs there" if on and gpu.job else ""
    output.answer(lines=[f"{gpu.id}  {output.paint(gpu.state)}{rest}"], gpu=gpu)
    return EXIT_OK


async def pause(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    paused = await maestro.pause(arguments.queue, arguments.operation == "pause")
    state = "paused" if arguments.queue in paused else "open"
    output.answer(lines=[f"queue {arguments.queue}  {state}"], paused=paused)
    return EXIT_OK


async def dead(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    if arguments.dead_operation == "replay":
        handle = await maestro.replay(arguments.task_id, seq=arguments.seq)
        output.answer(lines=[handle.task_id], task_id=handle.task_id)
        return EXIT_OK
    reply = await maestro.dead(arguments.limit)
    rows = [(entry.seq, entry.task_id, entry.user, stamp(entry.ts), shorten(entry.reason, 100)) for entry in reply.dead]
    lines = output.table(("SEQ", "ID", "USER", "WHEN", "WHY"), rows) if rows else []
    output.answer(lines=lines, dead=reply.dead, more=reply.more)
    if not rows:
        output.hint("no dead letters")
    return EXIT_OK


async def info(maestro: AsyncMaestro, _arguments: argparse.Namespace, output: Output) -> int:
    reply = await maestro.info()
    rows = [
        ("version", reply.version),
        ("nats-server", reply.server_version),
        ("job types", ", ".join(reply.types)),
        ("timeout", f"{reply.default_timeout:g} s unless the job says otherwise"),
        ("retries", f"{reply.max_retries} unless the job says otherwise"),
        ("queue", f"{reply.max_queue} unfinished jobs"),
        ("largest job", f"{reply.max_payload / 1e6:.1f} MB"),
        ("operators", ", ".join(reply.operators)),
    ]
    lines = [f"{name + ':':<13}{text}" for name, text in rows if text]
    for name, stream in reply.streams.items():
        lines.append(f"{name + ':':<13}{stream.messages} messages, {stream.bytes} bytes {stream.problem}".rstrip())
    output.answer(lines=lines, **{field: getattr(reply, field) for field in reply.__struct_fields__})
    return EXIT_OK
