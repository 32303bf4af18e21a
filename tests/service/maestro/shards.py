# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Workers and submitters of a named shard, and what ORG_WQ still holds."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from typing import Any

import msgspec

from organism.bus import messages
from organism.bus.errors import Unavailable
from organism.bus.jetstream import JetStream
from organism.bus.messages import Heartbeat, JobSpec, RpcReply
from organism.core import _bus
from service.maestro.stage import ConductorProcess, FakeWorker, Submitter, Work, succeed, until
from service.support import HANG, BusServer


class ShardWorker(FakeWorker):
    """One GPU's worker in a shard; :attr:`shard` may be changed between a crash and the next start."""

    def __init__(self, bus: BusServer, gpu: str, shard: str, work: Work = succeed) -> None:
        super().__init__(bus, gpu, work)
        self.shard = shard

    def _heartbeat(self) -> Heartbeat:
        return msgspec.structs.replace(super()._heartbeat(), shard=self.shard)


class ShardSubmitter(Submitter):
    """A user who works with one shard."""

    shard = _bus.DEFAULT_SHARD

    @classmethod
    async def of(cls, bus: BusServer, shard: str, user: str = "alice", kind: str = "submitter") -> ShardSubmitter:
        made = cls(await bus.connected(kind, user), user)
        made.shard = shard
        return made

    async def many(self, count: int, **spec: Any) -> list[str]:
        """Ids of jobs that the bus has confirmed."""
        ids = []
        for number in range(count):
            name = f"{self.shard}-{self.user}-{secrets.token_hex(4)}-{number}"
            job = JobSpec(**{"type": "cmd", "cmd": ["true"], "task_id": name, **spec})
            task_id = job.task_id or name
            subject = _bus.enqueue_subject(self.user, self.shard)
            await self.js.publish(subject, messages.encode(job), msg_id=f"{self.user}:{task_id}")
            ids.append(task_id)
        return ids

    async def call(self, operation: str, **body: Any) -> RpcReply:
        subject = _bus.rpc_subject(self.user, operation, self.shard)
        async with asyncio.timeout(HANG):
            while True:
                try:
                    answer = await self.nc.ask(subject, msgspec.json.encode(body), timeout=30)
                    return messages.decode(answer.data, RpcReply)
                except Unavailable as problem:
                    self.problem = problem
                    await asyncio.sleep(0.1)

    async def top(self) -> list[str]:
        """The GPUs that this shard's conductor shows."""
        return [str(gpu["id"]) for gpu in (await self.call("top")).data.get("gpus", [])]


async def leads(conductor: ConductorProcess, shard: str, times: int = 1) -> None:
    """Wait until it leads the shard, for the n-th time."""
    await until(lambda: conductor.text().count(f"leading shard {shard}, epoch") >= times)


async def kept(bus: BusServer) -> Counter[str]:
    """How many messages of each kind and shard ORG_WQ holds: ``enqueue.0``, ``journal.1``, ``run`` (of any GPU)."""
    nc = await bus.connected("admin", "setup")
    try:
        info = await JetStream(nc).api(f"STREAM.INFO.{_bus.STREAM_WQ}", {"subjects_filter": ">"})
    finally:
        await nc.close()
    found: Counter[str] = Counter()
    for subject, count in (info["state"].get("subjects") or {}).items():
        tokens = subject.split(".")
        found[tokens[2] if tokens[2] == "run" else f"{tokens[2]}.{tokens[-1]}"] += count
    return found
