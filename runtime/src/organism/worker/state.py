# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a worker knows about itself, and how it says so."""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec

from organism._version import VERSION
from organism.bus import messages
from organism.bus.messages import Device, Heartbeat, Identifier, Progress, TaskRef
from organism.core._bus import DEFAULT_SHARD
from organism.core._gpu_metrics import Readings
from organism.worker.runner import Stop

REMEMBERED = 1024
"""Attempts that are remembered as finished, so that one that is handed over again is not run."""


class WorkerLog(msgspec.Struct, omit_defaults=True, kw_only=True):
    """On ``gpu.worker.log.<gpu>``: what an operator would want to know afterwards.

    ``event`` is ``start``, ``shutdown``, ``reset``, ``bad_order``, ``dropped``, ``refused``, ``stuck`` or ``leftover``.
    """

    v: int = messages.VERSION
    ts: str
    gpu_id: Identifier
    incarnation: str
    event: str
    text: str = ""
    task_id: str = ""
    attempt: int = 0


@dataclass
class WorkerState:
    """One worker, in memory; what must survive it is in the jobs' directories."""

    gpu: str
    host: str
    device: Device
    workdir: str
    nats_url: str
    types: list[str]
    shard: str = DEFAULT_SHARD
    incarnation: str = ""
    running: dict[TaskRef, Stop] = field(default_factory=dict)
    unreported: set[TaskRef] = field(default_factory=set)
    coming: set[TaskRef] = field(default_factory=set)
    """Orders in hand, until they are over or reported elsewhere."""
    revoked: set[TaskRef] = field(default_factory=set)
    draining: bool = False
    stopping: bool = False
    epoch: int = 0
    """Of the conductor that renewed the lease last."""
    handed: bool = False
    """The conductor hands orders over; one of an earlier version would leave them where nobody reads."""
    stuck: str = ""
    """Why this worker must not take another order (a process that cannot be killed holds the GPU)."""
    warm: list[str] = field(default_factory=list)
    """Paths in the cache, as far as they may be somebody's inputs."""
    progress: dict[TaskRef, Progress] = field(default_factory=dict)
    """What the running attempts said last."""
    _finished: OrderedDict[TaskRef, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Become a new incarnation: nothing given to the one before counts any more."""
        self.incarnation = secrets.token_hex(8)
        self.revoked.clear()
        self._finished.clear()

    def finished(self, ref: TaskRef) -> None:
        self._finished[ref] = None
        while len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)

    def is_finished(self, ref: TaskRef) -> bool:
        return ref in self._finished

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            ts=messages.now(),
            gpu_id=self.gpu,
            incarnation=self.incarnation,
            host=self.host,
            pid=os.getpid(),
            version=VERSION,
            device=self.device,
            workdir=self.workdir,
            nats_url=self.nats_url,
            types=self.types,
            running=list(self.running),
            unreported=_sorted(self.unreported),
            draining=self.draining or self.stopping or bool(self.stuck) or not self.handed,
            spec=messages.SPEC_LEVEL,
            progress=[self.progress[ref] for ref in self.running if ref in self.progress],
            shard=self.shard,
            hears=True,
            # what a stuck worker has in hand it will never begin
            coming=[] if self.stuck else _sorted(self.coming - set(self.running)),
        )

    def log(self, event: str, text: str = "", ref: TaskRef | None = None) -> WorkerLog:
        return WorkerLog(
            ts=messages.now(),
            gpu_id=self.gpu,
            incarnation=self.incarnation,
            event=event,
            text=text,
            task_id=ref.task_id if ref else "",
            attempt=ref.attempt if ref else 0,
        )

    def metrics(self, readings: Readings) -> messages.Metrics:
        return messages.Metrics(
            ts=messages.now(),
            gpu_id=self.gpu,
            incarnation=self.incarnation,
            backend=self.device.backend,
            pci=self.device.address,
            gpu_busy_percent=readings.gpu_busy_percent,
            mem_busy_percent=readings.mem_busy_percent,
            temp_c=readings.temp_c,
            fan_rpm=readings.fan_rpm,
            power_w=readings.power_w,
            vram_total_mb=readings.vram_total_mb,
            vram_used_mb=readings.vram_used_mb,
            warm=self.warm,
        )


def _sorted(refs: set[TaskRef]) -> list[TaskRef]:
    return sorted(refs, key=lambda ref: (ref.task_id, ref.attempt))
