# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which waiting job goes to which GPU next: by priority, age, fair turns and arrival; the fittest GPU for it.

Jobs with the same constraints share a line, so a decision looks at the heads of the few lines that an idle GPU could
serve, and a hundred thousand waiting jobs cost an event nothing. No I/O and no clock: ``now`` is passed in, in seconds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Container, Generator, Hashable, Iterable, Iterator
from typing import NamedTuple

from organism.bus.messages import STARTS_NOTHING
from organism.maestro.ledger import Job
from organism.maestro.lines import Class, Entry, Line
from organism.maestro.shares import Order, Shares
from organism.maestro.slices import sliced
from organism.maestro.turns import Turns, entry_of
from organism.maestro.workers import Fleet, Gpu


class Choice(NamedTuple):
    """A decision; ``reason`` tells why a job went before others that strict order would have put first.

    It is empty when nobody was passed over who could have had the GPU. Else, for each cause there was, it names the
    first in strict order whom that cause held back.

    Of a job that wants several GPUs ``job.also`` names the others.
    """

    job: Job
    gpu: Gpu
    reason: str


class _Best(NamedTuple):
    rank: Entry
    line: Line
    gpus: list[Gpu]
    """The first one's worker runs it; empty when not enough are free yet."""
    kept: list[Gpu]
    """Free ones that are kept for it meanwhile."""
    job: Job


class Scheduler:
    """The waiting jobs. The caller says what becomes of a job that :meth:`decide` hands out."""

    def __init__(
        self, fleet: Fleet, *, announce_after: float = 5.0, order: Order | None = None, shares: Shares | None = None
    ) -> None:
        self.fleet = fleet
        self.order = order or Order()
        self.shares = shares or Shares(half_life=self.order.half_life)
        self.paused: set[str] = set()
        """Names of queues that give out no jobs."""
        self.announce_after = announce_after
        self._lines: dict[str | None, dict[Class, Line]] = {}
        self._ready: dict[int, tuple[Job, Line]] = {}
        self._delayed: dict[int, Job] = {}
        self._timers: list[tuple[float, int]] = []
        self._young: deque[tuple[float, int]] = deque()
        self._sizes = tuple(fleet.sizes)

    def __len__(self) -> int:
        return len(self._ready) + len(self._delayed)

    # ---- jobs come and go --------------------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        """A job waits, for a GPU or first for its time to come."""
        if job.not_before > now:
            self._delayed[job.seq] = job
            heapq.heappush(self._timers, (job.not_before, job.seq))
            return
        self._enter(job)
        self._young.append((now + self.announce_after, job.seq))

    def remove(self, job: Job) -> bool:
        """The job waits no longer; False when it did not."""
        return self._delayed.pop(job.seq, None) is not None or self._leave(job)

    def __contains__(self, job: Job) -> bool:
        return job.seq in self._ready or job.seq in self._delayed

    def _enter(self, job: Job) -> None:
        key = self._class(job)
        lines = self._lines.setdefault(key.pin, {})
        line = lines.get(key)
        if line is None:
            line = lines[key] = Line(key, self._ready, aged=bool(self.order.aging))
        self._ready[job.seq] = (job, line)
        line.add(job, entry_of(job, self.order))

    def _leave(self, job: Job) -> bool:
        entry = self._ready.pop(job.seq, None)
        if entry is None:
            return False
        line = entry[1]
        line.left()
        if not line.waiting:
            lines = self._lines[line.key.pin]
            del lines[line.key]
            if not lines:
                del self._lines[line.key.pin]
        return True

    def _class(self, job: Job) -> Class:
        size = self._size(job.min_vram_mb)
        model = job.gpu_model.lower() if job.gpu_model else None
        return Class(
            job.requested_gpu, job.type, size, job.excluded, job.user, job.queue, job.gpus, model, job.level
        )  # fmt: skip

    def _size(self, min_vram_mb: int) -> int:
        return bisect_left(self._sizes, min_vram_mb) if min_vram_mb else 0

    def _rebuild(self) -> None:
        """A memory size was learned, so classes are cut finer: a line stays as it is unless the cut goes through it."""
        self._sizes = tuple(self.fleet.sizes)
        lines = [line for pinned in self._lines.values() for line in pinned.values()]
        self._lines.clear()
        cut: set[Line] = set()
        for line in lines:
            size = self._size(line.least)
            if size != self._size(line.most):
                cut.add(line)
                continue
            line.key = line.key._replace(size=size)
            self._lines.setdefault(line.key.pin, {})[line.key] = line
        jobs = [job for job, line in self._ready.values() if line in cut] if cut else []
        for job in jobs:
            del self._ready[job.seq]
            self._enter(job)

    # ---- time --------------------------------------------------------------------------------------------------------

    def wake(self, now: float) -> bool:
        """Let delayed jobs in whose time has come; True when there were some."""
        woke = False
        while self._timers and self._timers[0][0] <= now:
            _, seq = heapq.heappop(self._timers)
            job = self._delayed.get(seq)
            if job is not None and job.not_before <= now:
                del self._delayed[seq]
                self._enter(job)
                self._young.append((now + self.announce_after, seq))
                woke = True
        return woke

    def overdue(self, now: float, limit: int = 250) -> list[Job]:
        """Jobs that have waited for a GPU so long that they are to be announced as waiting_gpu, each once a wait.

        ``limit``: at a time, since the event loop waits meanwhile.
        """
        found: list[Job] = []
        while self._young and self._young[0][0] <= now and len(found) < limit:
            _, seq = self._young.popleft()
            entry = self._ready.get(seq)
            if entry is not None:
                found.append(entry[0])
        return found

    def next_timer(self) -> float | None:
        times = [queue[0][0] for queue in (self._timers, self._young) if queue]
        return min(times) if times else None

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> Iterator[Choice]:
        """What to dispatch, best first. The job has left the queue; the caller must assign or return it at once."""
        if len(self._sizes) != len(self.fleet.sizes):
            self._rebuild()
        if not self._ready:
            return
        turns = Turns(self.shares, self.order, now)
        if self.fleet.idle and (yield from self._to_idle(turns, now)):
            return  # GPUs are kept for a job that wants several
        yield from self._in_advance(turns, now)

    def _to_idle(self, turns: Turns, now: float) -> Generator[Choice, None, bool]:
        """To GPUs that have nothing; True when some are kept for a job that wants several."""
        fleet = self.fleet
        idle = [gpu for gpu in fleet.idle.values() if not fleet.obstacle(gpu, now)]
        idle.sort(key=lambda gpu: (fleet.score(gpu, now), gpu.used, gpu.id))
        waiting: dict[Class, Job] = {}
        while idle and self._ready:
            best, passed = self._best(idle, turns, now, waiting)
            if best is None:
                break
            if not best.gpus:
                # what is free is kept for it, or jobs for one GPU would go first for ever
                waiting[best.line.key] = best.line.first()
                idle = [gpu for gpu in idle if gpu not in best.kept]
                continue
            self._leave(best.job)
            idle = [gpu for gpu in idle if gpu not in best.gpus]
            turns.moved(best.job.user)
            best.job.also = tuple(gpu.id for gpu in best.gpus[1:])
            reason = turns.reason(best.job, passed, waiting.values()) if passed or waiting else ""
            yield Choice(best.job, best.gpus[0], reason)
        return bool(waiting)

    def _in_advance(self, turns: Turns, now: float) -> Iterator[Choice]:
        """Jobs that start nothing also to GPUs that have nothing but such ones.

        They are over in a moment: so a group of them takes one commit, and nobody waits for them who would not wait for
        one. As soon as a job of another kind is next, no more of them go: the GPU will be idle when they have ended.
        """
        room = self.fleet.roomy(now)
        while room and self._ready:
            best, passed = self._best(room, turns, now, ())
            if best is None or not best.gpus or best.line.key.gpus > 1 or best.job.type not in STARTS_NOTHING:
                return
            gpu = best.gpus[0]
            self._leave(best.job)
            turns.moved(best.job.user)
            best.job.also = ()
            yield Choice(best.job, gpu, turns.reason(best.job, passed, ()) if passed else "")
            room.remove(gpu)
            if gpu.roomy:
                room.append(gpu)

    def _best(
        self, idle: list[Gpu], turns: Turns, now: float, waiting: Container[Class]
    ) -> tuple[_Best | None, list[Job]]:
        """The decision, and whom strict order puts before it: the first of those who may start, and of the others.

        ``waiting`` classes have had their turn.
        """
        best: _Best | None = None
        passed: dict[bool, tuple[tuple[int, int], Job]] = {}
        for line in self._candidates(idle):
            key = line.key
            if key.queue in self.paused or key in waiting:
                continue
            entry = line.head()
            job = self._ready[entry[2]][0]
            first = line.first() if line.aged else job
            barred, place = bool(turns.bar(key.user)), (-first.priority, first.seq)
            rank = turns.rank(entry, key.user)
            ahead = barred not in passed or place < passed[barred][0]
            if not ahead and (barred or (best is not None and rank >= best.rank)):
                continue
            gpus, kept = self._place(key, job, idle, now)
            if not gpus and not kept:
                continue
            if ahead:
                passed[barred] = (place, first)
            if not barred and (best is None or rank < best.rank):
                best = _Best(rank, line, gpus, kept, job)
        if best is None:
            return None, []
        mine = (-best.job.priority, best.job.seq)
        return best, [first for place, first in passed.values() if place < mine]

    def _place(self, key: Class, job: Job, idle: list[Gpu], now: float) -> tuple[list[Gpu], list[Gpu]]:
        """(GPUs for the job, the fittest first; else those to be kept for it), of the idle ones in their order."""
        if job.inputs:
            # the sort is stable: among equally warm ones the fittest
            idle = sorted(idle, key=lambda gpu: -gpu.warmth(job.inputs))
        if key.gpus == 1:
            gpu = next((gpu for gpu in idle if self.fits(key, gpu, now)), None)
            return ([] if gpu is None else [gpu]), []
        for first in idle:
            if self.fits(key, first, now):
                others = [gpu for gpu in self._beside(key, first.host, idle) if gpu is not first]
                if len(others) >= key.gpus - 1:
                    return [first, *others[: key.gpus - 1]], []
        host = self._host_for(key, idle, now)
        return [], [] if host is None else self._beside(key, host, idle)[: key.gpus]

    def _beside(self, key: Class, host: str, gpus: Iterable[Gpu]) -> list[Gpu]:
        """Those of a host that are of the kind wanted, whichever was asked for to run it."""
        kind = key._replace(pin=None)
        return [gpu for gpu in gpus if gpu.host == host and self.suits(kind, gpu)]

    def _host_for(self, key: Class, idle: list[Gpu], now: float) -> str | None:
        """Where enough GPUs will be free once their jobs have ended: the host with the most idle ones."""
        able = [gpu for gpu in self.fleet.living() if not self.fleet.obstacle(gpu, now)]
        hosts = {gpu.host for gpu in able if self.suits(key, gpu)}
        enough = [host for host in sorted(hosts) if len(self._beside(key, host, able)) >= key.gpus]
        return max(enough, key=lambda host: len(self._beside(key, host, idle)), default=None)

    def _candidates(self, idle: list[Gpu]) -> Iterator[Line]:
        for pin in (None, *(gpu.id for gpu in idle)):
            yield from self._lines.get(pin, {}).values()

    def suits(self, key: Class, gpu: Gpu) -> bool:
        """Whether the GPU is of the kind wanted, whatever its state."""
        if key.pin is not None and key.pin != gpu.id:
            return False
        if key.type not in gpu.types or gpu.spec < key.level:
            return False
        if key.model is not None and key.model not in gpu.model.lower():
            return False
        return key.size == 0 or (key.size < len(self._sizes) and gpu.vram_mb >= self._sizes[key.size])

    def fits(self, key: Class, gpu: Gpu, now: float) -> bool:
        """Whether a job of this class may go there now: the GPU where it failed last only when no other would do."""
        if not self.suits(key, gpu):
            return False
        if key.excluded != gpu.id:
            return True
        return not any(
            other is not gpu and self.suits(key, other) and not self.fleet.obstacle(other, now)
            for other in self.fleet.living()
        )

    def kind(self, job: Job) -> Hashable:
        """Jobs of one kind that are ready wait for the same reason."""
        return (self._class(job), job.min_vram_mb)

    def misfit(self, job: Job, gpu: Gpu) -> str:
        """Why the GPU is not of the kind that the job wants; empty when it is."""
        if self.suits(self._class(job), gpu):
            return ""
        if job.requested_gpu not in (None, gpu.id):
            return f"the job wants {job.requested_gpu}"
        if not gpu.types:
            return "its worker has not been heard of"
        if job.type not in gpu.types:
            return f"it does not offer jobs of type {job.type}"
        if gpu.spec < job.level:
            return "its worker is of an earlier version, which cannot read this job"
        if job.gpu_model is not None and job.gpu_model.lower() not in gpu.model.lower():
            return f"it is a {gpu.model or 'GPU of unknown model'}, the job wants {job.gpu_model}"
        return f"it has {gpu.vram_mb} MiB of memory, the job wants {job.min_vram_mb}"

    def may_take(self, job: Job, gpu: Gpu, now: float) -> bool:
        """Whether a decision could give the job to the GPU."""
        return self.fits(self._class(job), gpu, now)

    async def ahead(self, job: Job) -> list[Job]:
        """Jobs that wait, go before this one by the queue's order, and could use a GPU that it could use."""
        mine = entry_of(job, self.order)
        able = [gpu for gpu in self.fleet.living() if self.suits(self._class(job), gpu)]
        rivals: dict[Class, bool] = {}
        found = []
        async for other, line in sliced(list(self._ready.values())):
            key = line.key
            if other is job or entry_of(other, self.order) > mine or key.queue in self.paused:
                continue
            if key not in rivals:
                rivals[key] = any(self.suits(key, gpu) for gpu in able)
            if rivals[key]:
                found.append(other)
        return found

    def why(self, job: Job, now: float) -> tuple[bool, str]:
        """(whether no suitable GPU could take it even if all were idle, one sentence why the job waits)."""
        if job.not_before > now:
            return False, f"waits {job.not_before - now:.0f} s more before its next try" if job.tries or job.lost else (
                f"is delayed for {job.not_before - now:.0f} s more"
            )
        key = self._class(job)
        if job.queue in self.paused:
            return False, f"queue {job.queue} is paused by an operator"
        bar = self.shares.bar(job.user)
        if bar:
            return False, bar
        if job.requested_gpu is not None:
            gpu = self.fleet.gpus.get(job.requested_gpu)
            obstacle = self.fleet.absence(job.requested_gpu) if gpu is None else self.fleet.obstacle(gpu, now)
            if obstacle:
                return True, f"waits for GPU {job.requested_gpu}: {obstacle}"
        living = list(self.fleet.living())
        if not living:
            return True, "no worker is heard of"
        suitable = [gpu for gpu in living if self.suits(key, gpu)]
        if not suitable:
            return True, self._unsuited(job, living)
        able = [gpu for gpu in suitable if not self.fleet.obstacle(gpu, now)]
        if not able:
            reasons = "; ".join(f"{gpu.id}: {self.fleet.obstacle(gpu, now)}" for gpu in suitable[:5])
            return True, f"no suitable GPU can take it ({reasons}{'; ...' if len(suitable) > 5 else ''})"
        if key.gpus > 1:
            return self._apart(key, suitable, now)
        return False, f"all suitable GPUs are busy ({len(able)})"

    def _apart(self, key: Class, suitable: list[Gpu], now: float) -> tuple[bool, str]:
        """Of a job that wants several GPUs of one host."""
        living = list(self.fleet.living())
        counts = {gpu.host: len(self._beside(key, gpu.host, living)) for gpu in suitable}
        most = max(counts, key=lambda host: (counts[host], host))
        if counts[most] < key.gpus:
            return True, f"no host has {key.gpus} GPUs that suit (the most are {counts[most]} on {most})"
        able = [gpu for gpu in living if not self.fleet.obstacle(gpu, now)]
        ready = {gpu.host: len(self._beside(key, gpu.host, able)) for gpu in suitable}
        most = max(ready, key=lambda host: (ready[host], host))
        if ready[most] < key.gpus:
            return True, f"no host has {key.gpus} suitable GPUs that can take it now (the most are {ready[most]})"
        free = sum(1 for gpu in self._beside(key, most, able) if not gpu.busy)
        return False, f"waits for {key.gpus} GPUs of one host at the same time; {free} are free on {most}"

    def _unsuited(self, job: Job, living: list[Gpu]) -> str:
        if not any(job.type in gpu.types for gpu in living):
            return f"no worker offers jobs of type {job.type}"
        if not any(job.type in gpu.types and gpu.spec >= job.level for gpu in living):
            return "no worker is of a version that can read this job: upgrade the workers"
        if job.gpu_model is not None and not any(job.gpu_model.lower() in gpu.model.lower() for gpu in living):
            models = ", ".join(sorted({gpu.model or "unknown" for gpu in living})[:5])
            return f"no GPU is a {job.gpu_model} (there are: {models})"
        if job.requested_gpu is not None:
            return f"GPU {job.requested_gpu} does not offer type {job.type} with {job.min_vram_mb} MiB"
        largest = max(gpu.vram_mb for gpu in living)
        return f"no GPU has {job.min_vram_mb} MiB of memory (the largest has {largest})"
