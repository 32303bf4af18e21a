# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole outputs of ended jobs in the bucket ``organism_logs``: a worker writes them, the conductor reads them.

Users ask the conductor. An output is stored as in a NATS object store (ADR-20): pieces first, then a record about them,
without which there is no object. Unlike there, the subjects name worker, job, attempt and stream: a worker's key can be
held to its own jobs, a second upload replaces the first piece by piece, and any piece is found without reading those
before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.bus.messages import VERSION
from organism.core import _bus

PIECE = 64 * 1024
"""Bytes of a piece, all but the last."""
LONGEST_CHARACTER = 4
"""Bytes in UTF-8."""
_LEFT_OUT = "\n[organism: {} bytes left out; the log has them]\n"
_PARTS = _LEFT_OUT.split("{}")


def notice(left_out: int) -> str:
    """What stands between head and tail in a report."""
    return _LEFT_OUT.format(left_out)


def is_whole(text: str, total: int) -> bool:
    """Is this all of an output of ``total`` bytes? The length alone cannot tell: what is no UTF-8 gets longer as text.

    A job that prints the notice itself is only asked for more, of which there is none.
    """
    return total <= len(text.encode()) and not (_PARTS[0] in text and _PARTS[1] in text)


@dataclass(frozen=True)
class OutputName:
    """Which output: one stream of one attempt, on the worker of one GPU."""

    gpu: str
    task_id: str
    attempt: int
    stream: str


class StoredOutput(msgspec.Struct, kw_only=True):
    """The record of an output whose pieces are all stored."""

    v: Literal[1] = VERSION
    ts: str
    size: int
    """Bytes, up to the worker's LOG_MAX_MB and its notice that there was more."""
    piece: int = PIECE
    digest: str = ""
    """SHA-256, in hexadecimal digits."""
    finished: str
    """The attempt's, as in its report: an id may come again when its first job is forgotten."""


@dataclass(frozen=True)
class Text:
    """A piece of an output as text: whole characters only."""

    text: str
    following: int
    """Offset in bytes of what comes next."""
    eof: bool


async def store(
    js: JetStream,
    name: OutputName,
    read: Callable[[int, int], Awaitable[bytes]],
    *,
    size: int,
    finished: str,
    pace: Callable[[int], Awaitable[None]],
) -> None:
    """Store ``size`` bytes that ``read(offset, length)`` gives, a piece at a time; ``pace(length)`` is awaited after
    each. Doing it again does no harm.

    Raises BusError, what ``read`` raises, and EOFError when that gives too little.
    """
    digest = hashlib.sha256()
    for number, offset in enumerate(range(0, size, PIECE)):
        data = await read(offset, min(PIECE, size - offset))
        if len(data) != min(PIECE, size - offset):
            raise EOFError(f"{name.stream} of {name.task_id} attempt {name.attempt} ends before byte {size}")
        digest.update(data)
        await js.publish(_bus.output_subject(name.gpu, name.task_id, name.attempt, name.stream, number), data)
        await pace(len(data))
    record = StoredOutput(ts=messages.now(), size=size, digest=digest.hexdigest(), finished=finished)
    subject = _bus.output_record_subject(name.gpu, name.task_id, name.attempt, name.stream)
    await js.publish(subject, messages.encode(record))


async def load(js: JetStream, name: OutputName, offset: int, *, finished: str) -> Text | None:
    """A piece of an output from a byte offset on. Raises BusError or BadMessage.

    None when it is not there (never stored, too old, or its room was needed for newer ones) or is that of another
    attempt of the same name.
    """
    stream = _bus.STREAM_LOGS
    found = await js.last(stream, _bus.output_record_subject(name.gpu, name.task_id, name.attempt, name.stream))
    if found is None:
        return None
    record = messages.decode(found.data, StoredOutput)
    if record.finished != finished or record.piece < 1:
        return None
    start = min(offset, record.size)
    data = b""
    # a character may lie across two pieces
    while start + len(data) < record.size and len(data) < LONGEST_CHARACTER:
        number, skip = divmod(start + len(data), record.piece)
        subject = _bus.output_subject(name.gpu, name.task_id, name.attempt, name.stream, number)
        piece = await js.last(stream, subject)
        if piece is None or len(piece.data) <= skip:
            return None
        data += piece.data[skip:]
    if start + len(data) < record.size:
        data = data[: len(data) - incomplete(data)]
    following = start + len(data)
    return Text(data.decode("utf-8", "replace"), following, following >= record.size)


def incomplete(data: bytes) -> int:
    """How many bytes at the end are the beginning of a UTF-8 character that continues later (0 to 3)."""
    for back in range(1, min(LONGEST_CHARACTER, len(data) + 1)):
        byte = data[-back]
        if byte & 0b1100_0000 == 0b1000_0000:  # a continuation: look further back
            continue
        length = 4 if byte >> 3 == 0b11110 else 3 if byte >> 4 == 0b1110 else 2 if byte >> 5 == 0b110 else 1
        return back if length > back else 0
    return 0
