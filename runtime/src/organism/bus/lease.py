# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Leadership: one holder of a key at a time, with an epoch that grows with each change of hands.

No two clocks are compared. The holder's time runs from before it sent its last successful renewal; a standby's from
when it first *saw* a revision. So the holder always knows of the end of its lease before a standby takes it, provided
that clocks run at the same rate; the fences in the streams protect even when they do not.

A lease that was not renewed in time (the machine gave no processor, the server was away) has *lapsed*: its holder may
not act, but it is lost only when somebody else has taken it. Renewal is by compare-and-set on the holder's own last
revision, so it succeeds exactly when nobody has; and whoever waits to take it waits its time anew from that revision
on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable

from organism.bus.errors import ApiError, BusError, Refused, WrongLastSequence
from organism.bus.keyvalue import Entry, KeyValue

log = logging.getLogger(__name__)


class Lease:
    """``ttl`` and ``renew`` in seconds; ``owner`` is for people (host and process).

    ``leave``: seconds that a lease which nobody has is left to those who are to have it rather.
    """

    def __init__(
        self,
        kv: KeyValue,
        key: str,
        owner: str,
        *,
        ttl: float = 6.0,
        renew: float = 2.0,
        margin: float = 0.5,
        leave: float = 0.0,
    ) -> None:
        if not 0 < renew < ttl - margin:
            raise ValueError(f"a lease of {ttl:g} s cannot be renewed every {renew:g} s")
        self.kv = kv
        self.key = key
        self.owner = owner
        self.ttl = ttl
        self.renew = renew
        self.margin = margin
        self.leave = leave
        self.epoch = 0
        """Grows with each taking; 0 before the first."""
        self.lost = asyncio.Event()
        """Set when the lease is no longer ours: taken by another, given back, or impossible to renew."""
        self.on_renewed: Callable[[], None] = lambda: None
        """Called when a lapsed lease is valid again, before anybody is told that it is."""
        self._token = secrets.token_hex(8)  # tells our own write, whose answer got lost, from another's
        self._revision = 0
        self._until = 0.0
        self._lapsed = False  # and it was said
        self._turned = asyncio.Event()
        """Set with each renewal and with the loss."""
        self._renewing: asyncio.Task[None] | None = None

    # ---- the holder's side -------------------------------------------------------------------------------------------

    def valid(self) -> bool:
        """May the holder act now? False from a margin before anybody else may take the lease."""
        return not self.lost.is_set() and time.monotonic() < self._until

    async def confirmed(self) -> bool:
        """Wait until it is certain whether the lease is still ours."""
        while not self.lost.is_set() and not self.valid():
            self._turned.clear()
            await self._turned.wait()
        return not self.lost.is_set()

    async def acquire(self) -> int:
        """Wait until the lease is ours; returns the epoch. Call once; after ``lost`` make a new Lease.

        Raises Refused (no permission); waits out everything else.
        """
        seen: tuple[int, float] | None = None
        told = ""
        while True:
            try:
                entry = await self.kv.get(self.key)
                now = time.monotonic()
                held = entry is not None and bool(_read(entry).get("owner"))
                revision = entry.revision if entry is not None else 0
                if seen is None or seen[0] != revision:
                    seen = (revision, now)
                    owner = str(_read(entry)["owner"]) if entry is not None and held else ""
                    if owner and owner != told:  # and not with each of its renewals
                        log.info("lease %s: held by %s, waiting", self.key, owner)
                    told = owner
                left = seen[1] + (self.ttl if held else self.leave) - now
                if left > 0:
                    await asyncio.sleep(min(left, self.renew / 2))
                    continue
                if await self._take(entry):
                    self._renewing = asyncio.create_task(self._keep(), name=f"lease {self.key}")
                    self._renewing.add_done_callback(self._kept)
                    return self.epoch
                seen = None
            except WrongLastSequence:
                seen = None  # another standby was faster; its lease begins now
            except BusError as problem:
                if not _passing(problem):
                    raise
                log.warning("lease %s: %s; trying again", self.key, problem)
                seen = None  # what we could not see may have moved
                await asyncio.sleep(self.renew / 2)

    async def _take(self, entry: Entry | None) -> bool:
        epoch = int(_read(entry).get("epoch", 0)) + 1 if entry is not None else await self._first_epoch()
        sent = time.monotonic()
        body = self._body(epoch)
        if entry is None:
            self._revision = await self.kv.create(self.key, body)
        else:
            self._revision = await self.kv.update(self.key, body, entry.revision)
        self.epoch = epoch
        self._until = sent + self.ttl - self.margin
        log.info("lease %s: taken by %s, epoch %d", self.key, self.owner, epoch)
        return True

    async def _first_epoch(self) -> int:
        """After a deletion by hand the epoch must still grow: the bucket's last sequence never shrinks."""
        info = await self.kv.js.info(self.kv.stream)
        return int(info["state"]["last_seq"]) + 1

    async def _keep(self) -> None:
        patience = self.renew
        while not self.lost.is_set():
            await asyncio.sleep(self._pause())
            sent = time.monotonic()
            if sent >= self._until:
                self._say_lapsed()
            try:
                async with asyncio.timeout(patience):
                    self._revision = await self._renew_once()
            except WrongLastSequence:
                self._lose("taken by another")
            except (BusError, TimeoutError) as problem:
                # an answer may be lost, and then asking again helps; or late, and then only more patience does
                patience = min(2 * patience, 3 * self.ttl)  # three questions at most
                self._failed(problem)
            else:
                patience = max(self.renew, 2 * (time.monotonic() - sent))
                self._renewed(sent)

    def _pause(self) -> float:
        """Seconds until the next try: what is late, or about to be, is tried soon."""
        left = self._until - time.monotonic()
        return max(self.renew / 10, min(self.renew, left - self.renew))

    def _renewed(self, sent: float) -> None:
        until = sent + self.ttl - self.margin
        now = time.monotonic()
        if now >= self._until and now < until:
            log.warning("lease %s: renewed after its end, nobody has taken it: epoch %d goes on", self.key, self.epoch)
            self.on_renewed()
            self._lapsed = False
        self._until = until
        self._turned.set()

    def _failed(self, problem: BusError | TimeoutError) -> None:
        if self.kv.js.nc.is_closed:
            self._lose("the connection has ended")
        elif not self._lapsed:
            log.warning("lease %s: renewal failed: %s", self.key, problem or type(problem).__name__)
        elif isinstance(problem, BusError) and not _passing(problem):
            self._lose(f"it cannot be renewed: {problem}")

    def _say_lapsed(self) -> None:
        if not self._lapsed:
            self._lapsed = True
            log.warning(
                "lease %s: not renewed in time by %s: epoch %d decides nothing until it is known who holds it",
                self.key,
                self.owner,
                self.epoch,
            )

    def _kept(self, task: asyncio.Task[None]) -> None:
        """Who can renew no more shall not lead either."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("lease %s: renewing failed", self.key, exc_info=error)
            self._lose(f"renewing failed: {error}")

    async def _renew_once(self) -> int:
        try:
            return await self.kv.update(self.key, self._body(self.epoch), self._revision)
        except WrongLastSequence:
            entry = await self.kv.get(self.key)
            if entry is None or _read(entry).get("token") != self._token:
                raise
            # our own renewal, whose answer got lost; kept, since the next answer may be late as well
            self._revision = entry.revision
            return await self.kv.update(self.key, self._body(self.epoch), self._revision)

    async def release(self) -> None:
        """Give it back, so that a standby need not wait. Does nothing when it is lost already."""
        await self._stop()
        if not self.valid():
            self._lose("released after its end")
            return
        self._lose("released")
        try:
            await self.kv.update(self.key, json.dumps({"owner": "", "epoch": self.epoch}).encode(), self._revision)
        except BusError as problem:
            log.warning("lease %s: could not be given back (it runs out by itself): %s", self.key, problem)

    async def _stop(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
            self._renewing = None

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            log.info("lease %s: epoch %d is over for %s: %s", self.key, self.epoch, self.owner, why)
            self._until = 0.0
            self.lost.set()
            self._turned.set()

    def _body(self, epoch: int) -> bytes:
        return json.dumps({"owner": self.owner, "epoch": epoch, "token": self._token}).encode()


def _passing(problem: BusError) -> bool:
    return not isinstance(problem, Refused) and not (isinstance(problem, ApiError) and problem.code not in (503, 500))


def _read(entry: Entry) -> dict[str, str | int]:
    try:
        value = json.loads(entry.value)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
