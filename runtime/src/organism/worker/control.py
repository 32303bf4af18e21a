# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the conductor asks of a worker between two heartbeats: cancel, logs, drain, ping."""

from __future__ import annotations

from organism.bus import messages
from organism.bus.messages import Control, ControlReply, TaskRef
from organism.worker.cache_use import CacheBusyError, CacheUse
from organism.worker.output import read_log
from organism.worker.state import WorkerState
from organism.worker.store import OutsideError, TaskStore


class Controller:
    def __init__(self, state: WorkerState, store: TaskStore, cache: CacheUse) -> None:
        self._state = state
        self._store = store
        self._cache = cache

    def answer(self, data: bytes) -> ControlReply:
        """The answer to a request's payload, whatever it is."""
        try:
            request = messages.decode(data, Control)
        except messages.BadMessage as error:
            return ControlReply(ok=False, reason=f"bad request: {error}")
        if request.op == "cancel":
            return self._cancel(request)
        if request.op == "logs":
            try:
                with self._cache.hold_now():
                    return self._logs(request)
            except CacheBusyError:
                return ControlReply(ok=False, reason=f"the cache of {self._state.gpu} is being emptied; ask again")
        if request.op == "drain":
            self._state.draining = request.on
            return ControlReply(ok=True, reason="draining" if request.on else "taking orders")
        return ControlReply(ok=True, reason=self._state.incarnation)

    def _cancel(self, request: Control) -> ControlReply:
        for ref, stop in self._state.running.items():
            if ref.task_id == request.task_id and request.attempt in (0, ref.attempt):
                stop.ask("cancelled", "cancelled while it ran")
                return ControlReply(ok=True, reason=f"stopping attempt {ref.attempt}")
        if request.attempt > 0:
            # its order may still be on the way
            self._state.revoked.add(TaskRef(request.task_id, request.attempt))
        return ControlReply(ok=False, reason=f"{request.task_id} does not run on {self._state.gpu}")

    def _logs(self, request: Control) -> ControlReply:
        try:
            if request.attempt > 0:
                attempt = self._store.attempt(TaskRef(request.task_id, request.attempt))
            else:
                latest = self._store.latest(request.task_id)
                if latest is None:
                    return self._no_log(request)
                attempt = latest
            finished = attempt.ref not in self._state.running
            text, following, eof = read_log(attempt.log(request.stream), request.offset, finished=finished)
        except FileNotFoundError:
            return self._no_log(request)
        except (OSError, OutsideError) as error:
            return ControlReply(ok=False, reason=f"log of {request.task_id} cannot be read: {error}")
        return ControlReply(ok=True, text=text, next_offset=following, eof=eof)

    def _no_log(self, request: Control) -> ControlReply:
        return ControlReply(
            ok=False,
            reason=f"{self._state.gpu} keeps no log of {request.task_id} (it never ran here, or is cleaned up)",
        )
