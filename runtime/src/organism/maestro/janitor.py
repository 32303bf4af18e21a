# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps ORG_WQ short: writes down which submissions are final, then removes what nobody needs any more.

A whole prefix of the stream is removed in one request. Where there are other shards, each removes its own submissions
and records, by their subjects, and with them the run orders before the first submission of any shard. Where one
long-waiting job holds up the prefix, the finished ones behind it are removed one by one, slowly, in the background.
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
from organism.maestro.lookup import other_shards
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
SHARED_EVERY = 30.0
"""Seconds between two purges of fewer than that where other shards wait for it: it costs a few requests."""
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
        self._removable: deque[tuple[int, bool]] = deque()
        """Sequences, and whether they are submissions (or the records of one)."""
        self._purged = 0
        self._purged_at = float("-inf")
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
        self._removable.append((seq, True))
        self._removable.extend((record, False) for record in records)
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
        self._wake.set()  # what a predecessor has left may be in the way of other shards
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
        """Remove the longest prefix without an unfinished job; never a submission that was not read yet.

        ``last`` is read before it is asked for other shards: what one of them writes later is not in the prefix.
        """
        conductor = self.conductor
        js, shard = conductor.js, conductor.site.shard
        state = (await js.info(_bus.STREAM_WQ))["state"]
        last, needed = int(state["last_seq"]), conductor.ledger.first_needed()
        shared = bool(await other_shards(js, shard))
        if shared and not self._recorded:
            await self._record()  # empty, after a takeover: what is before it needs no other record
        recorded = self._recorded or self._purged
        upto = prefix_end(last, recorded, needed, self.taken_in, unread=False)
        if upto > self.taken_in + 1 and await self._unread(shard):
            upto = prefix_end(last, recorded, needed, self.taken_in, unread=True)
        if shared:
            await self._purge_own(upto, last)
            return
        if upto - max(int(state["first_seq"]), self._purged) < (1 if self._full else PREFIX):
            return
        fence = conductor.queue.fence
        if fence is not None and fence[0] < upto:
            await conductor.queue.move_fence(
                _bus.epoch_subject(shard), epoch_payload(conductor.epoch, conductor.site.name)
            )
        removed = await js.purge(_bus.STREAM_WQ, seq=upto)
        log.debug("%s: %d messages below %d removed", _bus.STREAM_WQ, removed, upto)
        self._purged = upto
        self._removable = deque(entry for entry in self._removable if entry[0] >= upto)

    async def _purge_own(self, upto: int, last: int) -> None:
        """The same in a stream with other shards' messages: by subject, up to what each kind is needed from.

        A run order is needed no longer than its submission, whose shard it does not say: those go that are older than
        the oldest submission of all. Of the epochs all but the fence go.
        """
        conductor, js, wq = self.conductor, self.conductor.js, _bus.STREAM_WQ
        now, shard = conductor.clock.now(), conductor.site.shard
        if not self._full and len(self._removable) < PREFIX and now - self._purged_at < SHARED_EVERY:
            if self._removable:
                asyncio.get_running_loop().call_later(SHARED_EVERY, self._wake.set)
            return
        self._purged_at = now
        removed = await js.purge(wq, seq=upto, subject=f"gpu.task.enqueue.*.{shard}")
        removed += await js.purge(wq, seq=upto, subject=_bus.journal_subject(shard))
        if conductor.queue.fence is not None:
            removed += await js.purge(wq, seq=conductor.queue.fence[0], subject=_bus.epoch_subject(shard))
        first = await self._next("gpu.task.enqueue.>", 1)
        orders = last + 1 if first is None else min(first, last + 1)
        removed += await js.purge(wq, seq=orders, subject=_bus.run_subject("*"))
        log.debug("%s: %d messages removed: shard %s's below %d, orders below %d", wq, removed, shard, upto, orders)
        self._removable = deque((seq, own) for seq, own in self._removable if seq >= (upto if own else orders))

    async def _unread(self, shard: str) -> bool:
        """Whether there is a submission behind the last one that was read."""
        return await self._next(f"gpu.task.enqueue.*.{shard}", self.taken_in + 1) is not None

    async def _next(self, subject: str, start: int) -> int | None:
        """The sequence of the first such message from ``start`` on."""
        body = {"seq": start, "next_by_subj": subject}
        try:
            found = await self.conductor.js.api(f"STREAM.MSG.GET.{_bus.STREAM_WQ}", body)
        except NotFound as error:
            if error.err_code == 10059:
                raise
            return None
        return int(found["message"]["seq"])

    async def _pick(self) -> None:
        """Remove single messages where a prefix is held up."""
        while len(self._removable) > (0 if self._full else HELD):
            started = self.conductor.clock.now()
            for _ in range(min(RATE, len(self._removable))):
                seq, _ = self._removable.popleft()
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
