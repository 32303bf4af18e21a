# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What operators want of GPUs and queues: keys of the control bucket, read at the start of a term and followed."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Collection

from organism.bus.jetstream import Stored
from organism.bus.tail import StreamTail
from organism.core import _bus
from organism.maestro.conductor import Conductor

log = logging.getLogger(__name__)

_STREAM = f"KV_{_bus.BUCKET_CONTROL}"


def subject(kind: str, name: str, shard: str = _bus.DEFAULT_SHARD) -> str:
    """Where a wish is: ``gpu.<id>``: ``{"drained": true}``, ``queue.<name>``: ``{"paused": true}``.

    A GPU's holds whichever shard it is in; a queue's is the shard's (``queue.<shard>.<name>`` but for the default one).
    """
    of_shard = "" if shard == _bus.DEFAULT_SHARD else f"{shard}."
    return f"$KV.{_bus.BUCKET_CONTROL}.{kind}.{of_shard}{name}"


class Wishes:
    """In force during one term."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self._kinds = {subject("gpu", ""): self.gpu, subject("queue", "", conductor.site.shard): self.queue}
        """By all of a subject but the name of what it is about."""

    async def known(self, last: Callable[[str, Collection[str]], Awaitable[dict[str, Stored]]]) -> None:
        """What was asked for before this term: no job may start before that is known."""
        for found, entry in (await last(_STREAM, [f"{prefix}*" for prefix in self._kinds])).items():
            prefix, _, name = found.rpartition(".")
            self._kinds[f"{prefix}."](name, entry.data)

    def follow(self) -> None:
        for prefix, wish in self._kinds.items():
            self.conductor.spawn(self._follow(prefix, wish), f"wishes {prefix}")

    async def _follow(self, prefix: str, wish: Callable[[str, bytes], None]) -> None:
        tail = StreamTail(self.conductor.js, _STREAM, filter_subjects=[f"{prefix}*"])
        try:
            async for batch in tail:
                for entry in batch:
                    wish(entry.subject.removeprefix(prefix), entry.data)
        finally:
            await tail.close()

    def gpu(self, gpu_id: str, value: bytes) -> None:
        """Set what an operator wants of a GPU; an empty or unreadable value is no wish."""
        fleet, wanted = self.conductor.fleet, _read(value)
        drained = bool(wanted.get("drained"))
        if drained and wanted.get("shard", _bus.DEFAULT_SHARD) == self.conductor.site.shard:
            fleet.gpu(gpu_id)  # also one that is not heard is shown, and can be put back into service
        (fleet.drained.add if drained else fleet.drained.discard)(gpu_id)
        gpu = fleet.gpus.get(gpu_id)
        if gpu is not None and gpu.drained != drained:
            gpu.drained = drained
            log.info("GPU %s is %s", gpu_id, "drained: it gets no new job" if drained else "back in service")
            self.conductor.pump()

    def queue(self, name: str, value: bytes) -> None:
        """Let a queue give out jobs, or not."""
        paused, wanted = self.conductor.scheduler.paused, bool(_read(value).get("paused"))
        if wanted and name not in paused:
            paused.add(name)
            log.info("queue %s is paused: none of its jobs starts", name)
        elif not wanted and name in paused:
            paused.discard(name)
            log.info("queue %s goes on", name)
            self.conductor.pump()


def _read(value: bytes) -> dict[str, object]:
    try:
        wanted = json.loads(value) if value else {}
    except ValueError:
        return {}
    return wanted if isinstance(wanted, dict) else {}
