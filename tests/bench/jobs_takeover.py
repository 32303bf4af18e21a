# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long nobody conducts when the leader is killed: until the standby leads, and until the next job has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bench import jobs_load
from bench.jobs_pool import Pool, Shape, pool
from bench.jobs_table import Column, middle
from chaos.jobs.parts import Part

Say = Callable[[str], None]
COLUMNS = (Column("leads", "standby leads after s", 2), Column("result", "first result after s", 2))
WAIT = 120.0


class Sizes(Protocol):
    @property
    def rounds(self) -> int: ...


def _leader(made: Pool) -> Part:
    """Who said so last."""
    leading = [part for part in made.conductors if part.running and "leading shard" in part.log.read_text()]
    if len(leading) != 1:
        raise SystemExit(f"bench: {len(leading)} of {len(made.conductors)} conductors say that they lead")
    return leading[0]


async def takeover(result: dict[str, Any], sizes: Sizes, folder: Path, say: Say) -> None:
    found = []
    async with pool(folder / "takeover", Shape(conductors=("a", "b"))) as made, made.client() as maestro:
        for number in range(1, sizes.rounds + 1):
            await (await maestro.submit(type="noop")).result(timeout=WAIT)
            dead = _leader(made)
            standby = next(part for part in made.conductors if part is not dead)
            times = standby.log.read_text().count("leading shard") + 1
            dead.kill()
            began = time.monotonic()
            handle = await maestro.submit(**jobs_load.NOOP)
            await made.leading(times, [standby])
            leads = time.monotonic() - began
            await handle.result(timeout=WAIT)
            found.append({"leads": leads, "result": time.monotonic() - began})
            dead.log.write_text("")  # it said that it led; the next start has not
            dead.start()
            say(f"kill {number}: {leads:.1f} s")
    result["tables"]["takeover"] = {"leader killed (LEASE_TTL_SEC 6)": middle(found)}
