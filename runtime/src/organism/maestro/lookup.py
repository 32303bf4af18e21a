# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The last message of each of many subjects with one question a thousand (direct get, NATS ADR-31)."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg

from organism.bus.errors import BusError, Unavailable
from organism.bus.jetstream import JetStream, Stored
from organism.core import _bus

MOST = 1000
"""Subjects in one question; the server's limit is 1,024."""


async def last_many(js: JetStream, stream: str, subjects: Iterable[str], *, timeout: float = 10.0) -> dict[str, Stored]:
    """subject -> its last message, for those that have one; of several subjects some may be patterns.

    Raises Unavailable or BusError.

    In a cluster a replica may answer that lags by a moment: what is decided on it must bear that.
    """
    wanted = list(subjects)
    found: dict[str, Stored] = {}
    for at in range(0, len(wanted), MOST):
        found.update(await _ask(js, stream, wanted[at : at + MOST], timeout))
    return found


async def block(
    js: JetStream, stream: str, pattern: str, first: int, last: int, *, timeout: float = 10.0
) -> list[Stored]:
    """Messages with the sequences ``first`` to ``last`` whose subject fits, in their order; at most a thousand.

    Raises Unavailable or BusError.
    """
    wanted = min(MOST, last - first + 1)
    found = await _collect(js, stream, {"seq": first, "batch": wanted, "next_by_subj": pattern}, timeout)
    return [message for message in found if message.seq <= last]


async def other_shards(js: JetStream, shard: str) -> set[str]:
    """Shards whose submissions, records or fences are in ORG_WQ too. Raises Unavailable or BusError."""
    info = await js.api(f"STREAM.INFO.{_bus.STREAM_WQ}", {"subjects_filter": "gpu.task.>"})
    subjects = info["state"].get("subjects") or {}
    return {subject.rsplit(".", 1)[-1] for subject in subjects if not subject.startswith("gpu.task.run.")} - {shard}


async def _ask(js: JetStream, stream: str, subjects: list[str], timeout: float) -> dict[str, Stored]:
    if len(subjects) == 1:
        only = await js.last(stream, subjects[0])
        return {} if only is None else {subjects[0]: only}
    return {found.subject: found for found in await _collect(js, stream, {"multi_last": subjects}, timeout)}


async def _collect(js: JetStream, stream: str, question: dict[str, Any], timeout: float) -> list[Stored]:
    found: list[Stored] = []
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def receive(message: Msg) -> None:
        headers = dict(message.headers or {})
        status = headers.get("Status")
        if status is None:
            found.append(
                Stored(
                    seq=int(headers["Nats-Sequence"]),
                    subject=headers["Nats-Subject"],
                    data=message.data,
                    headers=headers,
                    time=datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp(),
                )
            )
        elif not over.done():
            if status in ("204", "404"):  # the end of the answer; nothing found
                over.set_result(None)
            elif status == "503":
                over.set_exception(Unavailable(f"{stream}: nobody serves it"))
            else:
                over.set_exception(BusError(f"{stream}: {status} {headers.get('Description', '')}".strip()))

    def reconnected() -> None:
        if not over.done():
            over.set_exception(Unavailable(f"{stream}: the connection was lost before the answer came"))

    inbox = f"{js.nc.inbox}.many.{secrets.token_hex(8)}"
    subscription = await js.nc.listen(inbox, receive)
    try:
        body = json.dumps(question).encode()
        await js.nc.say(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
        with js.nc.on_reconnect(reconnected):
            async with asyncio.timeout(timeout):
                await over
    except TimeoutError:
        raise Unavailable(f"{stream}: no answer within {timeout:g} s") from None
    finally:
        if not js.nc.is_closed:
            await subscription.unsubscribe()
    return found
