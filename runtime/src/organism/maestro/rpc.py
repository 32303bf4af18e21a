# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Clients' questions (:mod:`organism.bus.rpc_types`). Who asks is the token of the subject, which the server checks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from organism.bus import messages, rpc_types
from organism.bus.errors import BusError
from organism.bus.messages import FINAL_STATES, Control, ControlReply, Result, RpcReply, TaskRef
from organism.bus.rpc_types import (
    CallError,
    DrainReply,
    DrainRequest,
    InfoReply,
    InfoRequest,
    JobInfo,
    JobReply,
    ListReply,
    ListRequest,
    LogsReply,
    LogsRequest,
    PauseReply,
    PauseRequest,
    ResultReply,
    StreamInfo,
    TaskRequest,
    TopReply,
    TopRequest,
    WaitReply,
    WaitRequest,
)
from organism.core import _bus
from organism.maestro import explain, views, wishes
from organism.maestro.archive import outline
from organism.maestro.clock import stamp
from organism.maestro.conductor import Conductor
from organism.maestro.dead import Dead
from organism.maestro.endings import Stored as Verdict
from organism.maestro.history import history
from organism.maestro.kept_log import LOG_TIMEOUT, kept_log
from organism.maestro.ledger import Job
from organism.maestro.listeners import Listeners
from organism.maestro.slices import still

log = logging.getLogger(__name__)

ANSWER_LIMIT = 1024 * 1024
ASKERS = ("submitter", "operator")
"""Bytes of results in one answer to ``wait``."""

Handler = Callable[[str, Any], Awaitable[msgspec.Struct]]


class Rpc:
    """Answers during one term."""

    def __init__(self, conductor: Conductor, listeners: Listeners) -> None:
        self.conductor = conductor
        self.listeners = listeners
        dead = Dead(conductor)
        self._handlers: dict[str, tuple[type[msgspec.Struct], Handler]] = {
            "status": (TaskRequest, self.status),
            "list": (ListRequest, self.jobs),
            "result": (TaskRequest, self.result),
            "wait": (WaitRequest, self.wait),
            "cancel": (TaskRequest, self.cancel),
            "logs": (LogsRequest, self.logs),
            "explain": (TaskRequest, self.explain),
            "history": (rpc_types.HistoryRequest, self.history),
            "top": (TopRequest, self.top),
            "drain": (DrainRequest, self.drain),
            "pause": (PauseRequest, self.pause),
            "dead_list": (rpc_types.DeadListRequest, dead.letters),
            "dead_replay": (rpc_types.DeadReplayRequest, dead.replay),
            "info": (InfoRequest, self.info),
        }
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        subject = _bus.rpc_subject("*", "*", self.conductor.site.shard)
        self._subscription = await self.conductor.nc.listen(subject, self._asked)

    async def stop(self) -> None:
        if self._subscription is not None and not self.conductor.nc.is_closed:
            await self._subscription.unsubscribe()

    async def _asked(self, message: Msg) -> None:
        tokens = message.subject.split(".")
        if self.listeners.leading() and message.reply:
            self.conductor.spawn(self._answer(tokens[3], tokens[4], message), f"rpc {tokens[4]}")

    async def _answer(self, user: str, operation: str, message: Msg) -> None:
        try:
            if operation not in self._handlers:
                raise CallError("bad_request", f"no operation {operation}; known are {', '.join(self._handlers)}")
            kind, handler = self._handlers[operation]
            request = messages.decode(message.data or b"{}", kind)
            reply = RpcReply(ok=True, data=rpc_types.to_data(await handler(user, request)))
        except CallError as problem:
            reply = RpcReply(ok=False, error=problem.as_error())
        except messages.BadMessage as problem:
            reply = RpcReply(ok=False, error=CallError("bad_request", str(problem)).as_error())
        except BusError as problem:
            reply = RpcReply(ok=False, error=CallError("unavailable", f"the bus: {problem}").as_error())
        self.conductor.outbox.answer(message.reply, messages.encode(reply), user, ASKERS)

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _operator(self, user: str) -> bool:
        return self.conductor.site.policy.is_operator(user)

    def _may(self, user: str, owner: str) -> bool:
        return user == owner or self._operator(user)

    def _live(self, user: str, task_id: str) -> Job | None:
        job = self.conductor.ledger.by_id.get(task_id)
        return job if job is not None and self._may(user, job.user) else None

    def _info(self, job: Job) -> JobInfo:
        conductor = self.conductor
        return views.job_info(job, conductor.scheduler, conductor.clock.now(), conductor.dependencies.why(job))

    async def _result(self, user: str, task_id: str) -> Result | None:
        found = self.conductor.archive.whole(task_id)
        if found is None and task_id not in self.conductor.ledger.by_id:
            stored = await self.conductor.stored_result(task_id)
            found = stored[0] if stored else None
        return found if found is not None and self._may(user, found.user) else None

    @staticmethod
    def _unknown(task_id: str) -> CallError:
        return CallError("not_found", f"no job {task_id}")

    async def status(self, user: str, request: TaskRequest) -> JobReply:
        job = self._live(user, request.task_id)
        if job is not None:
            return JobReply(job=self._info(job))
        finished = self.conductor.archive.recent.get(request.task_id)
        if finished is None:
            result = await self._result(user, request.task_id)
            finished = outline(result) if result is not None else None
        if finished is None or not self._may(user, finished.info.user):
            raise self._unknown(request.task_id)
        return JobReply(job=finished.info)

    async def jobs(self, user: str, request: ListRequest) -> ListReply:
        conductor = self.conductor
        operator = self._operator(user)
        if request.user not in (None, user) and not operator:
            raise CallError("forbidden", f"{user} is no operator and may list only their own jobs")
        whose = request.user or (None if operator and request.all else user)
        found = list[JobInfo]()
        if request.state not in FINAL_STATES:
            async for job in still(conductor.ledger, newest_first=True):
                if whose in (None, job.user):
                    info = self._info(job)
                    if request.state in (None, info.state):
                        found.append(info)
                        if len(found) > request.limit:
                            break
        if request.state in FINAL_STATES or (request.state is None and request.all):
            done = [
                one.info
                for one in conductor.archive.recent.values()
                if whose in (None, one.info.user) and request.state in (None, one.info.state)
            ]
            over = {info.task_id for info in done}  # some of them while the others were looked at
            unfinished = [info for info in found if info.task_id not in over]
            found = sorted([*unfinished, *done], key=lambda info: info.submitted, reverse=True)
        return ListReply(jobs=found[: request.limit], more=len(found) > request.limit)

    async def result(self, user: str, request: TaskRequest) -> ResultReply:
        job = self._live(user, request.task_id)
        if job is not None:
            raise CallError("conflict", f"job {job.task_id} is {self._info(job).state}: it has no result yet")
        result = await self._result(user, request.task_id)
        if result is None:
            raise self._unknown(request.task_id)
        return ResultReply(result=result)

    async def wait(self, user: str, request: WaitRequest) -> WaitReply:
        ids = list(dict.fromkeys(request.task_ids))
        deadline = asyncio.get_running_loop().time() + request.timeout
        watcher = asyncio.Event()
        for task_id in ids:
            self.conductor.watchers.setdefault(task_id, []).append(watcher)
        try:
            while True:
                watcher.clear()
                reply = await self._look(user, ids, brief=request.brief)
                if reply.results or reply.unknown or asyncio.get_running_loop().time() >= deadline:
                    return reply
                try:
                    async with asyncio.timeout_at(deadline):
                        await watcher.wait()
                except TimeoutError:
                    continue
        finally:
            for task_id in ids:
                waiting = self.conductor.watchers.get(task_id, [])
                if watcher in waiting:
                    waiting.remove(watcher)
                if not waiting:
                    self.conductor.watchers.pop(task_id, None)

    async def _look(self, user: str, ids: list[str], *, brief: bool) -> WaitReply:
        reply = WaitReply(results={}, pending=[], unknown=[])
        size = 0
        known = self.conductor.archive.whole
        ended = [one for one in ids if one not in self.conductor.ledger.by_id]
        stored = await self.listeners.known_results([one for one in ended if known(one) is None])
        for task_id in ids:
            if self._live(user, task_id) is not None or size > ANSWER_LIMIT:
                reply.pending.append(task_id)
                reply.cut |= size > ANSWER_LIMIT
                continue
            result = known(task_id) or stored.get(task_id)
            if result is None or not self._may(user, result.user):
                reply.unknown.append(task_id)
                continue
            if brief:
                kept = {k: v for k, v in result.data.items() if k not in ("stdout", "stderr", "value")}
                result = msgspec.structs.replace(result, data=kept, history=[])
            size += len(messages.encode(result))
            if size > ANSWER_LIMIT and reply.results:
                reply.pending.append(task_id)
                reply.cut = True
            else:
                reply.results[task_id] = result
        return reply

    async def cancel(self, user: str, request: TaskRequest) -> JobReply:
        job = self._live(user, request.task_id)
        if job is not None:
            answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

            def settled(verdict: Verdict) -> None:
                if not answer.done():  # whoever asked may be gone with the term by the time that it is stored
                    answer.set_result(verdict)

            self.conductor.cancel(job, f"cancelled by {user}", settled)
            verdict = await answer
            if verdict == "not stored":
                raise CallError("unavailable", "the cancellation could not be stored; try again")
            if verdict == "stored":
                return await self.status(user, request)
        finished = (await self.status(user, request)).job
        raise CallError("conflict", f"job {finished.task_id} is {finished.state} already")

    async def logs(self, user: str, request: LogsRequest) -> LogsReply:
        job = self._live(user, request.task_id)
        if job is None:
            result = await self._result(user, request.task_id)
            if result is None:
                raise self._unknown(request.task_id)
            return await kept_log(self.conductor, result, request) or _result_log(result, request)
        offset = request.offset if request.attempt in (0, job.attempt) else 0
        if job.phase != "assigned" or job.gpu is None:
            return LogsReply(next_offset=0, state=self._info(job).state, attempt=job.attempt)
        order = Control(op="logs", task_id=job.task_id, attempt=job.attempt, stream=request.stream, offset=offset)
        attempt, gpu = job.attempt, job.gpu
        try:
            answer = await self.conductor.nc.ask(_bus.control_subject(gpu), messages.encode(order), timeout=LOG_TIMEOUT)
        except BusError as problem:
            raise CallError("unavailable", f"the worker of {gpu} does not answer: {problem}") from problem
        reply = messages.decode(answer.data, ControlReply)
        if not reply.ok:
            # it has not started there yet, or has just ended: ask again
            return LogsReply(next_offset=offset, state=job.state, attempt=attempt)
        return LogsReply(
            text=reply.text, next_offset=reply.next_offset, eof=reply.eof, state=job.state, attempt=attempt
        )

    async def explain(self, user: str, request: TaskRequest) -> rpc_types.ExplainReply:
        job = self._live(user, request.task_id)
        if job is None:
            return explain.ended((await self.status(user, request)).job)
        needs = explain.needs_of(self.conductor, user, job, self._operator(user))
        return await explain.explain(self.conductor, job, self._info(job), needs)

    async def history(self, user: str, request: rpc_types.HistoryRequest) -> rpc_types.HistoryReply:
        return await history(self.conductor, user, request)

    # ---- the pool ----------------------------------------------------------------------------------------------------

    async def top(self, _user: str, _request: TopRequest) -> TopReply:
        conductor = self.conductor
        now = conductor.clock.now()
        given = self._given()
        gpus = [views.gpu_info(gpu, conductor.fleet, given, now) for _, gpu in sorted(conductor.fleet.gpus.items())]
        queue = dict.fromkeys(("enqueued", "waiting_gpu", "scheduled", "running", "retry"), 0)
        queue.update({state: count for state, count in conductor.ledger.states.items() if count})
        for state in FINAL_STATES:
            queue[state] = conductor.archive.counts[state]
        return TopReply(
            gpus=gpus,
            queue=queue,
            paused=sorted(conductor.scheduler.paused),
            conductor=rpc_types.ConductorInfo(
                name=conductor.site.name,
                epoch=conductor.epoch,
                since=stamp(conductor.since),
                version=conductor.site.version,
            ),
        )

    def _given(self) -> dict[TaskRef, Job]:
        """The jobs whose attempts GPUs have; of however many wait none is looked at."""
        refs = {ref for gpu in self.conductor.fleet.gpus.values() for ref in (*gpu.orders, *gpu.held)}
        jobs = ((ref, self.conductor.ledger.by_id.get(ref.task_id)) for ref in refs)
        return {ref: job for ref, job in jobs if job is not None and job.attempt == ref.attempt}

    async def drain(self, user: str, request: DrainRequest) -> DrainReply:
        conductor = self.conductor
        if not self._operator(user):
            raise CallError("forbidden", f"{user} is no operator and may not drain a GPU")
        gpu = conductor.fleet.gpus.get(request.gpu)
        if gpu is None:
            why = conductor.fleet.absence(request.gpu)
            known = ", ".join(sorted(conductor.fleet.gpus))
            raise CallError("not_found", f"no GPU {request.gpu}: {why}; known are {known}")
        wish = {"drained": request.on, "by": user, "ts": conductor.clock.stamp(), "shard": conductor.site.shard}
        value = json.dumps(wish).encode()
        await conductor.js.publish(wishes.subject("gpu", gpu.id), value)
        self.listeners.wishes.gpu(gpu.id, value)
        return DrainReply(gpu=views.gpu_info(gpu, conductor.fleet, {}, conductor.clock.now()))

    async def pause(self, user: str, request: PauseRequest) -> PauseReply:
        conductor = self.conductor
        if not self._operator(user):
            raise CallError("forbidden", f"{user} is no operator and may not pause a queue")
        value = json.dumps({"paused": request.on, "by": user, "ts": conductor.clock.stamp()}).encode()
        await conductor.js.publish(wishes.subject("queue", request.queue, conductor.site.shard), value)
        self.listeners.wishes.queue(request.queue, value)
        return PauseReply(paused=sorted(conductor.scheduler.paused))

    async def info(self, _user: str, _request: InfoRequest) -> InfoReply:
        conductor = self.conductor
        site = conductor.site
        server = conductor.nc.connected_server_version
        names = (_bus.STREAM_WQ, _bus.STREAM_RESULTS, _bus.STREAM_EVENTS, _bus.STREAM_DLQ, _bus.STREAM_LOGS)
        return InfoReply(
            version=site.version,
            types=sorted(site.policy.types),
            max_payload=conductor.nc.max_payload,
            max_queue=site.settings.integer("MAX_QUEUE"),
            default_timeout=site.settings.number("DEFAULT_TIMEOUT_SEC"),
            max_retries=site.settings.integer("MAX_RETRIES"),
            operators=sorted(site.policy.operators),
            server_version=f"{server.major}.{server.minor}.{server.patch}",
            streams={name: await self._stream(name) for name in names},
        )

    async def _stream(self, name: str) -> StreamInfo:
        try:
            info = await self.conductor.js.info(name)
        except BusError as problem:
            return StreamInfo(problem=str(problem))
        state, config = info["state"], info["config"]
        return StreamInfo(
            messages=int(state["messages"]), bytes=int(state["bytes"]), max_bytes=int(config.get("max_bytes", 0))
        )


def _result_log(result: Result, request: LogsRequest) -> LogsReply:
    """A piece of a finished job's output, at the byte offsets that the running job's log had."""
    text = str(result.data.get(request.stream) or "").encode()
    total = max(int(result.data.get(f"{request.stream}_bytes") or 0), len(text))
    offset = request.offset if request.attempt in (0, result.attempts) else 0
    start = offset
    if total > len(text):
        # the middle was cut out: what is missing at the end is in the tail half
        rest = max(0, total - offset)
        start = len(text) - rest if rest <= len(text) // 2 else 0
    piece = text[start : start + rpc_types.LOG_CHUNK]
    while piece and start + len(piece) < len(text) and (text[start + len(piece)] & 0xC0) == 0x80:
        piece = piece[:-1]  # not within a character
    end = start + len(piece)
    eof = end >= len(text)
    return LogsReply(
        text=piece.decode("utf-8", "replace"),
        next_offset=total if eof else offset + len(piece),
        eof=eof,
        state=result.state,
        attempt=result.attempts,
    )
