# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads what exists on the bus and carries out a plan of ``organism.core._bus_plan``."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from organism.bus.errors import ApiError, BusError, NotFound
from organism.bus.jetstream import JetStream
from organism.core import _bus
from organism.core._bus_plan import Plan

NO_SUITABLE_PEERS = 10005


class TopologyRefused(BusError):
    """The wanted topology needs something that must not be done by itself; the text says what."""


async def read(js: JetStream, wanted: _bus.Topology) -> _bus.Topology:
    """The whole configurations of those streams that exist."""
    streams: dict[str, dict[str, Any]] = {}
    for name in wanted.streams:
        try:
            streams[name] = (await js.info(name))["config"]
        except NotFound:
            continue
    return _bus.Topology(streams)


async def carry_out(js: JetStream, plan: Plan, *, patience: float = 30.0) -> None:
    """Do the plan's steps in order. Raises TopologyRefused before the first one when the plan has refusals.

    A cluster that has just started answers before it knows all its servers: for ``patience`` seconds that is waited
    out, then it is what it says, too few servers for the replicas.
    """
    if plan.refusals:
        raise TopologyRefused("\n".join(plan.refusals))
    deadline = time.monotonic() + patience
    for step in plan.steps:
        while True:
            try:
                await js.api(step.subject, step.body, timeout=30.0)
                break
            except NotFound:
                if step.verb == "delete":
                    break
                raise
            except ApiError as problem:
                if problem.err_code != NO_SUITABLE_PEERS or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(0.5)  # the cluster tells nobody when it is complete
