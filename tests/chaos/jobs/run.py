# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run from start to the last line of its history."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from chaos.jobs.faults import Faults
from chaos.jobs.net import Network
from chaos.jobs.notebook import Notebook, read
from chaos.jobs.plan import Plan
from chaos.jobs.pool import Pool
from chaos.jobs.recorder import Recorder, whole, witness
from chaos.jobs.trouble import Stuck

from organism.bus import messages
from organism.bus.errors import Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.messages import FINAL_STATES, StateEvent
from organism.core import _bus

PATIENCE = 180.0
"""Seconds without any job becoming final, after the last fault, from which on they never will."""
SETTLE = 60.0
"""Seconds after that in which the events, which follow the results, must be complete."""


async def conduct(folder: Path, plan: Plan, network: Network, book: Notebook) -> None:
    """Raises Stuck when the jobs did not become final; all is written down nevertheless."""
    pool = Pool(folder, plan, network)
    try:
        await pool.up()
        nc = await pool.connected("admin", "setup")
        try:
            await _fire(pool, JetStream(nc), plan, book)
        finally:
            await nc.close()
    finally:
        pool.down()
        witness(pool.ran, book)


async def _fire(pool: Pool, js: JetStream, plan: Plan, book: Notebook) -> None:
    recorder = Recorder(js, book)
    recorder.start()
    started = time.monotonic() + 1.0
    pool.tell_submitter(started)
    pool.submitter.start()
    faults = Faults(pool, book, recorder)
    watch = asyncio.create_task(faults.watch())
    try:
        firing = asyncio.create_task(faults.run(started))
        telling = asyncio.create_task(_tell(recorder, faults, plan))
        await _both(firing, watch)
        telling.cancel()
        await _both(asyncio.create_task(_until_final(pool, recorder, plan, book)), watch)
    except Exception as problem:
        print(f"  BROKEN OFF: {problem!r}", flush=True)  # what is read below may fail as well, and hide it
        raise
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await recorder.stop()
        book.note("repairs", count=sum(_repairs(part.log) for part in pool.probes))
        await _insist(recorder.dump)


async def _both(task: asyncio.Task[None], watch: asyncio.Task[None]) -> None:
    """Until ``task`` is done; what ends the watch ends it, too."""
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    if watch.done():
        task.cancel()
        watch.result()
    task.result()


async def _tell(recorder: Recorder, faults: Faults, plan: Plan) -> None:
    while True:
        await asyncio.sleep(15)
        print(f"  {faults.done.total()} of {len(plan.faults)} faults, {len(recorder.results)} of {len(plan.jobs)} jobs"
              " final", flush=True)  # fmt: skip


async def _until_final(pool: Pool, recorder: Recorder, plan: Plan, book: Notebook) -> None:
    deadline, final = time.monotonic() + PATIENCE, 0

    def sent() -> bool:
        return any(line["what"] == "all sent" for line in read(pool.book))

    while not (len(recorder.results) >= len(plan.jobs) and sent()):
        if len(recorder.results) > final:
            deadline, final = time.monotonic() + PATIENCE, len(recorder.results)
        if time.monotonic() > deadline:
            missing = sorted(set(plan.jobs) - recorder.results)
            raise Stuck(
                f"{len(missing)} jobs are not final, and none became so for {PATIENCE:g} s after the last fault"
                f" (all sent: {sent()}): {', '.join(missing[:8])}"
            )
        await asyncio.sleep(0.2)  # the submitter's notebook tells nobody
    pool.submitter.over = True
    await _settled(recorder.js, plan)
    book.note("complete")


async def _settled(js: JetStream, plan: Plan) -> None:
    """Until the events and states tell all ends; the checker says what is missing when they never do."""
    deadline = time.monotonic() + SETTLE
    while time.monotonic() < deadline:
        try:
            if await _told(js, plan):
                return
        except Unavailable as problem:  # a stream without a leader yet, after the last fault
            print(f"  {problem}", flush=True)
        await asyncio.sleep(1.0)  # a projection tells nobody when it is complete


async def _told(js: JetStream, plan: Plan) -> bool:
    for stream in (_bus.STREAM_EVENTS, f"KV_{_bus.BUCKET_JOBS}"):
        last = {one.subject: messages.decode(one.data, StateEvent).state for one in await whole(js, stream)}
        if len(last) < len(plan.jobs) or any(state not in FINAL_STATES for state in last.values()):
            return False
    return True


def _repairs(log: Path) -> int:
    return log.read_text().count("has room again") if log.exists() else 0


async def _insist(work: Callable[[], Awaitable[None]]) -> None:
    """The servers are up, and may still be reading their streams."""
    deadline = time.monotonic() + SETTLE
    while True:
        try:
            await work()
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(1.0)  # see above
