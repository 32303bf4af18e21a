# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A long output outlives its worker: the bus has the whole of it, for its owner alone, while there is room."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from organism.bus.jetstream import JetStream
from organism.client import Maestro, NotFoundError
from organism.core import _bus
from service.client.pool import Pool
from service.support import HANG, SMALL

LINE = "Zeile {:07} — Maßstab 1:1 ✓\n"
"""With characters of two and three bytes, so that pieces end within some."""
SCRIPT = f"import sys; sys.stdout.write(''.join({LINE!r}.format(number) for number in range(int(sys.argv[1]))))"
MANY = 580_000


def whole(count: int) -> str:
    return "".join(LINE.format(number) for number in range(count))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path, gpus=("gpu0",), worker={"LOG_UPLOAD_MB_SEC": 200, "JOB_PYTHON": sys.executable})
    yield made.start()
    made.stop()


def say(maestro: Maestro, count: int) -> str:
    """A finished job that has written so many lines; its id."""
    job = maestro.submit([sys.executable, "-c", SCRIPT, str(count)])
    result = job.result(HANG)
    assert result.ok, result
    assert "bytes left out" in result.stdout
    return job.task_id


def sent(pool: Pool, task_id: str) -> None:
    """Waits until the worker has nothing more to send of it."""
    attempt = pool.workers["gpu0"].cache / f"tasks/{task_id}/1"
    deadline = time.monotonic() + HANG
    while not (attempt / "acknowledged").exists() or (attempt / "owed").exists():
        assert time.monotonic() < deadline, pool.logs()
        time.sleep(0.02)  # nobody is told of the end of an upload, since nobody waits for it


def text(maestro: Maestro, task_id: str) -> str:
    return "".join(chunk.text for chunk in maestro.logs(task_id))


def change(pool: Pool, limits: _bus.Limits) -> None:
    asyncio.run(pool.bus.apply_topology(limits=limits))


def drop_bucket(pool: Pool) -> None:
    async def main() -> None:
        nc = await pool.bus.connected("admin", "setup")
        await JetStream(nc).api(f"STREAM.DELETE.{_bus.STREAM_LOGS}")
        await nc.close()

    asyncio.run(main())


def test_twenty_megabytes_come_back_when_the_worker_is_gone_and_to_their_owner_alone(pool: Pool) -> None:
    expected = whole(MANY)
    assert len(expected.encode()) > 20_000_000
    with Maestro(pool.settings()) as alice, Maestro(pool.settings("bob")) as bob:
        task_id = say(alice, MANY)
        sent(pool, task_id)
        pool.workers["gpu0"].kill()
        assert text(alice, task_id) == expected
        assert pool.run("logs", task_id).out == expected
        with pytest.raises(NotFoundError):
            text(bob, task_id)
        assert pool.run("logs", task_id, user="bob").code == 1


def test_no_bucket_delays_no_report_and_a_restarted_worker_sends_what_it_owes(pool: Pool) -> None:
    drop_bucket(pool)
    with Maestro(pool.settings()) as alice:
        task_id = say(alice, 10_000)
        assert alice.submit(["true"]).result(HANG).ok
        worker = pool.workers["gpu0"]
        assert (worker.cache / f"tasks/{task_id}/1/owed").exists()
        worker.kill()
        assert "bytes left out" in text(alice, task_id)  # nobody has more at this moment
        change(pool, SMALL)
        worker.start()
        sent(pool, task_id)
        worker.kill()
        assert text(alice, task_id) == whole(10_000)


def test_a_second_upload_replaces_the_first_and_a_full_bucket_drops_the_oldest(pool: Pool) -> None:
    with Maestro(pool.settings()) as alice:
        first = say(alice, 60_000)  # 2.1 MB
        sent(pool, first)
        before = stored(pool)
        worker = pool.workers["gpu0"]
        worker.kill()
        (worker.cache / f"tasks/{first}/1/owed").touch()
        worker.start()
        sent(pool, first)
        assert stored(pool) == before

        change(pool, replace(SMALL, logs_bytes=3 * _bus.MIB))
        second = say(alice, 60_000)
        sent(pool, second)
        worker.kill()
        assert text(alice, second) == whole(60_000)
        cut = text(alice, first)
        assert cut.startswith(LINE.format(0)) and cut.endswith(LINE.format(59_999)) and "bytes left out" in cut
        assert alice.job(first).result(HANG).ok


def stored(pool: Pool) -> int:
    """Messages in the bucket."""

    async def main() -> int:
        nc = await pool.bus.connected("admin", "setup")
        state = (await JetStream(nc).info(_bus.STREAM_LOGS))["state"]
        await nc.close()
        return int(state["messages"])

    return asyncio.run(main())
