# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From what a caller wrote to a stored submission: checked here first, sent again under the same id until confirmed."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from organism.bus import messages
from organism.bus.errors import ApiError, BusError, DuplicateInBatch, Refused, StreamFull, Unavailable
from organism.bus.jetstream import MAX_BATCH, Outgoing, PubAck
from organism.client._errors import (
    BusUnreachableError,
    InvalidJobError,
    MaestroError,
    PayloadTooLargeError,
    QueueFullError,
)
from organism.client._ids import new_task_id
from organism.client._link import RETRY_PAUSE, Link
from organism.client._scripts import read_script
from organism.core import _bus

BATCH_BYTES = 16 * 1024 * 1024
"""Largest sum of payloads in one atomic batch: the server holds a batch in memory until its commit."""
MOST_IN_ARRAY = 100_000
HEADER_ROOM = 1024
"""Bytes kept free for headers, which count against the server's ``max_payload``."""
STORAGE_CODES = (10023, 10047)
"""nats-server's "insufficient resources" and "insufficient storage resources available"."""


_Message = tuple[messages.JobSpec, Outgoing]


@dataclass(frozen=True)
class Accepted:
    """A submission on the bus's disk."""

    task_id: str
    seq: int
    duplicate: bool
    """It had been accepted before, under the same id."""


def build(fields: dict[str, Any]) -> messages.JobSpec:
    """A checked specification with an id. Raises InvalidJobError. None means "not given"."""
    given = {key: value for key, value in fields.items() if value is not None}
    given.setdefault("task_id", new_task_id())
    if "type" not in given:
        given["type"] = next((kind for kind in ("shell", "python") if kind in given), "cmd")
    if isinstance(given.get("python"), Path):
        given["python"] = read_script(given["python"])
    if "after" in given:
        given["after"] = needs(given["after"])
    if isinstance(given.get("cmd"), str):
        raise InvalidJobError(
            f"cmd must be a list of words such as ['python3', 'train.py'], not the text {given['cmd']!r}"
        )
    try:
        spec = msgspec.convert(given, messages.JobSpec)
        messages.check_spec(spec)
    except (msgspec.ValidationError, messages.BadMessage) as error:
        raise InvalidJobError(f"the job cannot be submitted: {error}") from error
    return spec


def needs(after: Any) -> list[Any]:
    """What a job waits for: ``"ID"`` or ``"ID:ok|failed|any"`` each, or an object as in the job's schema."""
    listed = [after] if isinstance(after, str) else list(after)
    return [_need(one) if isinstance(one, str) else one for one in listed]


def _need(text: str) -> dict[str, str]:
    task_id, separator, on = text.partition(":")
    return {"task_id": task_id, "on": on} if separator else {"task_id": task_id}


def array(count: int, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs of an array: ids ``<id>-0`` to ``<id>-<count - 1>``, label ``array``, and each its own index.

    A job finds ``ORGANISM_ARRAY_ID``, ``ORGANISM_ARRAY_INDEX`` and ``ORGANISM_ARRAY_SIZE`` in its environment.
    Raises InvalidJobError.
    """
    if not 1 <= count <= MOST_IN_ARRAY:
        raise InvalidJobError(f"an array has 1 to {MOST_IN_ARRAY} jobs, not {count}")
    name = fields.get("task_id") or new_task_id()
    common = {key: value for key, value in fields.items() if value is not None}
    if "unique" in common:
        raise InvalidJobError("`unique` would let only one job of the array run: leave one of them out")
    jobs = []
    for index in range(count):
        place = {"ORGANISM_ARRAY_ID": name, "ORGANISM_ARRAY_INDEX": str(index), "ORGANISM_ARRAY_SIZE": str(count)}
        jobs.append(
            {
                **common,
                "task_id": f"{name}-{index}",
                "env": {**(common.get("env") or {}), **place},
                "labels": {**(common.get("labels") or {}), "array": name},
            }
        )
    return jobs


def encode(spec: messages.JobSpec, max_payload: int) -> bytes:
    """Raises PayloadTooLargeError."""
    try:
        data = messages.encode(spec)
    except (TypeError, ValueError) as error:  # args may hold what JSON cannot say
        raise InvalidJobError(f"the job cannot be written as JSON: {error}") from error
    if len(data) + HEADER_ROOM > max_payload:
        raise PayloadTooLargeError(
            f"the job is {len(data) / 1e6:.1f} MB, this bus takes messages up to {max_payload / 1e6:.1f} MB; put the"
            " data in a file that the GPU's host can read, and pass its path"
        )
    return data


class Submitter:
    """Sends what :func:`build` made."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def _outgoing(self, spec: messages.JobSpec) -> Outgoing:
        user = self.link.settings.user
        return Outgoing(
            subject=_bus.enqueue_subject(user, self.link.shard),
            data=encode(spec, self.link.nc.max_payload),
            msg_id=f"{user}:{spec.task_id}",
        )

    async def submit(self, spec: messages.JobSpec, *, confirm: float) -> Accepted:
        """Returns when the server has it on disk; tries for ``confirm`` seconds. Raises a MaestroError."""
        return _accepted(spec, await self._publish(self._outgoing(spec), str(spec.task_id), confirm))

    async def submit_many(self, specs: Sequence[messages.JobSpec], *, confirm: float) -> list[Accepted]:
        """All of them, in atomic batches of up to 1,000. When one batch fails the earlier ones stay accepted."""
        ids = [spec.task_id for spec in specs]
        if len(set(ids)) != len(ids):
            twice = sorted({str(task_id) for task_id in ids if ids.count(task_id) > 1})
            raise InvalidJobError(f"the same task_id more than once: {', '.join(twice)}; nothing was sent")
        outgoing = [(spec, self._outgoing(spec)) for spec in specs]
        accepted: list[Accepted] = []
        for batch in _batches(outgoing):
            try:
                accepted += await self._batch(batch, confirm)
            except MaestroError as error:
                if not accepted:
                    raise
                raise type(error)(
                    f"{error} (the first {len(accepted)} of {len(specs)} jobs were accepted; submitting all again under"
                    " the same ids is safe)"
                ) from error
        return accepted

    async def _batch(self, batch: Sequence[_Message], confirm: float) -> list[Accepted]:
        """In order, also when some of them are there already, so that nobody comes before a job they run after.

        They are there by an earlier try of ours or of the caller's. The server does not say which: so the first ones go
        one by one, until one of them was not known, and then the others as a batch again; each time more of them.
        """
        accepted: list[Accepted] = []
        least = 1
        while len(accepted) < len(batch):
            rest = batch[len(accepted) :]
            name = f"{rest[0][0].task_id} and {len(rest) - 1} more"
            try:
                ack = await self._persist(
                    functools.partial(self.link.js.publish_batch, [message for _, message in rest]), name, confirm
                )
            except DuplicateInBatch:
                accepted += await self._until_new(rest, least, confirm)
                least *= 2
            else:
                first = ack.seq - len(rest) + 1
                accepted += [
                    Accepted(str(spec.task_id), first + place, ack.duplicate) for place, (spec, _) in enumerate(rest)
                ]
        return accepted

    async def _until_new(self, rest: Sequence[_Message], least: int, confirm: float) -> list[Accepted]:
        """Send one after the other, until ``least`` are there of which the last one was not known before."""
        accepted: list[Accepted] = []
        for spec, message in rest:
            accepted.append(_accepted(spec, await self._publish(message, str(spec.task_id), confirm)))
            if len(accepted) >= least and not accepted[-1].duplicate:
                break
        return accepted

    async def _publish(self, message: Outgoing, name: str, confirm: float) -> PubAck:
        return await self._persist(
            lambda: self.link.js.publish(message.subject, message.data, msg_id=message.msg_id), name, confirm
        )

    async def _persist(self, send: Any, name: str, confirm: float) -> PubAck:
        """Send until it is confirmed. The message id makes repeating safe: the server stores it once."""
        started = time.monotonic()
        while True:
            try:
                ack: PubAck = await send()
                return ack
            except DuplicateInBatch:
                raise
            except Refused as error:
                if "max_payload" in str(error):
                    raise PayloadTooLargeError(str(error)) from error
                raise self.link.denied(error) from error
            except StreamFull as error:
                raise QueueFullError(
                    f"the queue is full, {name} was not accepted: {error.description}. Try again when jobs have"
                    " finished (`maestroctl top`), or raise the queue's size on the bus"
                ) from error
            except ApiError as error:
                if error.err_code in STORAGE_CODES:
                    raise QueueFullError(
                        f"the bus has no storage left, {name} was not accepted: {error.description}",
                        code="storage_full",
                    ) from error
                raise MaestroError(f"the bus did not accept {name}: {error}", code="refused") from error
            except Unavailable as error:
                if time.monotonic() - started + RETRY_PAUSE >= confirm:
                    raise BusUnreachableError(
                        f"the bus at {self.link.where} did not confirm {name} within {confirm:g} s ({error}); it may or"
                        " may not have been accepted. Submitting it again under the same id (--task-id) is safe",
                        code="unconfirmed",
                    ) from error
            except BusError as error:
                raise BusUnreachableError(str(error)) from error
            await asyncio.sleep(RETRY_PAUSE)


def _accepted(spec: messages.JobSpec, ack: PubAck) -> Accepted:
    return Accepted(str(spec.task_id), ack.seq, ack.duplicate)


def _batches(outgoing: Sequence[_Message]) -> list[list[_Message]]:
    batches: list[list[_Message]] = []
    size = 0
    for spec, message in outgoing:
        if not batches or len(batches[-1]) == MAX_BATCH or size + len(message.data) > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append((spec, message))
        size += len(message.data)
    return batches
