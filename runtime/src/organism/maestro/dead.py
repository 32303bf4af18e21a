# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dead letters: listed newest first, and run again as new jobs of the same user."""

from __future__ import annotations

import base64
import binascii
import secrets

from organism.bus import messages
from organism.bus.jetstream import Stored
from organism.bus.messages import BadMessage, DeadLetter, JobSpec
from organism.bus.rpc_types import (
    CallError,
    DeadEntry,
    DeadListReply,
    DeadListRequest,
    DeadReplayReply,
    DeadReplayRequest,
)
from organism.core import _bus
from organism.maestro.conductor import Conductor

SHOWN = 4_000
"""Characters of a payload in a list."""
LOOKED_AT = 5_000
"""Letters that a list goes back at most."""


class Dead:
    """The operations on ORG_DLQ."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    def _may(self, user: str, letter: DeadLetter) -> bool:
        site = self.conductor.site
        return letter.shard == site.shard and (user == letter.user or site.policy.is_operator(user))

    async def letters(self, user: str, request: DeadListRequest) -> DeadListReply:
        js = self.conductor.js
        state = (await js.info(_bus.STREAM_DLQ))["state"]
        first, last = int(state["first_seq"]), int(state["last_seq"])
        found: list[DeadEntry] = []
        for seq in range(last, max(first, last - LOOKED_AT + 1) - 1, -1):
            stored = await js.get(_bus.STREAM_DLQ, seq)
            letter = _letter(stored) if stored is not None else None
            if letter is None or not self._may(user, letter):
                continue
            if len(found) == request.limit:
                return DeadListReply(dead=found, more=True)
            found.append(
                DeadEntry(
                    seq=seq,
                    ts=letter.ts,
                    task_id=letter.task_id,
                    user=letter.user,
                    reason=letter.reason,
                    payload=letter.payload[:SHOWN],
                    encoding=letter.encoding,
                    enq_seq=letter.enq_seq,
                )
            )
        return DeadListReply(dead=found, more=first < last - LOOKED_AT + 1)

    async def replay(self, user: str, request: DeadReplayRequest) -> DeadReplayReply:
        js, site = self.conductor.js, self.conductor.site
        if (request.seq is None) == (request.task_id is None):
            raise CallError("bad_request", "name one of seq and task_id")
        if request.seq is not None:
            stored, what = await js.get(_bus.STREAM_DLQ, request.seq), f"dead letter {request.seq}"
        else:
            subject = _bus.dead_subject(request.task_id or "")
            stored, what = await js.last(_bus.STREAM_DLQ, subject), f"dead letter of {request.task_id}"
        letter = _letter(stored) if stored is not None else None
        if letter is None or not self._may(user, letter):
            raise CallError("not_found", f"no {what}")
        spec = _spec(letter, what)
        spec.task_id = f"replay-{secrets.token_hex(8)}"
        spec.replay_of = letter.task_id
        subject = _bus.enqueue_subject(letter.user, site.shard)
        await js.publish(subject, messages.encode(spec), msg_id=f"{letter.user}:{spec.task_id}")
        return DeadReplayReply(task_id=spec.task_id)


def _letter(stored: Stored) -> DeadLetter | None:
    try:
        return messages.decode(stored.data, DeadLetter)
    except BadMessage:
        return None  # not one of ours: nothing that could be shown or run


def _spec(letter: DeadLetter, what: str) -> JobSpec:
    try:
        raw = base64.b64decode(letter.payload) if letter.encoding == "base64" else letter.payload.encode()
        spec = messages.decode(raw, JobSpec)
        messages.check_spec(spec)
    except (BadMessage, binascii.Error, ValueError) as problem:
        raise CallError("conflict", f"{what} cannot be run: {problem}") from problem
    return spec
