# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""SIGKILL of worker, conductor and nats-server in turn, with 200 jobs in flight: none lost, none ended or run twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from organism.bus import messages
from organism.bus.jetstream import JetStream
from organism.client import AsyncJobHandle, AsyncMaestro, Result
from organism.core import _bus
from service.client.pool import Pool
from service.support import HANG

JOBS = 200
"""Accepted before the first kill."""
LATE = 20
"""Submitted one by one while things die."""
VICTIM = 10_001
"""Number of the job that a worker dies under."""
FAILING = 7
"""Each so-many-th job fails at each of its two tries."""
RETRIES = 1
MAX_LOST = 20
GPUS = ["gpu0", "gpu1", "gpu2", "gpu3"]
WHOLE = 2 * HANG
"""Hang guard of the whole; it takes about half a minute."""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path, GPUS, MAX_LOST=MAX_LOST).start()
    yield made
    made.stop()


def job(number: int, ran: Path, work: str = "sleep 0.15") -> dict[str, Any]:
    """A job that writes down each of its runs, before and after its work."""
    end = "exit 3" if number % FAILING == 0 else "exit 0"
    script = (
        'echo "$ORGANISM_ATTEMPT" >> "$0/$ORGANISM_TASK_ID.begun";'
        f' {work}; echo "$ORGANISM_ATTEMPT" >> "$0/$ORGANISM_TASK_ID.ended"; echo run {number}; {end}'
    )
    return {"cmd": ["sh", "-c", script, str(ran)], "max_retries": RETRIES, "labels": {"n": str(number)}}


@dataclass
class Chaos:
    """Kills one part after the other while results come in, and starts each again at once, as systemd would."""

    pool: Pool
    maestro: AsyncMaestro
    ran: Path
    victims: list[AsyncJobHandle] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)
    unfinished_at_kill: dict[str, int] = field(default_factory=dict)

    async def collect(self, handles: list[AsyncJobHandle]) -> None:
        async for result in self.maestro.as_completed(handles):
            assert result.task_id not in self.results
            self.results[result.task_id] = result
            async with self.progress:
                self.progress.notify_all()

    async def kill(self, name: str, after: int, how: Callable[[], Awaitable[None]]) -> None:
        """When ``after`` jobs are final."""
        async with self.progress:
            await self.progress.wait_for(lambda: len(self.results) >= after)
        self.unfinished_at_kill[name] = JOBS - len(self.results)
        await how()

    async def worker(self, gpu: str) -> None:
        """In the middle of a job, which cannot end before its worker is dead."""
        gate = self.ran / f"{gpu}.gate"
        victim = job(VICTIM, self.ran, f"while [ ! -e {gate} ]; do sleep 0.02; done")
        handle = await self.maestro.submit(**victim, gpu=gpu, priority=100)
        self.victims.append(handle)
        begun = self.ran / f"{handle.task_id}.begun"
        while True:
            if begun.exists():
                break
            await asyncio.sleep(0.02)  # a job tells nobody that it has begun
        process = self.pool.workers[gpu]
        await asyncio.to_thread(process.kill)
        gate.touch()
        process.start()

    async def conductor(self) -> None:
        await asyncio.to_thread(self.pool.conductor.kill9)
        self.pool.conductor.start()

    async def server(self) -> None:
        await asyncio.to_thread(self.pool.bus.kill9)
        await asyncio.to_thread(self.pool.bus.start)


async def submit_late(pool: Pool, ran: Path) -> list[AsyncJobHandle]:
    """Singles from another client, each confirmed before the next, whatever dies meanwhile."""
    async with AsyncMaestro(pool.settings()) as maestro:
        return [await maestro.submit(**job(number, ran), confirm=HANG) for number in range(JOBS, JOBS + LATE)]


async def on_disk(pool: Pool, stream: str, prefix: str) -> list[tuple[str, bytes]]:
    """Every message of a stream below a prefix: the last token of its subject, and its payload."""
    nc = await pool.bus.connected("admin", "setup")
    try:
        js = JetStream(nc)
        state = (await js.info(stream))["state"]
        found = [await js.get(stream, seq) for seq in range(max(1, state["first_seq"]), state["last_seq"] + 1)]
    finally:
        await nc.close()
    return [
        (message.subject.removeprefix(prefix), message.data)
        for message in found
        if message is not None and message.subject.startswith(prefix)
    ]


async def final_events(pool: Pool) -> dict[str, list[str]]:
    """Every final state that ORG_EVENTS tells, by job. One that was told again to be the last has the same number."""
    ends: dict[str, dict[int, str]] = {}
    for task_id, data in await on_disk(pool, _bus.STREAM_EVENTS, "gpu.task.state."):
        event = messages.decode(data, messages.StateEvent)
        if event.state in messages.FINAL_STATES:
            ends.setdefault(task_id, {})[event.n] = event.state
    return {task_id: list(states.values()) for task_id, states in ends.items()}


def lines(path: Path) -> list[int]:
    """The attempts written to a file."""
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def test_kills_in_turn_lose_no_job_and_end_none_twice(pool: Pool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()

    async def main() -> Chaos:
        async with AsyncMaestro(pool.settings()) as maestro, asyncio.timeout(WHOLE):
            chaos = Chaos(pool, maestro, ran)
            handles = await maestro.submit_many(job(number, ran) for number in range(JOBS))
            collecting = asyncio.create_task(chaos.collect(handles))
            await chaos.kill("worker", 10, lambda: chaos.worker("gpu0"))
            late = asyncio.create_task(submit_late(pool, ran))
            await chaos.kill("conductor", 40, chaos.conductor)
            await chaos.kill("nats-server", 80, chaos.server)
            await chaos.kill("another worker", 120, lambda: chaos.worker("gpu2"))
            await collecting
            await chaos.collect([*await late, *chaos.victims])
            return chaos

    try:
        chaos = asyncio.run(main())
    except TimeoutError:
        pytest.fail(f"not all jobs became final:\n{pool.logs()}")

    assert all(left > 0 for left in chaos.unfinished_at_kill.values()), chaos.unfinished_at_kill
    assert len(chaos.unfinished_at_kill) == 4
    results = chaos.results
    assert len(results) == JOBS + LATE + len(chaos.victims)
    assert [results[victim.task_id].attempts > 1 for victim in chaos.victims] == [True, True]
    for result in results.values():
        fails = int(result.labels["n"]) % FAILING == 0
        assert (result.state, result.ok) == (("failed", False) if fails else ("done", True)), result
        assert result.stdout == f"run {result.labels['n']}\n"
        check_runs(result, lines(ran / f"{result.task_id}.begun"), lines(ran / f"{result.task_id}.ended"))

    stored = asyncio.run(on_disk(pool, _bus.STREAM_RESULTS, "gpu.task.result."))
    assert Counter(task_id for task_id, _ in stored) == Counter(results.keys())  # one each, and no other
    for task_id, data in stored:
        assert Result.of(messages.decode(data, messages.Result)) == results[task_id]

    # Events follow the results, and a kill of the server may cost some that the conductor then sends again.
    wanted = {task_id: [result.state] for task_id, result in results.items()}
    deadline = time.monotonic() + HANG
    while (ends := asyncio.run(final_events(pool))) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ends == wanted
    assert pool.run("--json", "list", user="olga").json["jobs"] == []


def check_runs(result: Result, begun: list[int], ended: list[int]) -> None:
    """No attempt ran twice, the reported one ran to its end, and there were no more of them than allowed.

    An attempt that was lost with its worker may have come to its end just before, hence once more for each loss.
    """
    assert len(set(begun)) == len(begun), f"{result.task_id}: an attempt was run twice: {begun}"
    assert begun == sorted(begun), f"{result.task_id}: an older attempt began after a newer one: {begun}"
    assert len(set(ended)) == len(ended), result.task_id
    assert ended[-1] == result.attempts, f"{result.task_id}: reported {result.attempts}, ended {ended}"
    lost = sum(event.state == "retry" and event.err == "lost" for event in result.history)
    tries = 1 + RETRIES if result.state == "failed" else 1
    assert tries <= len(ended) <= tries + lost, f"{result.task_id}: {lost} lost, ended {ended}"
    assert result.attempts == tries + lost, f"{result.task_id}: {lost} lost, {result.attempts} attempts"
