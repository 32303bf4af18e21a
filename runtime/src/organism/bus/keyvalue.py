# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A key-value bucket by its subjects (NATS ADR-8): reads from the leader, writes with compare-and-set.

nats-py's own buckets have watchers that hang and listings that are incomplete; this needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from organism.bus.errors import WrongLastSequence
from organism.bus.jetstream import JetStream

_OPERATION = "KV-Operation"
_REMOVED = ("DEL", "PURGE")


@dataclass(frozen=True)
class Entry:
    key: str
    value: bytes
    revision: int
    time: float
    """The server's clock, seconds since 1970; for people, never to be compared with another clock."""


class KeyValue:
    """One bucket, which the topology has made. Each call may raise Unavailable, Refused or an ApiError."""

    def __init__(self, js: JetStream, bucket: str) -> None:
        self.js = js
        self.bucket = bucket
        self.stream = f"KV_{bucket}"

    def subject(self, key: str) -> str:
        return f"$KV.{self.bucket}.{key}"

    async def get(self, key: str) -> Entry | None:
        """The present value, or None when there is none or it was deleted."""
        stored = await self.js.last(self.stream, self.subject(key))
        if stored is None or stored.headers.get(_OPERATION) in _REMOVED:
            return None
        return Entry(key, stored.data, stored.seq, stored.time)

    async def create(self, key: str, value: bytes) -> int:
        """Write it where nothing is; returns the revision. Raises WrongLastSequence when there is a value."""
        try:
            return await self.update(key, value, 0)
        except WrongLastSequence:
            stored = await self.js.last(self.stream, self.subject(key))
            if stored is None or stored.headers.get(_OPERATION) not in _REMOVED:
                raise
            return await self.update(key, value, stored.seq)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Compare and set: write it when the present revision is ``revision``. Raises WrongLastSequence."""
        return (await self.js.publish(self.subject(key), value, expect=(revision, None))).seq

    async def put(self, key: str, value: bytes, *, msg_id: str | None = None) -> int:
        """Write it whatever is there; returns the revision."""
        return (await self.js.publish(self.subject(key), value, msg_id=msg_id)).seq

    async def delete(self, key: str, *, revision: int | None = None) -> None:
        """Leave a mark that there is no value; with ``revision`` only when that is the present one."""
        expect = None if revision is None else (revision, None)
        await self.js.publish(self.subject(key), b"", headers={_OPERATION: "DEL"}, expect=expect)
