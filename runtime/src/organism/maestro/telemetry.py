# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conductor's own signs of life: ``maestro.up``, ``maestro.heartbeat``, ``maestro.state`` (S1k-037)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from organism.core import _bus
from organism.maestro.conductor import Conductor

HEARTBEAT = 5.0
STATE_EVERY = 2
"""Heartbeats between two states."""


def _base(conductor: Conductor) -> dict[str, Any]:
    return {
        "ts": conductor.clock.stamp(),
        "name": conductor.site.name,
        "shard": conductor.site.shard,
        "epoch": conductor.epoch,
    }


def counts(conductor: Conductor) -> dict[str, int]:
    """``qsize``: waiting jobs; ``inflight``: given to a GPU."""
    inflight = sum(len(gpu.orders) for gpu in conductor.fleet.gpus.values())
    return {"qsize": max(0, len(conductor.ledger) - inflight), "inflight": inflight}


def heartbeat(conductor: Conductor) -> bytes:
    body = {"alive": True, "gpus_seen": len(conductor.fleet.gpus), **counts(conductor)}
    return msgspec.json.encode({**_base(conductor), **body})


def state(conductor: Conductor) -> bytes:
    alive = sum(1 for gpu in conductor.fleet.gpus.values() if gpu.alive)
    return msgspec.json.encode({**_base(conductor), "gpus_alive": alive, **counts(conductor)})


async def run(conductor: Conductor) -> None:
    """Until cancelled."""
    up = {**_base(conductor), "version": conductor.site.version}
    conductor.outbox.send(_bus.MAESTRO_UP, msgspec.json.encode(up))
    beats = 0
    while True:
        conductor.outbox.send(_bus.MAESTRO_HEARTBEAT, heartbeat(conductor))
        if beats % STATE_EVERY == 0:
            conductor.outbox.send(_bus.MAESTRO_STATE, state(conductor))
        beats += 1
        await asyncio.sleep(HEARTBEAT)  # the rhythm is the purpose
