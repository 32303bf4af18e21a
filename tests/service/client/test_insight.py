# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why does it wait, what has become of it, how far is it: by the command line and by the clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from organism.client import AccessDeniedError, AsyncMaestro, Maestro, NotFoundError, RequestError
from service.client.pool import Pool
from service.support import HANG

REPORTS = """
echo '{"fraction": 0.25, "text": "epoch 1 of 4"}' >$ORGANISM_PROGRESS
while ! test -e %s; do sleep 0.05; done
echo '75%% nearly' >$ORGANISM_PROGRESS
while ! test -e %s; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool")).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def alice(pool: Pool) -> Iterator[Maestro]:
    with Maestro(pool.settings()) as maestro:
        yield maestro


@pytest.fixture(scope="module")
def olga(pool: Pool) -> Iterator[Maestro]:
    with Maestro(pool.settings("olga")) as maestro:
        yield maestro


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_a_job_that_no_gpu_suits_is_explained_gpu_by_gpu(pool: Pool, alice: Maestro) -> None:
    job = alice.submit(["true"], min_vram_mb=99_999)
    for gpu in pool.gpus:
        alice.submit(type="noop", gpu=gpu).result(HANG)  # by now both workers have been heard
    reply = alice.explain(job.task_id)
    assert [(one.gpu, one.suits, one.free) for one in reply.gpus] == [("gpu0", False, False), ("gpu1", False, False)]
    assert "it has 8192 MiB of memory, the job wants 99999" in reply.gpus[0].why
    assert "no GPU is of the kind it wants" in reply.next
    shown = pool.run("explain", job.task_id)
    assert shown.code == 0
    assert "no GPU has 99999 MiB of memory" in shown.out
    assert "gpu1" in shown.out and "the job wants 99999" in shown.out
    assert pool.run("--json", "explain", job.task_id).json["gpus"][1]["suits"] is False
    job.cancel()


def test_pauses_delays_and_other_jobs_are_named(pool: Pool, alice: Maestro, olga: Maestro) -> None:
    first = alice.submit(["true"], delay=600, deadline=3600)
    reply = alice.explain(first.task_id)
    assert 0 < reply.ready_in <= 600
    assert reply.deadline_in is not None and 0 < reply.deadline_in <= 3600
    second = alice.submit(["true"], after=[first.task_id])
    assert alice.explain(second.task_id).waits_for == {first.task_id: "enqueued"}
    assert f"maestroctl explain {first.task_id}" in pool.run("explain", second.task_id).out
    first.cancel()
    olga.pause("night")
    sleeper = alice.submit(["true"], queue="night")
    assert alice.explain(sleeper.task_id).paused
    assert "maestroctl resume night" in pool.run("explain", sleeper.task_id).out
    olga.pause("night", on=False)
    assert sleeper.result(HANG).ok


def test_the_place_in_the_queue_is_counted_by_user(pool: Pool, alice: Maestro, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    with Maestro(pool.settings("bob")) as bob:
        holders = [
            bob.submit(["sh", "-c", f"while ! test -e {gate}; do sleep 0.05; done"], gpu=gpu, priority=50)
            for gpu in pool.gpus
        ]
        for holder in holders:
            for event in bob.states(holder.task_id):
                if event.state == "running":
                    break
        early = bob.submit_many([{"type": "noop", "priority": 10}] * 3)
        other = bob.submit(["true"], min_vram_mb=99_999, priority=10)  # uses nothing that the late one wants
        late = alice.submit(type="noop")
        reply = alice.explain(late.task_id)
        assert (reply.ahead, reply.ahead_by_user) == (3, {"bob": 3})
        assert reply.order.startswith("priority, then arrival")
        assert [one.why for one in reply.gpus] == [f"it has {holder.task_id}" for holder in holders]
        assert "3 waiting jobs (bob 3)" in pool.run("explain", late.task_id).out
        running = bob.explain(holders[0].task_id)
        assert running.summary == "attempt 1 is running on gpu0"
        gate.touch()
        other.cancel()
        assert all(handle.result(HANG).ok for handle in [*early, *holders])
        assert late.result(HANG).ok


def test_the_end_of_a_job_is_explained_too_and_others_jobs_are_not(pool: Pool, alice: Maestro) -> None:
    job = alice.submit(["sh", "-c", "exit 3"], max_retries=0)
    job.result(HANG)
    reply = alice.explain(job.task_id)
    assert (reply.state, reply.next) == ("failed", f"maestroctl result {job.task_id} shows its output")
    assert "return code 3" in reply.summary
    with Maestro(pool.settings("bob")) as bob, pytest.raises(NotFoundError):
        bob.explain(job.task_id)
    assert pool.run("explain", job.task_id, user="bob").code == 1


# ---- history ---------------------------------------------------------------------------------------------------------


def test_history_lists_what_has_ended_and_chooses(pool: Pool, alice: Maestro, olga: Maestro) -> None:
    good = alice.submit(["sleep", "0.2"], labels={"run": "h1"})
    bad = alice.submit(["false"], labels={"run": "h1"}, max_retries=1)
    alice.wait([good, bad], timeout=HANG)
    found = {job.task_id: job for job in alice.history(label="run=h1")}
    assert set(found) == {good.task_id, bad.task_id}
    assert (found[bad.task_id].state, found[bad.task_id].attempts, found[bad.task_id].returncode) == ("failed", 2, 1)
    run, wait = found[good.task_id].run, found[good.task_id].wait
    assert run is not None and run >= 0.2
    assert wait is not None and wait >= 0
    assert [job.task_id for job in alice.history(label="run=h1", state="failed")] == [bad.task_id]
    shown = pool.run("history", "--label", "run=h1", "--since", "1h")
    assert shown.code == 0 and good.task_id in shown.out and bad.task_id in shown.out
    assert (
        pool.run("--json", "history", "--label", "run=h1", "--state", "done").json["jobs"][0]["task_id"] == good.task_id
    )
    assert {job.user for job in olga.history(all=True, limit=1000)} >= {"alice"}
    with pytest.raises(AccessDeniedError):
        alice.history(all=True)
    assert pool.run("history", "--user", "alice", user="bob").code == 1
    with pytest.raises(RequestError):
        alice.history(since="yesterday")
    with pytest.raises(SystemExit) as usage:
        pool.run("history", "--since", "yesterday")
    assert usage.value.code == 2


def test_history_goes_back_in_pages(pool: Pool, olga: Maestro) -> None:
    with Maestro(pool.settings("bob")) as bob:
        handles = bob.submit_many([{"type": "noop", "labels": {"run": "pages"}}] * 30)
        bob.wait(handles, timeout=HANG)
        assert len(bob.history(label="run=pages", limit=7)) == 7
        ids = [job.task_id for job in bob.history(label="run=pages")]
    assert sorted(ids) == sorted(handle.task_id for handle in handles)
    ends = [job.ended for job in olga.history(all=True, limit=1000)]
    assert ends == sorted(ends, reverse=True)


def test_the_story_of_one_job_finished_or_not(pool: Pool, alice: Maestro) -> None:
    job = alice.submit(["false"], max_retries=1)
    job.result(HANG)
    told = pool.run("history", job.task_id)
    assert [word for word in ("enqueued", "scheduled", "retry", "failed") if word in told.out] == [
        "enqueued",
        "scheduled",
        "retry",
        "failed",
    ]
    waiting = alice.submit(["true"], delay=600)
    story = pool.run("--json", "history", waiting.task_id).json
    assert [event["state"] for event in story["history"]] == ["enqueued"]
    waiting.cancel()


# ---- progress --------------------------------------------------------------------------------------------------------


def test_a_job_tells_how_far_it_is(pool: Pool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"

    async def main() -> list[tuple[float | None, str]]:
        told = []
        async with AsyncMaestro(pool.settings()) as maestro, asyncio.timeout(HANG):
            job = await maestro.submit(["sh", "-c", REPORTS % (one, two)])
            async with aclosing(maestro.progress(job.task_id)) as steps:
                async for step in steps:
                    told.append((step.progress, step.progress_text))
                    if step.progress == 0.25:
                        shown = await asyncio.to_thread(pool.run, "status", job.task_id)
                        assert "25 %  epoch 1 of 4" in shown.out
                        [gpu] = [gpu for gpu in (await maestro.top()).gpus if gpu.job == job.task_id]
                        assert gpu.progress == 0.25
                        assert "25%" in (await asyncio.to_thread(pool.run, "top", "--once")).out
                        one.touch()
                    else:
                        two.touch()
            assert (await job.result(HANG)).ok
        return told

    assert asyncio.run(main()) == [(0.25, "epoch 1 of 4"), (0.75, "nearly")]


def test_watch_shows_progress_and_ends_with_the_result(pool: Pool, tmp_path: Path) -> None:
    script = "import organism.client as c, time; c.progress(0.5, 'half'); time.sleep(3); print(c.progress(1))"
    done = pool.run("submit", "--", sys.executable, "-c", script)
    told = pool.run("watch", done.out.strip(), "--timeout", "50")
    assert told.code == 0, told
    assert "50 %  half" in told.out
    assert "True" in told.out  # the job's own output


def test_what_a_job_writes_there_is_not_trusted(pool: Pool, alice: Maestro) -> None:
    nonsense = "mkfifo $P; sleep 1.5; rm $P; head -c 100000 /dev/zero >$P; sleep 1.5"
    assert alice.submit(["sh", "-c", f"P=$ORGANISM_PROGRESS; {nonsense}"]).result(HANG).ok
    assert alice.submit(["sh", "-c", "echo '{\"fraction\": 1e999}' >$ORGANISM_PROGRESS; sleep 1.5"]).result(HANG).ok
    result = alice.submit(["sh", "-c", "mkdir $ORGANISM_PROGRESS $ORGANISM_VALUE"], gpu="gpu0", max_retries=0).result(
        HANG
    )
    assert (result.ok, result.attempts) == (True, 1), result
    assert "value.json is ignored" in result.data["message"]
    assert alice.submit(["true"], gpu="gpu0").result(HANG).attempts == 1
    assert "dead" not in {gpu.state for gpu in alice.top().gpus}
