# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client for programs without asyncio: the same calls, run on one loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from organism.bus import messages, rpc_types
from organism.client._aio import CONFIRM, PATIENCE, AsyncJobHandle, AsyncMaestro, Stream
from organism.client._results import LogChunk, Result
from organism.core._client_settings import ClientSettings

T = TypeVar("T")


class Maestro:
    """As :class:`AsyncMaestro`, blocking. Safe to share between threads; close it, or use it in a ``with``.

    Raises MaestroError (code ``settings``) at once when it does not know the bus or the user, BusUnreachableError or
    AccessDeniedError when it cannot connect.
    """

    def __init__(
        self,
        settings: ClientSettings | None = None,
        *,
        context: str | None = None,
        shard: str | None = None,
        patience: float = PATIENCE,
        listen: bool = True,
    ) -> None:
        self._aio = AsyncMaestro(settings, context=context, shard=shard, patience=patience, listen=listen)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="organism-client", daemon=True)
        self._thread.start()
        try:
            self._run(self._aio.connect())
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        if not self._loop.is_closed():
            try:
                self._run(self._aio.close())
            finally:
                self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C here ends the call there
            raise

    def _iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        async def step() -> tuple[bool, T | None]:
            try:
                return True, await anext(source)
            except StopAsyncIteration:
                return False, None

        async def end() -> None:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()

        try:
            while True:
                more, item = self._run(step())
                if not more:
                    return
                yield item  # type: ignore[misc]  # an item when there is more
        finally:
            self._run(end())

    # ---- submit ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        cmd: Sequence[str] | None = None,
        *,
        shell: str | None = None,
        python: str | Path | None = None,
        argv: Sequence[str] | None = None,
        type: str | None = None,
        args: dict[str, Any] | None = None,
        task_id: str | None = None,
        gpu: str | None = None,
        min_vram_mb: int | None = None,
        gpus: int | None = None,
        gpu_model: str | None = None,
        inputs: Sequence[str] | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        priority: int | None = None,
        delay: float | None = None,
        after: Sequence[str] | None = None,
        deadline: float | None = None,
        unique: str | None = None,
        queue: str | None = None,
        labels: dict[str, str] | None = None,
        confirm: float = CONFIRM,
    ) -> JobHandle:
        """See :meth:`AsyncMaestro.submit`."""
        handle = self._run(
            self._aio.submit(
                cmd,
                shell=shell,
                python=python,
                argv=argv,
                type=type,
                args=args,
                task_id=task_id,
                gpu=gpu,
                min_vram_mb=min_vram_mb,
                gpus=gpus,
                gpu_model=gpu_model,
                inputs=inputs,
                cwd=cwd,
                env=env,
                timeout=timeout,
                max_retries=max_retries,
                priority=priority,
                delay=delay,
                after=after,
                deadline=deadline,
                unique=unique,
                queue=queue,
                labels=labels,
                confirm=confirm,
            )
        )
        return JobHandle(self, handle)

    def submit_many(
        self, jobs: Iterable[dict[str, Any] | messages.JobSpec], *, confirm: float = CONFIRM
    ) -> list[JobHandle]:
        """See :meth:`AsyncMaestro.submit_many`."""
        return [JobHandle(self, handle) for handle in self._run(self._aio.submit_many(jobs, confirm=confirm))]

    def submit_file(self, path: str | Path, *, confirm: float = CONFIRM) -> list[JobHandle]:
        """See :meth:`AsyncMaestro.submit_file`."""
        return [JobHandle(self, handle) for handle in self._run(self._aio.submit_file(path, confirm=confirm))]

    def submit_array(self, count: int, *, confirm: float = CONFIRM, **fields: Any) -> list[JobHandle]:
        """See :meth:`AsyncMaestro.submit_array`."""
        handles = self._run(self._aio.submit_array(count, confirm=confirm, **fields))
        return [JobHandle(self, handle) for handle in handles]

    def job(self, task_id: str) -> JobHandle:
        """A handle for a job submitted earlier or elsewhere."""
        return JobHandle(self, self._aio.job(task_id))

    # ---- results -----------------------------------------------------------------------------------------------------

    def wait(self, jobs: Iterable[str | JobHandle], *, timeout: float | None = None) -> dict[str, Result]:
        """See :meth:`AsyncMaestro.wait`."""
        return self._run(self._aio.wait(_inner(jobs), timeout=timeout))

    def as_completed(self, jobs: Iterable[str | JobHandle], *, timeout: float | None = None) -> Iterator[Result]:
        """See :meth:`AsyncMaestro.as_completed`."""
        return self._iterate(self._aio.as_completed(_inner(jobs), timeout=timeout))

    def result(self, task_id: str) -> Result:
        """See :meth:`AsyncMaestro.result`."""
        return self._run(self._aio.result(task_id))

    # ---- look --------------------------------------------------------------------------------------------------------

    def status(self, task_id: str) -> rpc_types.JobInfo:
        """See :meth:`AsyncMaestro.status`."""
        return self._run(self._aio.status(task_id))

    def list(
        self, *, state: str | None = None, user: str | None = None, limit: int = 100, all: bool = False
    ) -> rpc_types.ListReply:
        """See :meth:`AsyncMaestro.list`."""
        return self._run(self._aio.list(state=state, user=user, limit=limit, all=all))

    def logs(
        self, task_id: str, *, stream: Stream = "stdout", follow: bool = False, offset: int = 0
    ) -> Iterator[LogChunk]:
        """See :meth:`AsyncMaestro.logs`."""
        return self._iterate(self._aio.logs(task_id, stream=stream, follow=follow, offset=offset))

    def states(self, task_id: str) -> Iterator[messages.StateEvent]:
        """See :meth:`AsyncMaestro.states`."""
        return self._iterate(self._aio.states(task_id))

    def progress(self, task_id: str) -> Iterator[rpc_types.JobInfo]:
        """See :meth:`AsyncMaestro.progress`."""
        return self._iterate(self._aio.progress(task_id))

    def explain(self, task_id: str) -> rpc_types.ExplainReply:
        """See :meth:`AsyncMaestro.explain`."""
        return self._run(self._aio.explain(task_id))

    def history(
        self,
        *,
        user: str | None = None,
        all: bool = False,
        state: str | None = None,
        label: str | None = None,
        since: str | None = None,
        limit: int = 100,
    ) -> Sequence[rpc_types.HistoryEntry]:
        """See :meth:`AsyncMaestro.history`."""
        return self._run(self._aio.history(user=user, all=all, state=state, label=label, since=since, limit=limit))

    def top(self) -> rpc_types.TopReply:
        """See :meth:`AsyncMaestro.top`."""
        return self._run(self._aio.top())

    def info(self) -> rpc_types.InfoReply:
        """See :meth:`AsyncMaestro.info`."""
        return self._run(self._aio.info())

    # ---- steer -------------------------------------------------------------------------------------------------------

    def cancel(self, task_id: str) -> rpc_types.JobInfo:
        """See :meth:`AsyncMaestro.cancel`."""
        return self._run(self._aio.cancel(task_id))

    def drain(self, gpu: str, on: bool = True) -> rpc_types.GpuInfo:
        """See :meth:`AsyncMaestro.drain`."""
        return self._run(self._aio.drain(gpu, on))

    def pause(self, queue: str = "default", on: bool = True) -> Sequence[str]:
        """See :meth:`AsyncMaestro.pause`."""
        return self._run(self._aio.pause(queue, on))

    def dead(self, limit: int = 100) -> rpc_types.DeadListReply:
        """See :meth:`AsyncMaestro.dead`."""
        return self._run(self._aio.dead(limit))

    def replay(self, task_id: str | None = None, *, seq: int | None = None) -> JobHandle:
        """See :meth:`AsyncMaestro.replay`."""
        return JobHandle(self, self._run(self._aio.replay(task_id, seq=seq)))


@dataclass(frozen=True)
class JobHandle:
    """A job, as :class:`AsyncJobHandle`, blocking."""

    maestro: Maestro
    inner: AsyncJobHandle

    @property
    def task_id(self) -> str:
        return self.inner.task_id

    @property
    def duplicate(self) -> bool:
        """It had been accepted before, under the same id."""
        return self.inner.duplicate

    def result(self, timeout: float | None = None) -> Result:
        """Waits for it. Raises WaitTimeoutError, NotFoundError."""
        return self.maestro.wait([self], timeout=timeout)[self.task_id]

    def status(self) -> rpc_types.JobInfo:
        return self.maestro.status(self.task_id)

    def cancel(self) -> rpc_types.JobInfo:
        return self.maestro.cancel(self.task_id)

    def logs(self, *, stream: Stream = "stdout", follow: bool = False) -> Iterator[LogChunk]:
        return self.maestro.logs(self.task_id, stream=stream, follow=follow)


def _inner(jobs: Iterable[str | JobHandle]) -> list[str | AsyncJobHandle]:
    return [job if isinstance(job, str) else job.inner for job in jobs]
