# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where jobs run, by command line and clients: several GPUs, models, warm caches, another GPU after a failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from organism.client import AsyncMaestro, InvalidJobError, JobFailedError, Maestro
from service.client.pool import Pool
from service.support import HANG

SHOW = "echo $ORGANISM_GPU_ID of $ORGANISM_GPU_IDS, $ORGANISM_GPU_SIMULATED"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool"), ("gpu0", "gpu1", "gpu2")).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def alice(pool: Pool) -> Iterator[Maestro]:
    with Maestro(pool.settings()) as maestro:
        for gpu in pool.gpus:
            maestro.submit(type="noop", gpu=gpu).result(HANG)
        yield maestro


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # the conductor tells nobody what it has heard of caches


def test_several_gpus_by_the_command_line(pool: Pool, alice: Maestro) -> None:
    done = pool.run("--json", "submit", "--gpus", "2", "--gpu", "gpu1", "--wait", "--", "sh", "-c", SHOW)
    assert done.code == 0, done
    data = done.json["result"]["data"]
    assert data["gpu_ids"][0] == "gpu1" and len(set(data["gpu_ids"])) == 2
    assert data["stdout"] == f"gpu1 of {','.join(data['gpu_ids'])}, 1\n"


def test_more_gpus_than_any_host_has_are_explained(pool: Pool, alice: Maestro) -> None:
    task_id = pool.run("submit", "--gpus", "4", "--", "true").out.strip()
    told = pool.run("explain", task_id)
    assert "no host has 4 GPUs that suit (the most are 3 on" in told.out, told
    assert pool.run("cancel", task_id).code == 0
    assert pool.run("submit", "--gpus", "0", "--", "true").code == 2


def test_the_clients_ask_for_several_gpus(pool: Pool, alice: Maestro, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    job = alice.submit(["sh", "-c", f"while ! test -e {gate}; do sleep 0.05; done"], gpus=3)
    for event in job.maestro.states(job.task_id):
        if event.state == "running":
            break
    status = job.status()
    assert {status.gpu, *status.also} == {"gpu0", "gpu1", "gpu2"}
    top = alice.top()
    assert [gpu.state for gpu in top.gpus] == ["busy"] * 3
    assert [gpu.job for gpu in top.gpus] == [job.task_id] * 3
    gate.touch()
    assert len(job.result(HANG).data["gpu_ids"]) == 3

    async def main() -> str:
        async with AsyncMaestro(pool.settings()) as maestro:
            return (await (await maestro.submit(["sh", "-c", SHOW], gpus=3)).result(HANG)).stdout

    assert "gpu0" in asyncio.run(main())
    with pytest.raises(InvalidJobError, match="gpus"):
        alice.submit(["true"], gpus=0)


def test_a_model_is_asked_for(pool: Pool, alice: Maestro) -> None:
    assert pool.run("submit", "--gpu-model", "simulated", "--wait", "--", "true").code == 0
    job = alice.submit(["true"], gpu_model="RTX 4090")
    reply = alice.explain(job.task_id)
    assert "the job wants RTX 4090" in reply.gpus[0].why
    assert "no GPU is a RTX 4090" in pool.run("explain", job.task_id).out
    job.cancel()


def test_a_job_goes_where_its_inputs_are(pool: Pool, alice: Maestro) -> None:
    (pool.workers["gpu2"].cache / "sets").mkdir(parents=True, exist_ok=True)
    (pool.workers["gpu2"].cache / "sets/a").write_text("warm")
    deep = pool.workers["gpu1"].cache / "models/llama/8b/weights"
    deep.parent.mkdir(parents=True)
    # asked for once, known ever since, however deep it lies: the first one makes it
    alice.submit(["sh", "-c", f"echo made >{deep}"], gpu="gpu1", inputs=["models/llama/8b/weights"]).result(HANG)
    probe = alice.submit(["true"], delay=600, inputs=["sets/a", "models/llama/8b/weights"])

    def known() -> bool:
        told = {gpu.gpu: gpu.why for gpu in alice.explain(probe.task_id).gpus}
        return "1 of 2" in told["gpu1"] and "1 of 2" in told["gpu2"] and "0 of 2" in told["gpu0"]

    eventually(known)
    probe.cancel()
    assert alice.submit(["true"], inputs=["models/llama/8b/weights"]).result(HANG).gpu == "gpu1"
    done = pool.run("--json", "submit", "--input", "sets/a", "--wait", "--", "true")
    assert done.json["result"]["gpu"] == "gpu2"
    assert pool.run("submit", "--input", "../../etc/passwd", "--", "true").code == 2


def test_a_failed_job_is_tried_on_another_gpu(pool: Pool, alice: Maestro, tmp_path: Path) -> None:
    script = "test -e {0} || {{ echo $ORGANISM_GPU_ID >{0}; exit 1; }}; cat {0}; echo $ORGANISM_GPU_ID"
    done = pool.run(
        "--json", "submit", "--retries", "1", "--wait", "--", "sh", "-c", script.format(tmp_path / "by-command")
    )
    assert done.code == 0, done
    first, second = done.json["result"]["data"]["stdout"].split()
    assert first != second
    result = alice.submit(["sh", "-c", script.format(tmp_path / "by-client")], max_retries=1).result(HANG)
    first, second = result.stdout.split()
    assert first != second and result.gpu == second


@dataclass
class Score:
    loss: float
    epochs: int


def test_a_value_comes_back_as_the_callers_type(pool: Pool, alice: Maestro) -> None:
    job = alice.submit(["sh", "-c", """echo '{"loss": 0.5, "epochs": 3}' >$ORGANISM_VALUE"""])
    assert job.result(HANG).value_as(Score) == Score(0.5, 3)
    failed = alice.submit(["false"], max_retries=0)
    with pytest.raises(JobFailedError, match="return code 1"):
        failed.result(HANG).checked()

    async def main() -> Score:
        async with AsyncMaestro(pool.settings()) as maestro:
            return (await maestro.job(job.task_id).result(HANG)).value_as(Score)

    assert asyncio.run(main()).epochs == 3
    assert pool.run("--json", "result", job.task_id).json["result"]["data"]["value"] == {"loss": 0.5, "epochs": 3}


def test_a_drained_gpu_and_a_dead_letter_by_the_client(pool: Pool, alice: Maestro) -> None:
    with Maestro(pool.settings("olga")) as olga:
        assert olga.drain("gpu0").state == "drained"
        large = alice.submit(["true"], gpus=3)
        assert "no host has 3 suitable GPUs that can take it now" in alice.explain(large.task_id).summary
        assert olga.drain("gpu0", on=False).state != "drained"
        assert large.result(HANG).ok
    dead = alice.submit(shell="true")  # shell jobs are off here
    assert dead.result(HANG).state == "dead"
    [letter] = [letter for letter in alice.dead().dead if letter.task_id == dead.task_id]
    assert "shell" in letter.reason
    again = alice.replay(seq=letter.seq)
    assert again.result(HANG).state == "dead" and again.task_id != dead.task_id
    listed = pool.run("--json", "dead", "list")
    assert {letter["task_id"] for letter in listed.json["dead"]} >= {dead.task_id, again.task_id}
    assert pool.run("dead", "replay", dead.task_id).code == 0
