# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The asyncio client; the other one (_sync) is a facade over it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from nats.aio.msg import Msg

from organism.bus import messages, rpc_types
from organism.client import _following, _jobfile
from organism.client._errors import ConflictError, MaestroError, WaitTimeoutError
from organism.client._link import Link
from organism.client._requests import build_request
from organism.client._results import LogChunk, Result
from organism.client._submitting import Accepted, Submitter, array, build
from organism.client._waiting import Waiter
from organism.core._client_settings import ClientSettings, ClientSettingsError, in_shard, load

Stream = Literal["stdout", "stderr"]

PATIENCE = 10.0
"""Seconds that a question survives without bus or conductor: a takeover by a standby takes about six."""
CONFIRM = 30.0
"""Seconds for the bus to confirm a submission."""


class AsyncMaestro:
    """A connection to the pool as one user.

    Without arguments the settings are those of ``client.toml`` and the environment (docs/client.md); ``context`` names
    a settings file to be used alone, and ``shard`` the share of the queue to work with, where a pool has several.
    ``patience`` is how many seconds calls wait for a bus or conductor that is away.
    ``listen=False`` spares the subscription to results in a program that only submits. All calls raise
    :class:`MaestroError` or one of its kinds.
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
        try:
            if settings is None:
                settings = load(context)
            if shard is not None:
                settings = in_shard(settings, shard, "the argument")
        except ClientSettingsError as error:
            raise MaestroError(str(error), code="settings") from error
        self.settings = settings
        self._link = Link(settings, patience=patience)
        self._waiter = Waiter(self._link)
        self._submitter = Submitter(self._link)
        self._listen = listen

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Raises BusUnreachableError or AccessDeniedError."""
        await self._link.open()

    async def close(self) -> None:
        await self._waiter.close()
        await self._link.close()

    @property
    def trouble(self) -> str:
        """Why a wait hears nothing at the moment (bus or conductor away); empty when all is well."""
        return self._waiter.trouble

    @property
    def where(self) -> str:
        """The addresses of the bus, for messages."""
        return self._link.where

    @property
    def server(self) -> dict[str, Any]:
        """What the server said of itself: ``version``, ``jetstream``, ``max_payload`` (bytes), ``server_name``, ..."""
        return dict(self._link.nc._server_info)

    async def hear(self, subject: str) -> AsyncGenerator[Msg]:
        """Messages on ``subject``, as they come; what a kind of user may hear is declared in ``organism.core._bus``."""
        subscription = await self._link.nc.subscribe(subject)
        try:
            async for message in subscription.messages:
                yield message
        finally:
            await subscription.unsubscribe()

    # ---- submit ------------------------------------------------------------------------------------------------------

    async def submit(
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
    ) -> AsyncJobHandle:
        """One job; returns when it is on the bus's disk. The fields are those of the job (docs/client.md).

        Repeating a submission under the same ``task_id`` is safe: the job is accepted once.
        Raises InvalidJobError and PayloadTooLargeError (nothing sent), QueueFullError, AccessDeniedError,
        BusUnreachableError (not confirmed within ``confirm`` seconds).
        """
        spec = build(
            {
                "cmd": cmd if cmd is None or isinstance(cmd, str) else list(cmd),
                "shell": shell,
                "python": python,
                "argv": argv if argv is None or isinstance(argv, str) else list(argv),
                "type": type,
                "args": args,
                "task_id": task_id,
                "gpu": gpu,
                "min_vram_mb": min_vram_mb,
                "gpus": gpus,
                "gpu_model": gpu_model,
                "inputs": None if inputs is None else [inputs] if isinstance(inputs, str) else list(inputs),
                "cwd": cwd,
                "env": env,
                "timeout": timeout,
                "max_retries": max_retries,
                "priority": priority,
                "delay": delay,
                "after": after,
                "deadline": deadline,
                "unique": unique,
                "queue": queue,
                "labels": labels,
            }
        )
        if self._listen:
            await self._waiter.listen()
        return self._handle(await self._submitter.submit(spec, confirm=confirm))

    async def submit_many(
        self, jobs: Iterable[dict[str, Any] | messages.JobSpec], *, confirm: float = CONFIRM
    ) -> list[AsyncJobHandle]:
        """Many jobs in atomic batches of up to 1,000, in their order; as :meth:`submit`, but all checked before any is
        sent. A ``dict`` has the fields of ``submit``."""
        specs = []
        for position, job in enumerate(jobs, start=1):
            fields = job if isinstance(job, dict) else _fields(job)
            try:
                specs.append(build(fields))
            except MaestroError as error:
                raise type(error)(f"job {position}: {error}; nothing was sent") from error
        if not specs:
            return []
        if self._listen:
            await self._waiter.listen()
        return [self._handle(accepted) for accepted in await self._submitter.submit_many(specs, confirm=confirm)]

    async def submit_file(self, path: str | Path, *, confirm: float = CONFIRM) -> list[AsyncJobHandle]:
        """The jobs of a YAML file (docs/jobfiles.md), all checked before any is sent, those that others wait for first.

        Raises JobFileError with each mistake and its line, and what :meth:`submit_many` raises.
        """
        return await self.submit_many(_jobfile.load(path), confirm=confirm)

    async def submit_array(self, count: int, *, confirm: float = CONFIRM, **fields: Any) -> list[AsyncJobHandle]:
        """``count`` jobs that differ only in ``ORGANISM_ARRAY_INDEX`` (0 to count - 1) in their environment.

        ``fields`` are those of :meth:`submit`; ``task_id`` names the array, its jobs are ``<task_id>-<index>`` and have
        the label ``array=<task_id>``.
        """
        return await self.submit_many(array(count, fields), confirm=confirm)

    def _handle(self, accepted: Accepted) -> AsyncJobHandle:
        return AsyncJobHandle(self, accepted.task_id, accepted.seq, accepted.duplicate)

    def job(self, task_id: str) -> AsyncJobHandle:
        """A handle for a job submitted earlier or elsewhere."""
        return AsyncJobHandle(self, task_id)

    # ---- results -----------------------------------------------------------------------------------------------------

    async def wait(
        self,
        jobs: Iterable[str | AsyncJobHandle],
        *,
        timeout: float | None = None,
    ) -> dict[str, Result]:
        """The results of all, as soon as the last is final. Survives restarts of conductor and bus.

        Raises WaitTimeoutError after ``timeout`` seconds (its ``pending`` names who is left), NotFoundError.
        """
        results: dict[str, Result] = {}
        names: list[str] = []
        try:
            async with asyncio.timeout(timeout):
                async for result in self._as_final(jobs, names):
                    results[result.task_id] = result
        except TimeoutError:
            pending = [name for name in names if name not in results]
            raise WaitTimeoutError(
                f"{len(pending)} of {len(names)} jobs are not final after {timeout:g} s; they go on", pending
            ) from None
        return {name: results[name] for name in names}

    async def as_completed(
        self,
        jobs: Iterable[str | AsyncJobHandle],
        *,
        timeout: float | None = None,
    ) -> AsyncIterator[Result]:
        """Each result when it is there. Raises as :meth:`wait`."""
        started = time.monotonic()
        names: list[str] = []
        seen: set[str] = set()
        results = self._as_final(jobs, names)
        try:
            while True:
                left = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
                try:
                    async with asyncio.timeout(left):
                        result = await anext(results)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    pending = [name for name in names if name not in seen]
                    raise WaitTimeoutError(f"{len(pending)} jobs are not final after {timeout:g} s", pending) from None
                seen.add(result.task_id)
                yield result
        finally:
            await results.aclose()

    async def _as_final(self, jobs: Iterable[str | AsyncJobHandle], names: list[str]) -> AsyncGenerator[Result]:
        fresh: list[str] = []
        others: list[str] = []
        for job in jobs:
            name = job if isinstance(job, str) else job.task_id
            names.append(name)
            ours = isinstance(job, AsyncJobHandle) and job.maestro is self and job.seq is not None and not job.duplicate
            (fresh if ours else others).append(name)
        with (
            self._waiter.expecting(fresh, fresh=True) as own,
            self._waiter.expecting(others, fresh=False) as foreign,
        ):
            open_ = {*own.values(), *foreign.values()}
            # not asyncio.wait: that looks at all of them again for each one that ends
            ended: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()
            for future in open_:
                future.add_done_callback(ended.put_nowait)
            try:
                for _ in range(len(open_)):
                    yield (await ended.get()).result()
            finally:
                for future in open_:
                    future.remove_done_callback(ended.put_nowait)

    async def result(self, task_id: str) -> Result:
        """The result of a finished job, now. Raises NotFoundError, ConflictError (not final yet)."""
        reply = await self._link.rpc("result", self._task(task_id), rpc_types.ResultReply)
        return Result.of(reply.result)

    # ---- look --------------------------------------------------------------------------------------------------------

    async def status(self, task_id: str) -> rpc_types.JobInfo:
        """Raises NotFoundError."""
        return (await self._link.rpc("status", self._task(task_id), rpc_types.JobReply)).job

    async def list(
        self, *, state: str | None = None, user: str | None = None, limit: int = 100, all: bool = False
    ) -> rpc_types.ListReply:
        """Jobs, the newest first: the unfinished ones, with ``all`` the finished ones too. ``more``: ``limit`` cut it.

        Of another ``user`` for operators only: AccessDeniedError.
        """
        request = build_request({"state": state, "user": user, "limit": limit, "all": all}, rpc_types.ListRequest)
        return await self._link.rpc("list", request, rpc_types.ListReply)

    def logs(
        self, task_id: str, *, stream: Stream = "stdout", follow: bool = False, offset: int = 0
    ) -> AsyncGenerator[LogChunk]:
        """The job's output as far as it is there; with ``follow`` until the job is final, over all its attempts."""
        return _following.logs(self._link, self._task(task_id), stream, follow, offset)

    def states(self, task_id: str) -> AsyncGenerator[messages.StateEvent]:
        """The job's states until the final one: every event for an operator, what is seen by asking for others."""
        return _following.states(self._link, self._waiter, self._task(task_id))

    def progress(self, task_id: str) -> AsyncGenerator[rpc_types.JobInfo]:
        """The job each time that it says something new of its progress (``progress``, ``progress_text``), until it is
        final. Raises NotFoundError."""
        return _following.progress(self._link, self._task(task_id))

    async def explain(self, task_id: str) -> rpc_types.ExplainReply:
        """Why the job waits, where it runs and why there, or how it ended: live. Raises NotFoundError."""
        task = self._task(task_id)
        return await _following.patiently(lambda: self._link.rpc("explain", task, rpc_types.ExplainReply))

    async def history(
        self,
        *,
        user: str | None = None,
        all: bool = False,
        state: str | None = None,
        label: str | None = None,
        since: str | None = None,
        limit: int = 100,
    ) -> Sequence[rpc_types.HistoryEntry]:
        """Finished jobs, the newest first, as far back as the bus keeps results (30 days by default).

        ``label`` is ``KEY=VALUE``, ``since`` a UTC time (RFC 3339). ``all`` and another ``user`` are for operators:
        AccessDeniedError.
        """
        found: list[rpc_types.HistoryEntry] = []
        before = 0
        while len(found) < limit:
            fields = {"user": user, "all": all, "state": state, "label": label, "since": since, "before": before}
            fields["limit"] = min(limit - len(found), rpc_types.LIST_LIMIT)
            request = build_request(fields, rpc_types.HistoryRequest)
            reply = await self._link.rpc("history", request, rpc_types.HistoryReply)
            found += reply.jobs
            before = reply.next
            if not before:
                break
        return found

    async def top(self) -> rpc_types.TopReply:
        """GPUs, queue and conductor at this moment."""
        return await self._link.rpc("top", rpc_types.TopRequest(), rpc_types.TopReply)

    async def info(self) -> rpc_types.InfoReply:
        """What this site allows and promises."""
        return await self._link.rpc("info", rpc_types.InfoRequest(), rpc_types.InfoReply)

    # ---- steer -------------------------------------------------------------------------------------------------------

    async def cancel(self, task_id: str) -> rpc_types.JobInfo:
        """Final once it returns. Raises NotFoundError, ConflictError (it had ended otherwise)."""
        try:
            return (await self._link.rpc("cancel", self._task(task_id), rpc_types.JobReply)).job
        except ConflictError:
            # the question may have been repeated because its first answer was lost on the way
            job = await self.status(task_id)
            if job.state == "cancelled":
                return job
            raise

    async def drain(self, gpu: str, on: bool = True) -> rpc_types.GpuInfo:
        """No new jobs for this GPU (``on=False``: again). Operators only. Raises NotFoundError."""
        request = build_request({"gpu": gpu, "on": on}, rpc_types.DrainRequest)
        return (await self._link.rpc("drain", request, rpc_types.DrainReply)).gpu

    async def pause(self, queue: str = "default", on: bool = True) -> Sequence[str]:
        """No job of this queue starts (``on=False``: again). Operators only. Returns the queues that are paused."""
        request = build_request({"queue": queue, "on": on}, rpc_types.PauseRequest)
        return (await self._link.rpc("pause", request, rpc_types.PauseReply)).paused

    async def dead(self, limit: int = 100) -> rpc_types.DeadListReply:
        """Dead letters, the newest first."""
        request = build_request({"limit": limit}, rpc_types.DeadListRequest)
        return await self._link.rpc("dead_list", request, rpc_types.DeadListReply)

    async def replay(self, task_id: str | None = None, *, seq: int | None = None) -> AsyncJobHandle:
        """A dead job, or the letter ``seq``, as a new job. Raises NotFoundError, ConflictError (payload unusable).

        Not repeated when no answer comes, since that could make two jobs of one: look with :meth:`list` first.
        """
        request = build_request({"task_id": task_id, "seq": seq}, rpc_types.DeadReplayRequest)
        reply = await self._link.rpc("dead_replay", request, rpc_types.DeadReplayReply, repeatable=False)
        return AsyncJobHandle(self, reply.task_id)

    @staticmethod
    def _task(task_id: str) -> rpc_types.TaskRequest:
        return build_request({"task_id": task_id}, rpc_types.TaskRequest)


@dataclass(frozen=True)
class AsyncJobHandle:
    """A job. ``seq`` is its place in the stream when this client submitted it; ``duplicate``: it was there already."""

    maestro: AsyncMaestro
    task_id: str
    seq: int | None = None
    duplicate: bool = False

    async def result(
        self,
        timeout: float | None = None,
    ) -> Result:
        """Waits for it. Raises WaitTimeoutError, NotFoundError."""
        return (await self.maestro.wait([self], timeout=timeout))[self.task_id]

    async def status(self) -> rpc_types.JobInfo:
        return await self.maestro.status(self.task_id)

    async def cancel(self) -> rpc_types.JobInfo:
        return await self.maestro.cancel(self.task_id)

    def logs(self, *, stream: Stream = "stdout", follow: bool = False) -> AsyncGenerator[LogChunk]:
        return self.maestro.logs(self.task_id, stream=stream, follow=follow)


def _fields(spec: messages.JobSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__struct_fields__}
