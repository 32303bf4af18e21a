# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs of type ``python``: a program that travels with its job, by command line, job file and client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from organism.client import Maestro
from service.client.pool import Pool

PROGRAM = """\
#!/usr/bin/python3
# A score of its input.
import json
import os
import sys

with open(os.environ["ORGANISM_ARGS"]) as file:
    given = json.load(file)
with open(os.environ["ORGANISM_VALUE"], "w") as file:
    json.dump({"loss": given["lr"] * 2, "words": sys.argv[1:]}, file)
print("scored", os.environ["ORGANISM_GPU_ID"], os.environ.get("SITE_PYTHON"))
"""
LIMITS = """
[users.bob]
types = ["cmd", "noop"]
"""


@dataclass
class Score:
    loss: float
    words: list[str]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder: Path = tmp_path_factory.mktemp("pool")
    folder.joinpath("limits.toml").write_text(LIMITS)
    interpreter = folder / "site-python"
    interpreter.write_text(f'#!/bin/sh\nSITE_PYTHON=yes exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    made = Pool(folder, gpus=("gpu0",), worker={"JOB_PYTHON": interpreter}, LIMITS_FILE=folder / "limits.toml").start()
    yield made
    made.stop()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "score.py"
    path.write_text(PROGRAM)
    return path


def test_the_command_line_sends_a_program_with_arguments_and_input(pool: Pool, program: Path) -> None:
    words = ["submit", "--python", str(program), "--args", '{"lr": 0.5}', "--wait", "--", "--epochs", "a b"]
    done = pool.run("--json", *words)
    result = done.json["result"]
    assert (done.code, result["state"], result["data"]["type"]) == (0, "done", "python"), done
    assert result["data"]["stdout"] == "scored gpu0 yes\n"  # by the interpreter of the worker's settings
    assert result["data"]["value"] == {"loss": 1.0, "words": ["--epochs", "a b"]}
    assert pool.run("logs", done.json["task_id"]).out == "scored gpu0 yes\n"

    waiting = pool.run("submit", "--python", "-", "--delay", "600", "--", "x", stdin=PROGRAM).out.strip()
    assert "command:    python: import json x" in pool.run("status", waiting).out
    assert pool.run("cancel", waiting).code == 0
    failed = pool.run("--json", "submit", "--python", "-", "--retries", "0", "--wait", stdin="import nowhere_found\n")
    assert (failed.code, failed.json["result"]["error"]) == (1, "exit")
    assert "No module named 'nowhere_found'" in failed.json["result"]["data"]["stderr"]


def test_the_client_gets_a_typed_value_of_a_file_or_a_text(pool: Pool, program: Path) -> None:
    with Maestro(pool.settings()) as maestro:
        of_file = maestro.submit(python=program, argv=["a"], args={"lr": 1})
        of_text = maestro.submit(python=PROGRAM, args={"lr": 2})
        assert of_file.result(60).value_as(Score) == Score(2.0, ["a"])
        assert of_text.result(60).value_as(Score) == Score(4.0, [])
        assert maestro.status(of_text.task_id).type == "python"
        [first, second] = maestro.submit_array(2, python="import os\nprint(os.environ['ORGANISM_ARRAY_INDEX'])\n")
        assert (first.result(60).stdout, second.result(60).stdout) == ("0\n", "1\n")


def test_a_job_file_names_a_program_or_has_its_text(pool: Pool, program: Path) -> None:
    file = program.with_name("jobs.yml")
    file.write_text(
        "jobs:\n"
        "  - {name: score, python_file: score.py, argv: [7], args: {lr: 3}}\n"
        "  - name: after\n    after: [score]\n    python: |\n      print('second')\n"
    )
    done = pool.run("--json", "submit", "-f", str(file), "--wait")
    assert done.code == 0, done
    score, after = (result["data"] for result in done.json["results"])
    assert score["value"] == {"loss": 6, "words": ["7"]}
    assert after["stdout"] == "second\n"
    with Maestro(pool.settings()) as maestro:
        assert [handle.result(60).ok for handle in maestro.submit_file(file)] == [True, True]


def test_a_refusal_names_its_rule(pool: Pool, program: Path, tmp_path: Path) -> None:
    refused = pool.run("--json", "submit", "--python", str(program), "--wait", user="bob")
    assert (refused.code, refused.json["result"]["state"]) == (1, "dead")
    assert "type python is not among this user's types (users.bob.types is cmd, noop)" in str(refused.json)

    named = Pool(tmp_path / "named", gpus=("gpu0",), policy='[jobs]\ntypes = ["cmd"]\n').start()
    try:
        with Maestro(named.settings()) as maestro:
            result = maestro.submit(python=program).result(60)
            assert (result.state, result.error) == ("dead", "refused")
            assert "type python is not allowed by this site's policy (allowed: cmd; set in" in result.reason
    finally:
        named.stop()


def test_a_worker_without_an_interpreter_offers_none_and_the_job_says_so(program: Path, tmp_path: Path) -> None:
    pool = Pool(tmp_path / "without", gpus=("gpu0",), worker={"JOB_PYTHON": "/no/such/python"}).start()
    try:
        assert pool.run("submit", "--wait", "--", "true").code == 0
        task_id = pool.run("submit", "--python", str(program)).out.strip()
        with Maestro(pool.settings()) as maestro:
            assert "no worker offers jobs of type python" in maestro.explain(task_id).summary
        assert "JOB_PYTHON=/no/such/python is no program" in pool.workers["gpu0"].log.read_text()
    finally:
        pool.stop()
