# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A conductor whose every word the test decides: also those of the real one just before it is killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec
from nats.aio.msg import Msg

from organism.bus import messages, rpc_types
from organism.bus.connection import BusClient
from organism.core import _bus
from service.support import BusServer

_REQUESTS: dict[str, type[msgspec.Struct]] = {
    "status": rpc_types.TaskRequest,
    "result": rpc_types.TaskRequest,
    "cancel": rpc_types.TaskRequest,
    "wait": rpc_types.WaitRequest,
    "list": rpc_types.ListRequest,
    "logs": rpc_types.LogsRequest,
    "top": rpc_types.TopRequest,
}


async def until(condition: Callable[[], bool]) -> None:
    """For what has no event of its own; the test's time-out guards it."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


def result_of(task_id: str, *, user: str = "alice", ok: bool = True, stdout: str = "out") -> messages.Result:
    return messages.Result(
        ts=messages.now(),
        task_id=task_id,
        ok=ok,
        state="done" if ok else "failed",
        user=user,
        data={"task_id": task_id, "gpu_id": "gpu0", "returncode": 0 if ok else 3, "stdout": stdout, "stderr": ""},
        error=None if ok else "exit",
        attempts=1,
    )


@dataclass
class FakeConductor:
    """Answers with what was put into ``jobs`` and ``results``; ``asked`` counts the questions."""

    server: BusServer
    nc: BusClient | None = None
    jobs: dict[str, rpc_types.JobInfo] = field(default_factory=dict)
    results: dict[str, messages.Result] = field(default_factory=dict)
    logs: list[rpc_types.LogsReply] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    held: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self.nc = await self.server.connected("conductor", "a")
        await self.nc.subscribe("maestro.rpc.>", cb=self._asked)
        await self.nc.flush()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Be gone, as after a SIGKILL: questions that are held get no answer."""
        for task in self.held:
            task.cancel()
        if self.nc is not None:
            await self.nc.close()
            self.nc = None

    def running(self, task_id: str, user: str = "alice") -> None:
        self.jobs[task_id] = rpc_types.JobInfo(task_id=task_id, state="running", user=user, gpu="gpu0", attempt=1)

    async def finish(self, task_id: str, *, notify: bool = True, **options: Any) -> None:
        result = result_of(task_id, **options)
        self.results[task_id] = result
        self.jobs[task_id] = rpc_types.JobInfo(task_id=task_id, state=result.state, user=result.user)
        self.changed.set()
        if notify:
            assert self.nc is not None
            await self.nc.publish(_bus.notify_subject(result.user, task_id), messages.encode(result))

    async def _asked(self, message: Msg) -> None:
        operation = message.subject.rsplit(".", 1)[1]
        self.asked[operation] += 1
        request = messages.decode(message.data, _REQUESTS[operation])
        task = asyncio.create_task(self._answer(operation, request, message))
        self.held.add(task)
        task.add_done_callback(self.held.discard)

    async def _answer(self, operation: str, request: Any, message: Msg) -> None:
        try:
            data = rpc_types.to_data(await getattr(self, f"_on_{operation}")(request))
            reply = messages.RpcReply(ok=True, data=data)
        except rpc_types.CallError as error:
            reply = messages.RpcReply(ok=False, error=error.as_error())
        if self.nc is not None:
            await self.nc.publish(message.reply, messages.encode(reply))

    def _job(self, task_id: str) -> rpc_types.JobInfo:
        if task_id not in self.jobs:
            raise rpc_types.CallError("not_found", f"no job {task_id} of yours")
        return self.jobs[task_id]

    async def _on_status(self, request: rpc_types.TaskRequest) -> rpc_types.JobReply:
        return rpc_types.JobReply(job=self._job(request.task_id))

    async def _on_cancel(self, request: rpc_types.TaskRequest) -> rpc_types.JobReply:
        job = self._job(request.task_id)
        if job.state in messages.FINAL_STATES:
            raise rpc_types.CallError("conflict", f"{request.task_id} is {job.state} already")
        job.state = "cancelled"
        return rpc_types.JobReply(job=job)

    async def _on_result(self, request: rpc_types.TaskRequest) -> rpc_types.ResultReply:
        job = self._job(request.task_id)
        if request.task_id not in self.results:
            raise rpc_types.CallError("conflict", f"{request.task_id} is {job.state}: no result yet")
        return rpc_types.ResultReply(result=self.results[request.task_id])

    async def _on_list(self, request: rpc_types.ListRequest) -> rpc_types.ListReply:
        jobs = [job for job in self.jobs.values() if request.all or job.state not in messages.FINAL_STATES]
        return rpc_types.ListReply(jobs=jobs[: request.limit], more=len(jobs) > request.limit)

    async def _on_logs(self, request: rpc_types.LogsRequest) -> rpc_types.LogsReply:
        return self.logs.pop(0)

    async def _on_top(self, request: rpc_types.TopRequest) -> rpc_types.TopReply:
        gpus = [
            rpc_types.GpuInfo(
                id="gpu10", state="idle", heartbeat_age=0.4, temp_c=41.0, backend="simulated", model="RX"
            ),
            rpc_types.GpuInfo(id="gpu2", state="dead"),
        ]
        leader = rpc_types.ConductorInfo(name="a", epoch=3, since="2026-11-22T10:00:00.000Z", version="0.1.0")
        return rpc_types.TopReply(gpus=gpus, queue={"enqueued": 2, "running": 1}, conductor=leader)

    async def _on_wait(self, request: rpc_types.WaitRequest) -> rpc_types.WaitReply:
        end = asyncio.get_running_loop().time() + request.timeout
        while True:
            self.changed.clear()
            results = {name: self.results[name] for name in request.task_ids if name in self.results}
            unknown = [name for name in request.task_ids if name not in self.jobs]
            pending = [name for name in request.task_ids if name in self.jobs and name not in results]
            left = end - asyncio.get_running_loop().time()
            if results or unknown or left <= 0:
                return rpc_types.WaitReply(results=results, pending=pending, unknown=unknown)
            try:
                async with asyncio.timeout(left):
                    await self.changed.wait()
            except TimeoutError:
                continue
