# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads what exists on the bus and carries out a plan of ``organism.core._bus_plan``."""

from __future__ import annotations

from typing import Any

from organism.bus.errors import BusError, NotFound
from organism.bus.jetstream import JetStream
from organism.core import _bus
from organism.core._bus_plan import Plan


class TopologyRefused(BusError):
    """The wanted topology needs something that must not be done by itself; the text says what."""


async def read(js: JetStream, wanted: _bus.Topology) -> _bus.Topology:
    """The whole configurations of those streams that exist, and of all named consumers of the run kind in them."""
    streams: dict[str, dict[str, Any]] = {}
    consumers: dict[str, dict[str, dict[str, Any]]] = {}
    for name in wanted.streams:
        try:
            streams[name] = (await js.info(name))["config"]
        except NotFound:
            continue
        if name in wanted.consumers:
            consumers[name] = await _consumers(js, name)
    return _bus.Topology(streams, consumers)


async def _consumers(js: JetStream, stream: str) -> dict[str, dict[str, Any]]:
    """Consumers of GPUs only: the tails of running conductors are not ours to judge."""
    found: dict[str, dict[str, Any]] = {}
    offset = 0
    while True:
        page = await js.api(f"CONSUMER.LIST.{stream}", {"offset": offset})
        rows = page.get("consumers") or []
        for row in rows:
            if row["name"].startswith(_bus.run_consumer("")):
                found[row["name"]] = row["config"]
        offset += len(rows)
        if not rows or offset >= int(page.get("total", 0)):
            return found


async def carry_out(js: JetStream, plan: Plan) -> None:
    """Do the plan's steps in order. Raises TopologyRefused before the first one when the plan has refusals."""
    if plan.refusals:
        raise TopologyRefused("\n".join(plan.refusals))
    for step in plan.steps:
        try:
            await js.api(step.subject, step.body, timeout=30.0)
        except NotFound:
            if step.verb != "delete":
                raise
