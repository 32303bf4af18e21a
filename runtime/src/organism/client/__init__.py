# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Python client of the GPU pool: submit jobs, wait for their results, look at the pool and steer it.

    from organism.client import Maestro

    with Maestro() as maestro:                      # bus, user and key from client.toml or the environment
        job = maestro.submit(cmd=["python3", "train.py"], timeout=3600, min_vram_mb=6000)
        result = job.result()
        print(result.ok, result.stdout)

:class:`AsyncMaestro` is the same for asyncio. docs/client.md has more.
"""

from __future__ import annotations

from organism.client._aio import AsyncJobHandle, AsyncMaestro
from organism.client._errors import (
    AccessDeniedError,
    BusUnreachableError,
    ConductorUnreachableError,
    ConflictError,
    InvalidJobError,
    JobFailedError,
    MaestroError,
    NotFoundError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
    ValueMismatchError,
    WaitTimeoutError,
)
from organism.client._jobfile import JobFileError
from organism.client._progress import progress
from organism.client._results import LogChunk, Result
from organism.client._sync import JobHandle, Maestro

__all__ = [
    "AccessDeniedError",
    "AsyncJobHandle",
    "AsyncMaestro",
    "BusUnreachableError",
    "ConductorUnreachableError",
    "ConflictError",
    "InvalidJobError",
    "JobFailedError",
    "JobFileError",
    "JobHandle",
    "LogChunk",
    "Maestro",
    "MaestroError",
    "NotFoundError",
    "PayloadTooLargeError",
    "QueueFullError",
    "RequestError",
    "Result",
    "ValueMismatchError",
    "WaitTimeoutError",
    "progress",
]
