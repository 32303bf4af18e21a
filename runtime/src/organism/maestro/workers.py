# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPUs and their workers: leases, incarnations, what each was given, and how fit it is for the next job.

No I/O and no clock: ``now`` is passed in, in seconds. Rules: docs/architecture.md ("Leases, fencing").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from organism.bus.messages import Device, Heartbeat, HeartbeatReply, Metrics, TaskRef

AHEAD = 16
"""Orders of jobs that start nothing (``messages.STARTS_NOTHING``) that a GPU may have at the same time."""
MISSES = 3
"""Heartbeats in a row that do not mention an order before it counts as lost."""
AGAIN = 1.0
"""Seconds after which an order is handed over again that a heartbeat does not mention: before, it may be on its way."""
UNKNOWN_BUSY, UNKNOWN_TEMP, STALE_PENALTY = 50.0, 60.0, 30.0
"""S1k-025."""


@dataclass(frozen=True)
class Limits:
    """Seconds, degrees Celsius and percent, as in maestro.conf."""

    heartbeat_ttl: float = 15.0
    metrics_ttl: float = 15.0
    lease: float = 9.0
    max_temp: float = 78.0
    max_busy: float = 95.0


@dataclass(slots=True, eq=False)
class Order:
    """An attempt that a GPU was given."""

    seq: int
    ref: TaskRef
    since: float
    committed: bool = False
    handed: float = float("-inf")
    """When the worker was given it last."""
    misses: int = 0
    running: bool = False
    brief: bool = False
    """Its job starts nothing."""


@dataclass(slots=True, eq=False)
class Gang:
    """The further GPUs of an attempt that has several: they are kept until its processes have certainly ended."""

    primary: str
    """Whose worker runs it."""
    incarnation: str
    others: tuple[str, ...]
    until: float
    """Its own time limit has ended its processes by then, whatever has become of the worker."""
    orphan: bool = False
    """The attempt is over for the conductor, its processes perhaps not."""


@dataclass(slots=True, eq=False)
class Gpu:
    """One GPU and the worker that serves it. ``heard`` is None until its first heartbeat under this conductor."""

    id: str
    incarnation: str = ""
    host: str = ""
    device: Device | None = None
    version: str = ""
    types: frozenset[str] = frozenset()
    heard: float | None = None
    expected_since: float = 0.0
    """When silence began to count."""
    alive: bool = False
    draining: bool = False
    """The worker is stopping."""
    drained: bool = False
    """An operator's wish."""
    metrics: Metrics | None = None
    metrics_at: float = 0.0
    orders: dict[TaskRef, Order] = field(default_factory=dict)
    stopping: dict[TaskRef, bool] = field(default_factory=dict)
    """Attempts that must end there -> whether the worker has been told."""
    settling: dict[TaskRef, Order] = field(default_factory=dict)
    """Reported; the commit of the outcome is in flight."""
    unreported: frozenset[TaskRef] = frozenset()
    """Ended there, says the worker; the report is on its way."""
    held: set[TaskRef] = field(default_factory=set)
    """Attempts on another GPU of this host that have this one too."""
    spec: int = 0
    hears: bool = False
    """Orders are handed over to it."""
    warm: frozenset[str] = frozenset()
    released_at: float = float("-inf")
    progressed: bool = False
    """An attempt was reported since the last heartbeat."""
    used: int = 0
    """Grows with each job, for turns among equals."""

    @property
    def busy(self) -> bool:
        return bool(self.orders or self.stopping or self.held)

    @property
    def roomy(self) -> bool:
        """Whether it may have one more job that starts nothing: it has such ones alone, and not too many."""
        if not self.alive or self.stopping or self.held or not 0 < len(self.orders) < AHEAD:
            return False
        return all(order.brief for order in self.orders.values())

    @property
    def model(self) -> str:
        return self.device.model if self.device else ""

    def warmth(self, inputs: Iterable[str]) -> int:
        """How many of these its cache has."""
        return sum(1 for path in inputs if path.strip("/") in self.warm)

    @property
    def vram_mb(self) -> int:
        return self.device.vram_mb if self.device else 0


@dataclass(slots=True)
class Beat:
    """What a heartbeat led to."""

    reply: HeartbeatReply
    lost: list[Order] = field(default_factory=list)
    started: list[Order] = field(default_factory=list)
    unheard: list[Order] = field(default_factory=list)
    """Perhaps never arrived: to be handed over again."""
    changed: bool = False
    """The GPU may take a job that it could not take before."""


class Fleet:
    """All GPUs that this conductor has heard of or must hear from."""

    def __init__(self, limits: Limits | None = None, epoch: int = 0) -> None:
        self.limits = limits or Limits()
        self.epoch = epoch
        self.gpus: dict[str, Gpu] = {}
        self.idle: dict[str, Gpu] = {}
        """Alive and without a job (they may still be hot or drained)."""
        self.buried: set[tuple[str, str]] = set()
        self.drained: set[str] = set()
        """GPUs of the pool that an operator wants no job on, whichever shard they are of."""
        self.elsewhere: dict[str, str] = {}
        """GPUs of other shards that were heard, and whose they are."""
        self.gangs: dict[TaskRef, Gang] = {}
        self.sizes: list[int] = []
        """All memory sizes in MiB ever seen, ascending."""
        self._turn = 0

    # ---- orders ------------------------------------------------------------------------------------------------------

    def gpu(self, gpu_id: str) -> Gpu:
        gpu = self.gpus.get(gpu_id)
        if gpu is None:
            gpu = self.gpus[gpu_id] = Gpu(gpu_id, drained=gpu_id in self.drained)
        return gpu

    def restore(self, gpu_id: str, incarnation: str, ref: TaskRef, seq: int, now: float) -> Order:
        """An attempt found in a replay: its worker gets the full time to be heard before it is declared dead."""
        gpu = self.gpu(gpu_id)
        gpu.incarnation = incarnation
        gpu.expected_since = now
        order = gpu.orders[ref] = Order(seq, ref, now, committed=True)
        return order

    def assign(self, gpu: Gpu, ref: TaskRef, seq: int, now: float, *, brief: bool = False) -> Order:
        """Reserve the GPU; the order is not yet in the stream. ``brief``: it starts nothing."""
        order = gpu.orders[ref] = Order(seq, ref, now, brief=brief)
        self._turn += 1
        gpu.used = self._turn
        self.idle.pop(gpu.id, None)
        return order

    def hold(self, ref: TaskRef, gang: Gang) -> None:
        """The attempt has these GPUs too."""
        self.gangs[ref] = gang
        for name in gang.others:
            gpu = self.gpu(name)
            gpu.held.add(ref)
            self._turn += 1
            gpu.used = self._turn
            self._refresh(gpu)

    def _let_go(self, ref: TaskRef, now: float) -> bool:
        """Its processes have ended; True when a GPU has become idle."""
        gang = self.gangs.pop(ref, None)
        idle = False
        for name in gang.others if gang is not None else ():
            gpu = self.gpu(name)
            gpu.held.discard(ref)
            gpu.released_at = now
            idle |= self._refresh(gpu)
        return idle

    def _orphan(self, refs: Iterable[TaskRef]) -> None:
        """Nobody can say that these have ended: their GPUs are kept until the worker speaks anew, or time is over."""
        for ref in refs:
            if ref in self.gangs:
                self.gangs[ref].orphan = True

    def _reunite(self, gpu: Gpu, running: set[TaskRef], now: float) -> bool:
        """What a worker's later start does not list as running has ended; True when a GPU has become idle."""
        idle = False
        for ref, gang in list(self.gangs.items()):
            spoke = gang.primary == gpu.id and gang.incarnation != gpu.incarnation and ref not in running
            if gang.orphan and (spoke or now >= gang.until):
                idle |= self._let_go(ref, now)
        return idle

    def release(self, gpu_id: str, ref: TaskRef, now: float, *, stop: bool = False) -> bool:
        """The attempt is no longer the GPU's; with ``stop`` it is busy until the worker no longer lists it.

        True when a GPU has become idle.
        """
        gpu = self.gpus.get(gpu_id)
        if gpu is None:
            return False
        order = gpu.orders.pop(ref, None)
        more = False
        if stop:
            if order is not None and gpu.alive:
                gpu.stopping[ref] = False
            else:
                self._orphan([ref])
        else:
            gpu.stopping.pop(ref, None)
            more = self._let_go(ref, now)
        gpu.released_at = now
        return self._refresh(gpu) or more

    def reported(self, gpu_id: str, ref: TaskRef, now: float) -> bool:
        """The attempt ended there and its outcome is being stored; True when a GPU has become idle."""
        gpu = self.gpu(gpu_id)
        order = gpu.orders.pop(ref, None)
        if order is not None:
            gpu.settling[ref] = order
        more = self._let_go(ref, now)
        gpu.released_at, gpu.progressed = now, True
        return self._refresh(gpu) or more

    def settled(self, gpu_id: str, ref: TaskRef, *, stored: bool) -> None:
        """The outcome is stored, or the worker has to report it again."""
        gpu = self.gpu(gpu_id)
        order = gpu.settling.pop(ref, None)
        if order is not None and not stored:
            gpu.orders[ref] = order
            self._refresh(gpu)

    def _refresh(self, gpu: Gpu) -> bool:
        """Keep ``idle`` right; True when the GPU has just entered it."""
        idle = gpu.alive and not gpu.busy
        if idle and gpu.id not in self.idle:
            self.idle[gpu.id] = gpu
            return True
        if not idle:
            self.idle.pop(gpu.id, None)
        return False

    # ---- what workers say --------------------------------------------------------------------------------------------

    def heartbeat(self, beat: Heartbeat, now: float) -> Beat:
        """The answer to a worker's sign of life, and its consequences."""
        self.elsewhere.pop(beat.gpu_id, None)
        gpu = self.gpu(beat.gpu_id)
        if (beat.gpu_id, beat.incarnation) in self.buried:
            return Beat(self._no("this start of the worker was declared dead; its jobs were given away", reset=True))
        lost: list[Order] = []
        if beat.incarnation != gpu.incarnation:
            stranger = self._stranger(gpu, beat)
            if stranger:
                return Beat(self._no(stranger))
            lost = self._replaced(gpu, beat)
        was = (gpu.alive, gpu.types, gpu.draining, gpu.vram_mb)
        gpu.incarnation, gpu.host, gpu.version = beat.incarnation, beat.host, beat.version
        gpu.device, gpu.types, gpu.draining = beat.device, frozenset(beat.types), beat.draining
        gpu.unreported, gpu.spec, gpu.hears = frozenset(beat.unreported), beat.spec, beat.hears
        gpu.heard = gpu.expected_since = now
        gpu.alive = True
        self._learn_size(beat.device.vram_mb)
        running, listed = set(beat.running), {*beat.running, *beat.unreported}
        if self._missing(gpu, {*listed, *beat.coming}, now):
            return Beat(
                self._no("an order never reached this worker; its orders were given away", reset=True),
                lost + self.bury(gpu),
            )
        started = [order for ref, order in gpu.orders.items() if ref in running and not order.running]
        for order in started:
            order.running = True
        revoked = self._revoked(gpu, running, listed, now)
        freed = self._reunite(gpu, running, now)
        freed |= self._refresh(gpu)
        reply = HeartbeatReply(
            ok=True, lease_s=self.limits.lease, epoch=self.epoch, revoked=revoked, drain=gpu.drained, hands=True
        )
        changed = freed or was != (True, gpu.types, gpu.draining, gpu.vram_mb)
        return Beat(reply, lost, started, self._unheard(gpu, now), changed)

    def _no(self, reason: str, *, reset: bool = False) -> HeartbeatReply:
        return HeartbeatReply(ok=False, epoch=self.epoch, reset=reset, reason=reason)

    def _stranger(self, gpu: Gpu, beat: Heartbeat) -> str:
        """Why this cannot be a restart of the GPU's worker, if it cannot."""
        if not gpu.alive or gpu.device is None:
            return ""
        here = (gpu.host, gpu.device.uuid or gpu.device.address)
        there = (beat.host, beat.device.uuid or beat.device.address)
        if here == there:
            return ""
        return (
            f"GPU id {gpu.id} is already served by {here[0]} ({here[1]}): ids must be unique in the pool; "
            f"give {there[0]} ({there[1]}) another one in gpus.json"
        )

    def _replaced(self, gpu: Gpu, beat: Heartbeat) -> list[Order]:
        """A new start of the worker: what it does not know is lost at once."""
        kept = {*beat.running, *beat.unreported}
        # an order whose commit is in flight is judged when the commit is known: by then it may be in the stream
        lost = [order for ref, order in gpu.orders.items() if ref not in kept and order.committed]
        for order in lost:
            del gpu.orders[order.ref]
        if gpu.incarnation:
            self.buried.add((gpu.id, gpu.incarnation))
        self._orphan([*(order.ref for order in lost), *gpu.stopping])
        gpu.stopping.clear()
        return lost

    def _missing(self, gpu: Gpu, listed: set[TaskRef], now: float) -> bool:
        # of several orders that start nothing a worker of an earlier version lists those that it has begun; the others
        # have not come up yet
        others_go_on = len(gpu.orders) > 1 and (bool(gpu.settling) or any(ref in listed for ref in gpu.orders))
        for ref, order in gpu.orders.items():
            known = ref in listed or (order.brief and not gpu.hears and (others_go_on or gpu.progressed))
            order.misses = 0 if known or not order.committed else order.misses + 1
        gpu.progressed = False
        half = self.limits.heartbeat_ttl / 2  # several heartbeats in a hurry are not a sign of loss
        return any(order.misses >= MISSES and now - order.since >= half for order in gpu.orders.values())

    def _unheard(self, gpu: Gpu, now: float) -> list[Order]:
        found = [order for order in gpu.orders.values() if gpu.hears and order.misses and now - order.handed >= AGAIN]
        for order in found:
            order.handed = now
        return found

    def _revoked(self, gpu: Gpu, running: set[TaskRef], listed: set[TaskRef], now: float) -> list[TaskRef]:
        for ref, told in list(gpu.stopping.items()):
            if told and ref not in listed:
                del gpu.stopping[ref]
                self._let_go(ref, now)
            else:
                gpu.stopping[ref] = True
        unknown = [ref for ref in running if ref not in gpu.orders and ref not in gpu.settling]
        return [*gpu.stopping, *(ref for ref in unknown if ref not in gpu.stopping)]

    def measured(self, metrics: Metrics, now: float) -> bool:
        """New metrics; True when they may make the GPU eligible."""
        gpu = self.gpu(metrics.gpu_id)
        gpu.metrics, gpu.metrics_at, gpu.warm = metrics, now, frozenset(metrics.warm)
        return gpu.id in self.idle

    def _learn_size(self, size: int) -> None:
        if size not in self.sizes:
            self.sizes = sorted([*self.sizes, size])

    # ---- silence -----------------------------------------------------------------------------------------------------

    def bury(self, gpu: Gpu) -> list[Order]:
        """Declare the worker's present incarnation dead; returns what it was given."""
        lost = [order for order in gpu.orders.values() if order.committed]
        for order in lost:
            del gpu.orders[order.ref]
        if gpu.incarnation:
            self.buried.add((gpu.id, gpu.incarnation))
        gpu.alive = False
        self._orphan([*(order.ref for order in lost), *gpu.stopping])
        gpu.stopping.clear()
        self._refresh(gpu)
        return lost

    def depart(self, beat: Heartbeat, now: float) -> tuple[Gpu, list[Order]] | None:
        """A heartbeat of another shard's GPU: when it was one of ours, it is none any more.

        Its worker has started anew to get there, so what it had here is lost as with a dead one. None when there is
        nothing to do: it was not ours, or another device has its id, or the commit of an outcome is still in flight.
        """
        self.elsewhere[beat.gpu_id] = beat.shard
        gpu = self.gpus.get(beat.gpu_id)
        if gpu is None or gpu.settling or self._stranger(gpu, beat):
            return None
        lost = self.bury(gpu)
        gpu.incarnation = beat.incarnation
        self._reunite(gpu, set(beat.running), now)
        del self.gpus[gpu.id]
        return gpu, lost

    def _counts(self, gpu: Gpu) -> bool:
        return gpu.alive or any(order.committed for order in gpu.orders.values())

    def expire(self, now: float) -> list[tuple[Gpu, list[Order]]]:
        """Workers silent for too long, and what each of them loses."""
        ttl = self.limits.heartbeat_ttl
        silent = [gpu for gpu in self.gpus.values() if self._counts(gpu) and now - gpu.expected_since >= ttl]
        return [(gpu, self.bury(gpu)) for gpu in silent]

    def next_expiry(self) -> float | None:
        times = [gpu.expected_since for gpu in self.gpus.values() if self._counts(gpu)]
        return min(times) + self.limits.heartbeat_ttl if times else None

    # ---- fitness -----------------------------------------------------------------------------------------------------

    def fresh(self, gpu: Gpu, now: float) -> bool:
        """Whether its metrics are young enough to be believed."""
        return gpu.metrics is not None and now - gpu.metrics_at <= self.limits.metrics_ttl

    def load(self, gpu: Gpu, now: float) -> float | None:
        """Busy percent that is not our own doing: a sample from the time of a job that we gave it says nothing."""
        if (
            not self.fresh(gpu, now)
            or gpu.metrics is None
            or gpu.orders
            or gpu.held
            or gpu.metrics_at <= gpu.released_at
        ):
            return None
        return gpu.metrics.gpu_busy_percent

    def absence(self, gpu_id: str) -> str:
        """Why a GPU is none of these."""
        shard = self.elsewhere.get(gpu_id)
        return "it is unknown" if shard is None else f"it is of shard {shard} (`maestroctl --shard {shard}`)"

    def obstacle(self, gpu: Gpu, now: float) -> str:
        """Why the GPU cannot be given a job now even if it had none; empty when it can (S1k-024)."""
        if not gpu.alive:
            return "its worker is not heard of" if gpu.heard is None else "its worker is dead"
        if gpu.drained:
            return "it is drained"
        if gpu.draining:
            return "its worker is stopping"
        if self.fresh(gpu, now) and gpu.metrics is not None:
            temp, busy = gpu.metrics.temp_c, self.load(gpu, now)
            if temp is not None and temp > self.limits.max_temp:
                return f"it is too hot ({temp:g} C, limit {self.limits.max_temp:g} C)"
            if busy is not None and busy > self.limits.max_busy:
                return f"it is used by others ({busy:g} %, limit {self.limits.max_busy:g} %)"
        return ""

    def score(self, gpu: Gpu, now: float) -> float:
        """S1k-025, lower is better."""
        busy, temp = self.load(gpu, now), None
        fresh = self.fresh(gpu, now)
        if fresh and gpu.metrics is not None:
            temp = gpu.metrics.temp_c
        return (
            (UNKNOWN_BUSY if busy is None else busy)
            + 0.5 * (UNKNOWN_TEMP if temp is None else temp)
            + (0.0 if fresh else STALE_PENALTY)
        )

    def roomy(self, now: float) -> list[Gpu]:
        """GPUs that may have one more job that starts nothing, those with the fewest first."""
        found = [gpu for gpu in self.gpus.values() if gpu.roomy and not self.obstacle(gpu, now)]
        found.sort(key=lambda gpu: len(gpu.orders))
        return found

    def living(self) -> Iterable[Gpu]:
        return (gpu for gpu in self.gpus.values() if gpu.alive)
