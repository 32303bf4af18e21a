# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Submits a plan's jobs as its users, in a process of its own that may be killed at any moment.

Its notebook says what was about to be sent and what was acknowledged; a new start reads it and goes on, sending again,
under the same ids, what it does not know to be accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from chaos.jobs.notebook import Notebook, read
from chaos.jobs.plan import MAX_RETRIES, USERS, Group, Job, Options, Plan, drawn

from organism.client import AsyncMaestro, MaestroError
from organism.core._client_settings import ClientSettings

CONFIRM = 10.0
TIMEOUT = 120.0
"""Seconds that a job may take at most: none comes near."""
SCRIPT = (
    'echo "begun $ORGANISM_ATTEMPT $ORGANISM_GPU_ID" >> "$0/$ORGANISM_TASK_ID"; sleep "$1";'
    ' echo "ended $ORGANISM_ATTEMPT $ORGANISM_GPU_ID" >> "$0/$ORGANISM_TASK_ID";'
    ' echo "ran $ORGANISM_TASK_ID $ORGANISM_ATTEMPT $ORGANISM_GPU_ID"; exit "$2"'
)
"""A job writes down each of its runs; its output names the attempt and the GPU that it belongs to."""


def fields(job: Job, ran: str) -> dict[str, Any]:
    """What is submitted for a job of the plan."""
    given: dict[str, Any] = {
        "task_id": job.task_id,
        "priority": job.priority,
        "timeout": TIMEOUT,
        "max_retries": MAX_RETRIES,
        "labels": {"kind": job.kind},
    }
    if job.after:
        given["after"] = [job.after]
    if job.kind == "noop":
        return {**given, "type": "noop"}
    return {**given, "cmd": ["sh", "-c", SCRIPT, ran, f"{job.seconds:g}", "3" if job.fails else "0"]}


class Submitter:
    def __init__(self, plan: Plan, book: Notebook, ran: str, started: float, maestros: dict[str, AsyncMaestro]) -> None:
        self.plan, self.book, self.ran, self.started, self.maestros = plan, book, ran, started, maestros
        self.accepted: set[str] = set()
        self.judged: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.chance = random.Random(time.monotonic_ns())

    def remember(self) -> None:
        """What an earlier process of this run has done."""
        for line in read(self.book.path):
            if line["what"] == "accepted":
                self.accepted.update(line["seqs"])
            elif line["what"] == "cancel":
                self.judged.add(line["task_id"])

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._repeat)
        for group in self.plan.groups:
            known = all(job.task_id in self.accepted for job in group.jobs)
            if not known:
                await asyncio.sleep(max(0.0, self.started + group.at - time.monotonic()))
                await self.send(group)
            for job in group.jobs:
                if job.cancel is not None and job.task_id not in self.judged:
                    self._spawn(self.cancel(job))
        while self.tasks:
            await asyncio.wait(self.tasks)
        self.book.note("all sent")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def send(self, group: Group, *, again: bool = False) -> None:
        """Until it is acknowledged."""
        maestro = self.maestros[group.jobs[0].user]
        jobs = [fields(job, self.ran) for job in group.jobs]
        self.book.note("repeat" if again else "send", ids=[job.task_id for job in group.jobs])
        while True:
            try:
                handles = await maestro.submit_many(jobs, confirm=CONFIRM)
                break
            except MaestroError as problem:
                self.book.note("unsure", ids=[job.task_id for job in group.jobs], why=str(problem)[:200])
            await asyncio.sleep(0.5)  # the bus is away and tells nobody when it comes back
        seqs = {handle.task_id: handle.seq for handle in handles}
        self.book.note(
            "repeated" if again else "accepted", seqs=seqs, twice=sum(handle.duplicate for handle in handles)
        )
        if not again:
            self.accepted.update(seqs)

    def _repeat(self) -> None:
        """SIGUSR1: send some of what was accepted again, and one known id with another content."""
        done = [group for group in self.plan.groups if all(job.task_id in self.accepted for job in group.jobs)]
        for group in self.chance.sample(done, min(3, len(done))):
            self._spawn(self.send(group, again=True))
        if done:
            self._spawn(self._contradict(self.chance.choice(done).jobs[0]))

    async def _contradict(self, job: Job) -> None:
        """The same id with another content: it must not touch the first one's result."""
        given = fields(job, self.ran) | {"type": "noop", "cmd": None, "labels": {"kind": "contradiction"}}
        given.pop("after", None)
        try:
            handle = await self.maestros[job.user].submit(**given, confirm=CONFIRM)
            self.book.note("contradicted", task_id=job.task_id, seq=handle.seq, twice=handle.duplicate)
        except MaestroError as problem:
            self.book.note("contradicted", task_id=job.task_id, why=str(problem)[:200])

    async def cancel(self, job: Job) -> None:
        """Until there is an answer: ``cancelled``, or the final state that it had by then."""
        await asyncio.sleep(job.cancel or 0.0)
        self.book.note("cancelling", task_id=job.task_id)
        while True:
            try:
                info = await self.maestros[job.user].cancel(job.task_id)
                verdict: str = info.state
                break
            except MaestroError as problem:
                if problem.code == "conflict":
                    verdict = "too late"
                    break
                # not found: the conductor has not read the submission yet; else bus or conductor are away
                if self.chance.random() < 0.1:
                    self.book.note("cancel again", task_id=job.task_id, why=str(problem)[:200])
            await asyncio.sleep(0.3)
        self.book.note("cancel", task_id=job.task_id, verdict=verdict)


async def main(config: dict[str, Any]) -> None:
    plan = drawn(Options(**{**config["options"], "without": tuple(config["options"]["without"])}))
    book = Notebook(Path(config["book"]))
    maestros = {
        user: AsyncMaestro(
            ClientSettings(
                servers=tuple(config["servers"]), user=user, nkey_file=config["keys"][user], ca_file=config["ca"]
            ),
            listen=False,
        )
        for user in USERS
    }
    submitter = Submitter(plan, book, config["ran"], config["started"], maestros)
    submitter.remember()
    for maestro in maestros.values():
        while True:
            try:
                await maestro.connect()
                break
            except MaestroError as problem:
                book.note("unconnected", why=str(problem)[:200])
            await asyncio.sleep(0.5)  # the bus is away and tells nobody when it comes back
    try:
        await submitter.run()
    finally:
        for maestro in maestros.values():
            await maestro.close()


if __name__ == "__main__":
    parsed = argparse.ArgumentParser(prog="chaos.jobs.submitter")
    parsed.add_argument("config", type=Path)
    asyncio.run(main(json.loads(parsed.parse_args(sys.argv[1:]).config.read_text())))
