# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dependencies, arrays, unique jobs and deadlines as users write them: command line and client, real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from organism.client import InvalidJobError, Maestro
from service.client.pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool")).start()
    yield made
    made.stop()


def test_a_job_after_another_by_command_line(pool: Pool) -> None:
    first = pool.run("submit", "--retries", "0", "--", "false").out.strip()
    rescue = pool.run("submit", "--after", f"{first}:failed", "--", "echo", "mended").out.strip()
    lost = pool.run("submit", "--after", first, "--", "echo", "never").out.strip()
    done = pool.run("--json", "wait", rescue, lost)
    assert done.code == 1, done
    states = {result["task_id"]: (result["state"], result["error"]) for result in done.json["results"]}
    assert states == {rescue: ("done", None), lost: ("cancelled", "dependency")}
    assert first in pool.run("result", lost).out


def test_why_a_job_waits_for_another_is_told(pool: Pool) -> None:
    first = pool.run("submit", "--delay", "600", "--", "true").out.strip()
    second = pool.run("submit", "--after", first, "--", "true").out.strip()
    assert f"waits for the end of {first}" in pool.run("status", second).out
    assert pool.run("cancel", first).code == 0
    assert pool.run("--json", "result", second).json["result"]["error"] == "dependency"


def test_an_array_by_command_line_gives_each_job_its_index(pool: Pool) -> None:
    words = ["--array", "3", "--task-id", "sweep", "--env", "A=b", "--", "printenv", "A", "ORGANISM_ARRAY_INDEX"]
    done = pool.run("--json", "submit", *words)
    assert done.json["task_ids"] == ["sweep-0", "sweep-1", "sweep-2"], done
    waited = pool.run("--json", "wait", *done.json["task_ids"])
    found = {result["task_id"]: result["data"]["stdout"] for result in waited.json["results"]}
    assert found == {f"sweep-{index}": f"b\n{index}\n" for index in range(3)}
    assert {result["labels"]["array"] for result in waited.json["results"]} == {"sweep"}
    assert pool.run("submit", "--array", "0", "--", "true").code == 2
    assert pool.run("submit", "--array", "2", "--unique", "k", "--", "true").code == 2


def test_a_deadline_and_a_unique_key_by_command_line(pool: Pool) -> None:
    late = pool.run("--json", "submit", "--deadline", "0.5", "--delay", "600", "--wait", "--", "true")
    assert (late.code, late.json["result"]["error"]) == (1, "deadline"), late
    holder = pool.run("submit", "--unique", "nightly", "--delay", "600", "--", "true").out.strip()
    second = pool.run("--json", "submit", "--unique", "nightly", "--wait", "--", "true")
    assert (second.code, second.json["result"]["error"]) == (1, "unique"), second
    assert holder in second.json["result"]["reason"]
    assert pool.run("cancel", holder).code == 0


def test_the_same_by_the_client(pool: Pool) -> None:
    with Maestro(pool.settings()) as maestro:
        parts = maestro.submit_array(4, cmd=["printenv", "ORGANISM_ARRAY_INDEX"])
        end = maestro.submit(["echo", "all"], after=[part.task_id for part in parts])
        assert end.result(60).data["stdout"] == "all\n"
        assert [part.result(60).data["stdout"] for part in parts] == [f"{index}\n" for index in range(4)]
        alarm = maestro.submit(["true"], after=[f"{end.task_id}:failed"]).result(60)
        assert (alarm.state, alarm.error) == ("cancelled", "dependency")
        hopeless = maestro.submit(["true"], delay=600, deadline=0.3).result(60)
        assert (hopeless.state, hopeless.error) == ("failed", "deadline")
        with pytest.raises(InvalidJobError, match="after"):
            maestro.submit(["true"], after=["a:whenever"])
        with pytest.raises(InvalidJobError, match="array"):
            maestro.submit_array(0, cmd=["true"])
