# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Job files by the command line and by the clients, on a real pool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from organism.client import AsyncMaestro, JobFileError, Maestro
from service.client.pool import Pool
from service.support import HANG

CHAIN = """\
defaults: {{labels: {{run: {run}}}}}
jobs:
  - name: last
    after: [many]
    cmd: [echo, last]
  - name: many
    array: 2
    after: [first]
    cmd: [sh, -c, "echo $ORGANISM_ARRAY_INDEX"]
  - name: first
    cmd: [echo, first]
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool")).start()
    yield made
    made.stop()


def write(folder: Path, text: str) -> str:
    file = folder / "jobs.yml"
    file.write_text(text)
    return str(file)


def test_a_chain_in_a_file_runs_in_its_order(pool: Pool, tmp_path: Path) -> None:
    done = pool.run("--json", "submit", "-f", write(tmp_path, CHAIN.format(run="cli")), "--wait")
    assert done.code == 0, done
    results = {result["data"]["stdout"]: result for result in done.json["results"]}
    assert set(results) == {"first\n", "0\n", "1\n", "last\n"}
    ended = {out: result["data"]["finished"] for out, result in results.items()}
    started = {out: result["data"]["started"] for out, result in results.items()}
    assert ended["first\n"] <= min(started["0\n"], started["1\n"])
    assert max(ended["0\n"], ended["1\n"]) <= started["last\n"]
    assert {result["labels"]["run"] for result in results.values()} == {"cli"}


def test_stdin_is_a_file_too(pool: Pool) -> None:
    done = pool.run("submit", "-f", "-", "--wait", stdin="- cmd: [echo, hi]\n")
    assert done.code == 0, done


def test_mistakes_end_with_2_and_nothing_is_sent(pool: Pool, tmp_path: Path) -> None:
    file = write(
        tmp_path, "- cmd: [echo, hi]\n  labels: {run: wrong}\n- cmd: [echo]\n  retrys: 3\n- {type: nope, a: b}\n"
    )
    done = pool.run("submit", "-f", file)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0].startswith(f"{file}:4: unknown field retrys")
    assert done.err.splitlines()[1].startswith(f"{file}:5: unknown field a")
    told = pool.run("--json", "submit", "-f", file)
    assert (told.code, len(told.json["error"]["problems"])) == (2, 2)
    with Maestro(pool.settings()) as maestro:
        with pytest.raises(JobFileError):
            maestro.submit_file(file)
        assert all(job.labels.get("run") != "wrong" for job in maestro.list(all=True, limit=1000).jobs)


def test_a_dry_run_needs_no_bus_and_sends_nothing(pool: Pool, tmp_path: Path) -> None:
    context = tmp_path / "nowhere.toml"
    context.write_text('servers = ["nats://127.0.0.1:1"]\nuser = "alice"\n')
    file = write(tmp_path, CHAIN.format(run="dry"))
    done = pool.run("--json", "--context", str(context), "submit", "--dry-run", "-f", file)
    assert done.code == 0, done
    assert done.json["jobs"][0]["cmd"][-1] == "first"
    assert len(done.json["jobs"]) == 4
    shown = pool.run("--context", str(context), "submit", "--dry-run", "--priority", "3", "--", "echo", "hello")
    assert shown.code == 0 and "echo hello" in shown.out
    assert pool.run("--context", str(context), "submit", "--dry-run", "--priority", "300", "--", "echo").code == 2
    assert all(job["labels"].get("run") != "dry" for job in pool.run("--json", "list", "--all").json["jobs"])


def test_the_clients_submit_files(pool: Pool, tmp_path: Path) -> None:
    file = write(tmp_path, CHAIN.format(run="client"))
    with Maestro(pool.settings()) as maestro:
        results = maestro.wait(maestro.submit_file(file), timeout=HANG)
        assert [result.state for result in results.values()] == ["done"] * 4

    async def main() -> int:
        async with AsyncMaestro(pool.settings()) as maestro:
            return len(await maestro.wait(await maestro.submit_file(file), timeout=HANG))

    assert asyncio.run(main()) == 4
