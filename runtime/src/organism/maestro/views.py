# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs and GPUs as clients see them: pure views of the conductor's state."""

from __future__ import annotations

from organism.bus.messages import TaskRef
from organism.bus.rpc_types import GpuInfo, GpuState, JobInfo
from organism.maestro.clock import stamp
from organism.maestro.ledger import Job
from organism.maestro.scheduler import Scheduler
from organism.maestro.workers import Fleet, Gpu


def job_info(job: Job, scheduler: Scheduler, now: float, held: str = "") -> JobInfo:
    """An unfinished job, with why it waits. ``held``: what for, when it is not for a GPU."""
    state, reason = job.state, job.reason
    if held:
        reason = held
    elif job.phase == "waiting" and not job.busy:
        blocked, reason = scheduler.why(job, now)
        if blocked:
            state = "waiting_gpu"
    return JobInfo(
        task_id=job.task_id,
        state=state,
        user=job.user,
        type=job.type,
        gpu=job.gpu,
        also=list(job.also),
        gpus=job.gpus,
        requested_gpu=job.requested_gpu,
        attempt=job.attempt,
        tries=job.tries,
        max_retries=job.max_retries,
        lost=job.lost,
        priority=job.priority,
        timeout=job.timeout,
        submitted=stamp(job.submitted),
        since=stamp(job.since),
        reason=reason,
        err=job.err,
        labels=job.labels,
        command=job.command,
        progress=job.progress.fraction if job.progress else None,
        progress_text=job.progress.text if job.progress else "",
    )


def gpu_state(gpu: Gpu, fleet: Fleet, now: float) -> GpuState:
    if not gpu.alive:
        return "dead"
    if gpu.drained or gpu.draining:
        return "drained"
    if gpu.busy:
        return "busy"
    if fleet.obstacle(gpu, now):
        return "hot"
    return "idle" if fleet.fresh(gpu, now) else "stale"


def gpu_info(gpu: Gpu, fleet: Fleet, jobs: dict[TaskRef, Job], now: float) -> GpuInfo:
    """``jobs``: what each attempt is one of."""
    state = gpu_state(gpu, fleet, now)
    info = GpuInfo(
        id=gpu.id,
        state=state,
        host=gpu.host,
        model=gpu.device.model if gpu.device else "",
        backend=gpu.device.backend if gpu.device else "",
        address=gpu.device.address if gpu.device else "",
        version=gpu.version,
        heartbeat_age=round(now - gpu.heard, 3) if gpu.heard is not None else None,
        types=sorted(gpu.types),
    )
    present = next(iter(gpu.orders), None) or next(iter(gpu.held), None)
    if present is not None:
        job = jobs.get(present)
        info.job, info.attempt = present.task_id, present.attempt
        if job is not None:
            info.user, info.progress = job.user, job.progress.fraction if job.progress else None
    if gpu.metrics is not None:
        info.metrics_age = round(now - gpu.metrics_at, 3)
        for name in ("temp_c", "gpu_busy_percent", "power_w", "fan_rpm", "vram_used_mb", "vram_total_mb"):
            setattr(info, name, getattr(gpu.metrics, name))
    if info.vram_total_mb is None and gpu.vram_mb:
        info.vram_total_mb = float(gpu.vram_mb)
    if state in ("idle", "stale"):
        info.score = fleet.score(gpu, now)
    return info
