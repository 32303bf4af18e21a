# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits of users, fair turns and paused queues: command line and client, real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from organism.client import Maestro
from service.client.pool import Pool

LIMITS = """
[defaults]
max_priority = 10
[users.alice]
max_queued = 3
max_running = 1
max_gpu_seconds = 7200
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder: Path = tmp_path_factory.mktemp("pool")
    limits = folder / "limits.toml"
    limits.write_text(LIMITS)
    made = Pool(folder, LIMITS_FILE=limits).start()
    yield made
    made.stop()


def test_what_is_beyond_a_limit_is_refused_by_its_rule(pool: Pool) -> None:
    high = pool.run("--json", "submit", "--priority", "11", "--wait", "--", "true", user="bob")
    assert (high.code, high.json["result"]["state"], high.json["result"]["error"]) == (1, "dead", "refused"), high
    assert "defaults.max_priority is 10" in high.json["result"]["reason"]
    long = pool.run("--json", "submit", "--timeout", "7201", "--wait", "--", "true")
    assert "users.alice.max_gpu_seconds is 7200" in long.json["result"]["reason"]
    held = [pool.run("submit", "--delay", "600", "--", "true").out.strip() for _ in range(3)]
    fourth = pool.run("--json", "submit", "--wait", "--", "true")
    assert "users.alice.max_queued is 3" in fourth.json["result"]["reason"], fourth
    assert pool.run("cancel", *held).code == 0
    assert pool.run("submit", "--wait", "--", "true").code == 0


def test_a_user_has_no_more_running_jobs_than_allowed_and_is_told_why_they_wait(pool: Pool) -> None:
    with Maestro(pool.settings("alice")) as alice, Maestro(pool.settings("bob")) as bob:
        first = alice.submit(["sleep", "600"])
        for event in alice.states(first.task_id):
            if event.state == "running":
                break
        second = alice.submit(["true"])
        assert bob.submit(["true"]).result(60).ok  # the other GPU is free, for others
        assert "users.alice.max_running is 1" in alice.status(second.task_id).reason
        assert "users.alice.max_running is 1" in pool.run("status", second.task_id).out
        alice.cancel(first.task_id)
        assert second.result(60).ok


def test_operators_pause_a_queue_and_let_it_go_on(pool: Pool) -> None:
    assert pool.run("pause", "bulk", user="bob").code == 1
    assert pool.run("pause", "bulk", user="olga").out.split() == ["queue", "bulk", "paused"]
    waiting = pool.run("submit", "--queue", "bulk", "--", "true", user="bob").out.strip()
    assert pool.run("submit", "--wait", "--", "true", user="bob").code == 0
    assert "queue bulk is paused" in pool.run("status", waiting, user="bob").out
    assert pool.run("--json", "top", "--once").json["paused"] == ["bulk"]
    pool.conductor.kill9()  # the next one knows of it
    pool.conductor.start()
    assert pool.run("submit", "--wait", "--", "true", user="bob").code == 0
    assert "queue bulk is paused" in pool.run("status", waiting, user="bob").out
    with Maestro(pool.settings("olga")) as olga:
        assert list(olga.pause("bulk", on=False)) == []
    assert pool.run("wait", waiting, user="bob").code == 0


def test_users_take_turns_and_the_history_says_why(pool: Pool) -> None:
    with Maestro(pool.settings("bob")) as bob, Maestro(pool.settings("olga")) as olga:
        bob.submit(["sleep", "1"], gpu="gpu0").result(60)  # somebody who has used the pool, and somebody who has not
        olga.pause("default")
        bobs = [bob.submit(["true"], gpu="gpu0") for _ in range(3)]
        olgas = olga.submit(["true"], gpu="gpu0")
        for who, job in ((bob, bobs[-1]), (olga, olgas)):
            next(iter(who.states(job.task_id)))  # the conductor knows of it
        olga.pause("default", on=False)
        result = olgas.result(60)
        [reason] = [event.reason for event in result.history if event.state == "scheduled"]
        assert reason is not None
        assert f"{bobs[0].task_id} would be first, but bob has used" in reason
        assert all(job.result(60).ok for job in bobs)
