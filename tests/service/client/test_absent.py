# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the command line says when bus, conductor or workers are away, and that a job accepted then is done later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client.pool import Pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path, gpus=["gpu0"])
    yield made
    made.stop()


def test_without_a_bus_everything_ends_with_3(pool: Pool) -> None:
    for words in (["submit", "--", "true"], ["list"], ["wait", "job"]):
        done = pool.run("--json", "--patience", "1", *words)
        assert (done.code, done.json["ok"], done.json["error"]["code"]) == (3, False, "bus_unreachable"), words
        assert "systemctl status nats-server" in done.json["error"]["message"]
    report = pool.run("--json", "--patience", "1", program="validate")
    assert report.code == 1
    assert [(check["check"], check["ok"]) for check in report.json["checks"]] == [("bus", False)]


def test_a_job_accepted_without_conductor_and_worker_is_done_when_they_come(pool: Pool) -> None:
    pool.bus.ready()
    done = pool.run("--json", "submit", "--", "echo", "late")
    assert (done.code, done.json["ok"]) == (0, True)
    task_id = done.json["task_id"]
    asked = pool.run("--json", "--patience", "0.5", "status", task_id)
    assert (asked.code, asked.json["error"]["code"]) == (3, "conductor_unreachable")
    assert "safe on the bus" in asked.json["error"]["message"]
    report = pool.run("--json", "--patience", "0.5", program="validate", user="olga").json
    verdicts = {check["check"]: check["ok"] for check in report["checks"]}
    assert (report["ok"], verdicts["bus"], verdicts["conductor"], verdicts["gpu.job"]) == (False, True, False, None)
    pool.conductor.start()
    waiting = pool.run("--json", "wait", task_id, "--timeout", "1")
    assert (waiting.code, waiting.json["pending"]) == (1, [task_id])
    pool.workers["gpu0"].start()
    ended = pool.run("--json", "wait", task_id)
    assert ended.code == 0, pool.logs()
    assert ended.json["results"][0]["data"]["stdout"] == "late\n"
