# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps ORG_WQ short: writes down which submissions are final, then removes what nobody needs any more.

A whole prefix of the stream is removed in one request. Where one long-waiting job holds up the prefix, the finished
ones behind it are removed one by one, slowly, in the background.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from organism.bus import messages
from organism.bus.errors import ApiError, BusError, NotFound, StreamFull
from organism.bus.messages import Journal
from organism.core import _bus
from organism.maestro.commit import Fenced
from organism.maestro.takeover import epoch_payload

if TYPE_CHECKING:
    from organism.maestro.leading import Leading

log = logging.getLogger(__name__)

RECORD = 1000
"""Submissions in one retire record."""
IDLE = 2.0
"""Seconds after which fewer are written down."""
HELD = 2000
"""Finished messages behind a waiting one before they are removed one by one."""
RATE = 50
"""Messages removed one by one a second."""
PREFIX = 200
"""A shorter prefix is not worth a purge by itself."""
FENCE_AGE = 7 * 86_400.0
"""Seconds; results are kept for 30 days by default, and a fence that ages out with them fences nobody."""


def next_record(pending: list[int], settled: int, upto: int) -> tuple[list[int], int]:
    """The submissions of the next retire record and its ``results_upto``.

    ``settled``: results up to here are known. That may be said only when every job that they end is in a record.
    """
    batch = pending[:RECORD]
    return batch, (max(settled, upto) if len(batch) == len(pending) else upto)


def prefix_end(last_seq: int, recorded: int, first_needed: int | None, taken_in: int, *, unread: bool) -> int:
    """Messages of ORG_WQ below this sequence are needed by nobody.

    ``recorded`` is the newest retire record, which a replay needs; ``taken_in`` the last submission that was read, and
    ``unread`` whether there may be others behind it.
    """
    end = min(last_seq + 1, recorded)
    if first_needed is not None:
        end = min(end, first_needed)
    return min(end, taken_in + 1) if unread else end


class Janitor:
    """One task that works when there is something to do."""

    def __init__(self, conductor: Leading) -> None:
        self.conductor = conductor
        self.taken_in = 0
        """All submissions up to this sequence have been read."""
        self._pending: list[int] = []
        self._removable: deque[int] = deque()
        self._purged = 0
        self._recorded = 0
        self._full = False
        self._wake = asyncio.Event()
        self._records = 0
        self._results_upto = conductor.ledger.results_upto

    def retire(self, seq: int, *records: int) -> None:
        """A submission is final; ``records`` are the sequences of its run orders and retries."""
        if seq in self.conductor.ledger.jobs:
            # written down as final it would be lost by the next takeover
            log.error(
                "%s: submission %d was to be written down as final, and its job is unfinished: it is kept and goes on;"
                " please report this",
                _bus.STREAM_WQ,
                seq,
            )
            return
        self._pending.append(seq)
        self._removable.append(seq)
        self._removable.extend(records)
        if len(self._pending) == 1 or len(self._pending) >= RECORD:
            self._wake.set()

    def hurry(self) -> None:
        """The stream is full: make room now."""
        self._full = True
        self._wake.set()

    async def flush(self) -> None:
        """Write down what is final, at the end of a term."""
        while self._pending:
            if not await self._record():
                return

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if len(self._pending) < RECORD and not self._full:
                # what finishes in the next moments goes into the same record
                try:
                    async with asyncio.timeout(IDLE):
                        while len(self._pending) < RECORD and not self._full:
                            await self._wake.wait()
                            self._wake.clear()
                except TimeoutError:
                    pass  # time to write down what there is
            await self._tidy()

    async def _tidy(self) -> None:
        conductor = self.conductor
        try:
            while self._pending and await self._record():
                pass
            if conductor.clock.now() - conductor.since > FENCE_AGE:
                conductor.end("the fence grows old: taking over anew")
                return
            await self._purge()
            await self._pick()
        except Fenced:
            return
        except BusError as problem:
            log.warning("tidying up %s: %s", _bus.STREAM_WQ, problem)
            asyncio.get_running_loop().call_later(5.0, self._wake.set)
        self._full = False

    async def _record(self) -> bool:
        """Write down up to a thousand; False when the stream is full."""
        conductor = self.conductor
        batch, upto = next_record(self._pending, conductor.results.settled, self._results_upto)
        self._results_upto = upto
        journal = Journal(ts=conductor.clock.stamp(), kind="retire", retired=batch, results_upto=upto)
        self._records += 1
        subject = _bus.journal_subject(conductor.site.shard)
        try:
            msg_id = f"retire:{conductor.epoch}:{self._records}"
            self._recorded = await conductor.queue.write(subject, messages.encode(journal), msg_id)
        except StreamFull:
            return False
        del self._pending[: len(batch)]
        return True

    # ---- removal -----------------------------------------------------------------------------------------------------

    async def _purge(self) -> None:
        """Remove the longest prefix without an unfinished job; never a submission that was not read yet."""
        conductor = self.conductor
        js, shard = conductor.js, conductor.site.shard
        state = (await js.info(_bus.STREAM_WQ))["state"]
        last, needed = int(state["last_seq"]), conductor.ledger.first_needed()
        recorded = self._recorded or self._purged
        upto = prefix_end(last, recorded, needed, self.taken_in, unread=False)
        if upto > self.taken_in + 1 and await self._unread(shard):
            upto = prefix_end(last, recorded, needed, self.taken_in, unread=True)
        if upto - max(int(state["first_seq"]), self._purged) < (1 if self._full else PREFIX):
            return
        if await self._shared(shard):
            return
        fence = conductor.queue.fence
        if fence is not None and fence[0] < upto:
            await conductor.queue.move_fence(
                _bus.epoch_subject(shard), epoch_payload(conductor.epoch, conductor.site.name)
            )
        removed = await js.purge(_bus.STREAM_WQ, seq=upto)
        log.debug("%s: %d messages below %d removed", _bus.STREAM_WQ, removed, upto)
        self._purged = upto
        self._removable = deque(seq for seq in self._removable if seq >= upto)

    async def _unread(self, shard: str) -> bool:
        """Whether there is a submission behind the last one that was read."""
        body = {"seq": self.taken_in + 1, "next_by_subj": f"gpu.task.enqueue.*.{shard}"}
        try:
            await self.conductor.js.api(f"STREAM.MSG.GET.{_bus.STREAM_WQ}", body)
        except NotFound as error:
            if error.err_code == 10059:
                raise
            return False
        return True

    async def _shared(self, shard: str) -> bool:
        """Whether other shards' submissions lie in the stream: then a prefix is not ours to remove."""
        body = {"subjects_filter": "gpu.task.enqueue.>"}
        info = await self.conductor.js.api(f"STREAM.INFO.{_bus.STREAM_WQ}", body)
        subjects = info["state"].get("subjects") or {}
        return any(subject.rsplit(".", 1)[-1] != shard for subject in subjects)

    async def _pick(self) -> None:
        """Remove single messages where a prefix is held up."""
        while len(self._removable) > (0 if self._full else HELD):
            started = self.conductor.clock.now()
            for _ in range(min(RATE, len(self._removable))):
                seq = self._removable.popleft()
                if seq < self._purged:
                    continue
                try:
                    await self.conductor.js.delete(_bus.STREAM_WQ, seq)
                except ApiError as problem:
                    log.warning("%s: message %d not removed: %s", _bus.STREAM_WQ, seq, problem)
            if self._pending or self._wake.is_set():
                self._wake.set()
                return  # the rest has time
            await asyncio.sleep(max(0.0, 1.0 - (self.conductor.clock.now() - started)))  # the rate is the purpose
