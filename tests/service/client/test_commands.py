# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole way through the command line and the client: real server, conductor, workers, jobs (S1k-038 to 043)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from organism.bus import keys
from organism.cli import _validation
from organism.client import AsyncMaestro, ConflictError, Maestro, NotFoundError, _waiting
from organism.core import _bus
from service.client.pool import Pool
from service.support import HANG


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool")).start()
    yield made
    made.stop()


def submitted(pool: Pool, *words: str, user: str = "alice") -> str:
    done = pool.run("--json", "submit", *words, user=user)
    assert done.code == 0, done
    return str(done.json["task_id"])


async def until_running(pool: Pool, task_id: str) -> None:
    async with (
        AsyncMaestro(pool.settings()) as maestro,
        asyncio.timeout(HANG),
        aclosing(maestro.states(task_id)) as events,
    ):
        async for event in events:
            if event.state == "running":
                return
    raise AssertionError(f"{task_id} ended without running")


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_and_the_result_comes(pool: Pool) -> None:
    done = pool.run("submit", "--gpu", "gpu1", "--label", "run=7", "--", "echo", "hello there")
    assert (done.code, done.err) == (0, "")
    task_id = done.out.strip()
    waited = pool.run("--json", "wait", task_id, "--timeout", "50")
    assert waited.code == 0, waited
    [result] = waited.json["results"]
    assert (result["task_id"], result["ok"], result["state"], result["gpu"]) == (task_id, True, "done", "gpu1")
    assert result["data"]["stdout"] == "hello there\n"
    assert result["labels"] == {"run": "7"}
    assert [event["state"] for event in result["history"]][-1] == "done"
    # asked again when it is long over: at once (S1k-D02)
    assert pool.run("result", task_id).out.splitlines()[1:] == ["hello there"]
    assert pool.run("--json", "status", task_id).json["job"]["state"] == "done"


def test_a_job_finds_a_gpu_of_its_own_and_gets_its_environment(pool: Pool) -> None:
    done = pool.run(
        "submit", "--env", "WORD=x=y", "--wait", "--", "sh", "-c", "echo $WORD on $ORGANISM_GPU_ID; echo oops >&2"
    )
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[1] in ("x=y on gpu0", "x=y on gpu1")
    assert lines[2:] == ["-- stderr:", "oops"]


def test_a_failed_job_ends_the_wait_with_1(pool: Pool) -> None:
    done = pool.run("--json", "submit", "--retries", "1", "--wait", "--", "sh", "-c", "echo half; exit 7")
    assert done.code == 1
    result = done.json["result"]
    assert (result["ok"], result["state"], result["error"], result["attempts"]) == (False, "failed", "exit", 2)
    assert (result["data"]["returncode"], result["data"]["stdout"]) == (7, "half\n")
    shown = pool.run("result", result["task_id"])
    assert shown.code == 1
    assert "failed (exit)" in shown.out


def test_a_job_that_takes_too_long_is_stopped(pool: Pool) -> None:
    done = pool.run("--json", "submit", "--retries", "0", "--timeout", "0.5", "--wait", "--", "sleep", "600")
    assert (done.code, done.json["result"]["error"]) == (1, "timeout")


def test_many_jobs_from_stdin(pool: Pool) -> None:
    lines = "".join(json.dumps({"type": "noop", "labels": {"n": str(n)}}) + "\n" for n in range(50))
    done = pool.run("--json", "submit", "--jsonl", "-", "--wait", stdin=lines)
    assert done.code == 0, done.err
    assert sorted(int(result["labels"]["n"]) for result in done.json["results"]) == list(range(50))


def test_watch_tells_states_then_the_result(pool: Pool) -> None:
    task_id = submitted(pool, "--", "sh", "-c", "sleep 1; echo end")
    done = pool.run("watch", task_id)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[-1] == "end"
    assert "done" in lines[-3]
    assert lines[-2].startswith(f"{task_id}  done on gpu")


def test_an_operator_sees_every_state(pool: Pool) -> None:
    task_id = submitted(pool, "--", "sleep", "1", user="alice")
    done = pool.run("--json", "tail-state", task_id, user="olga")
    assert done.code == 0, done
    told = [json.loads(line)["event"]["state"] for line in done.out.splitlines()]
    history = pool.run("--json", "result", task_id).json["result"]["history"]
    assert told[-1] == "done"
    assert told == [event["state"] for event in history][-len(told) :]  # from where it came in, and nothing left out


def test_logs_follow_a_running_job(pool: Pool, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    task_id = submitted(pool, "--", "sh", "-c", f"echo first; while [ ! -e {gate} ]; do sleep 0.05; done; echo second")
    with subprocess.Popen(pool.command("logs", "-f", task_id), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"  # while it runs
        gate.touch()
        assert process.stdout.read() == "second\n"
        assert process.wait(HANG) == 0
    assert pool.run("logs", task_id).out == "first\nsecond\n"
    assert pool.run("--json", "logs", "--stderr", task_id).json["text"] == ""


def test_cancel_is_final(pool: Pool) -> None:
    task_id = submitted(pool, "--", "sleep", "600")
    asyncio.run(until_running(pool, task_id))
    assert pool.run("cancel", task_id).code == 0
    waited = pool.run("--json", "wait", task_id)
    assert (waited.code, waited.json["results"][0]["state"]) == (1, "cancelled")
    again = submitted(pool, "--", "true")
    pool.run("wait", again)
    done = pool.run("--json", "cancel", again)
    assert (done.code, done.json["error"]["code"]) == (1, "conflict")


def test_list_shows_what_is_asked_for(pool: Pool) -> None:
    waiting = submitted(pool, "--delay", "600", "--", "true")
    finished = submitted(pool, "--", "true")
    pool.run("wait", finished)

    def ids(*words: str, user: str = "alice") -> list[str]:
        return [job["task_id"] for job in pool.run("--json", "list", *words, user=user).json["jobs"]]

    assert waiting in ids()
    assert finished not in ids()
    assert finished in ids("--all")
    assert finished in ids("--state", "done")
    assert waiting not in ids("--state", "done")
    assert waiting in ids("--user", "alice", user="olga")
    assert len(ids("--all", "--limit", "1")) == 1
    assert pool.run("cancel", waiting).code == 0


def test_priority_and_pin_are_kept_and_shown(pool: Pool) -> None:
    task_id = submitted(pool, "--gpu", "gpu0", "--priority", "7", "--delay", "600", "--", "true")
    job = pool.run("--json", "status", task_id).json["job"]
    assert (job["requested_gpu"], job["priority"], job["type"]) == ("gpu0", 7, "cmd")
    assert pool.run("cancel", task_id).code == 0


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_top_shows_gpus_queue_and_conductor(pool: Pool) -> None:
    done = pool.run("top", "--once")
    assert done.code == 0, done
    assert "gpu0" in done.out
    assert "gpu1" in done.out
    answer = pool.run("--json", "top").json
    assert {gpu["id"] for gpu in answer["gpus"]} == {"gpu0", "gpu1"}
    assert {gpu["backend"] for gpu in answer["gpus"]} == {"simulated"}
    assert answer["conductor"]["name"] == "a"


def test_top_on_a_terminal_is_live_and_ends_with_ctrl_c(pool: Pool) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        pool.command("top", "--interval", "0.1"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "30"},
    )
    os.close(terminal)
    guard = threading.Timer(HANG, process.kill)
    guard.start()
    shown = b""
    while shown.count(b"conductor a") < 2:  # drawn, and drawn again
        shown += os.read(controller, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while os.read(controller, 65536):
            pass
    except OSError as error:
        if error.errno != errno.EIO:  # how a terminal says that its last user has gone
            raise
    assert process.wait(HANG) == 0
    guard.cancel()
    os.close(controller)


def test_a_drained_gpu_gets_no_job_until_it_is_undrained(pool: Pool) -> None:
    assert pool.run("--json", "drain", "gpu0").json["error"]["code"] == "forbidden"
    assert pool.run("--json", "drain", "gpu0", user="olga").json["gpu"]["state"] == "drained"
    try:
        task_id = submitted(pool, "--gpu", "gpu0", "--", "true")
        other = submitted(pool, "--", "true")
        assert pool.run("--json", "wait", other).json["results"][0]["gpu"] == "gpu1"
        done = pool.run("--json", "wait", task_id, "--timeout", "1")
        assert (done.code, done.json["ok"], done.json["pending"]) == (1, False, [task_id])
    finally:
        assert pool.run("undrain", "gpu0", user="olga").code == 0
    assert pool.run("wait", task_id).code == 0


def test_info_tells_what_the_site_allows(pool: Pool) -> None:
    answer = pool.run("--json", "info").json
    assert "cmd" in answer["types"]
    assert "shell" not in answer["types"]
    assert answer["operators"] == ["olga"]
    assert answer["server_version"].startswith("2.")
    assert answer["streams"][_bus.STREAM_WQ]["problem"] == ""
    assert answer["streams"][_bus.STREAM_LOGS]["problem"] == ""


def test_validate_proves_every_gpu_and_leaves_nothing(pool: Pool) -> None:
    done = pool.run("--json", "--gpus", "gpu0,gpu1", user="olga", program="validate")
    report = done.json
    assert done.code == 0, report
    found = {(check["check"], check["subject"]): check["ok"] for check in report["checks"]}
    for gpu in ("gpu0", "gpu1"):
        assert found["gpu.heartbeat", gpu] is True
        assert found["gpu.job", gpu] is True
    assert all(found[check, ""] for check in ("bus", "conductor", "conductor.heartbeat", "clean"))
    assert all(found[check, ""] for check in ("job.fails", "job.timeout", "job.cancel"))
    assert pool.run("--json", "list", user="olga").json["jobs"] == []


def test_validate_fails_for_a_gpu_that_is_not_there(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_validation, "BEAT", 5.0)
    done = pool.run("--gpus", "gpu0,gpu9", "--timeout", "15", user="olga", program="validate")
    assert done.code == 1
    failed = [line for line in done.out.splitlines() if line.startswith("FAIL")]
    assert any("gpu.heartbeat gpu9" in line for line in failed)
    assert any("gpu.job gpu9" in line for line in failed)
    assert not any("gpu0" in line for line in failed)


# ---- bad input (each a clear error, nothing lost) --------------------------------------------------------------------


def test_a_gpu_nobody_knows_is_told_in_the_state(pool: Pool) -> None:
    task_id = submitted(pool, "--gpu", "gpu9", "--", "true")
    done = pool.run("wait", task_id, "--timeout", "1")
    assert done.code == 1
    job = pool.run("--json", "status", task_id).json["job"]
    assert job["state"] in ("enqueued", "waiting_gpu", "dead")
    assert "gpu9" in job["reason"]
    if job["state"] != "dead":
        assert pool.run("cancel", task_id).code == 0


def test_a_type_that_is_not_allowed_ends_dead_with_the_reason(pool: Pool) -> None:
    done = pool.run("--json", "submit", "--shell", "echo no", "--wait")
    assert done.code == 1
    result = done.json["result"]
    assert result["state"] == "dead"
    assert "shell" in result["reason"]
    dead = pool.run("--json", "dead", "list").json["dead"]
    assert result["task_id"] in [letter["task_id"] for letter in dead]
    replayed = pool.run("--json", "dead", "replay", result["task_id"])
    if replayed.code == 0:
        again = pool.run("--json", "wait", replayed.json["task_id"])
        assert again.json["results"][0]["state"] == "dead"
    else:
        assert replayed.json["error"]["code"] == "conflict"


def test_malformed_json_on_the_subject_is_dead_lettered(pool: Pool) -> None:
    async def send() -> None:
        nc = await pool.bus.connected("submitter", "alice")
        try:
            for payload in (b"{", b'{"cmd": ["a"], "timout": 3}', b"\xff\xfe", b'{"cmd": ["a"], "timeout": -1}'):
                answer = await nc.ask(_bus.enqueue_subject("alice"), payload, timeout=HANG)
                assert b'"seq"' in answer.data
        finally:
            await nc.close()

    before = len(pool.run("--json", "dead", "list", user="olga").json["dead"])
    asyncio.run(send())
    after = submitted(pool, "--", "true")  # behind them in the queue: they were looked at when this one is final
    assert pool.run("wait", after).code == 0
    letters = pool.run("--json", "dead", "list", user="olga").json["dead"][: -before or None]
    assert len(letters) == 4
    assert all(letter["reason"] for letter in letters)
    assert any(letter["encoding"] == "base64" for letter in letters)


def test_nine_megabytes_are_refused_in_one_sentence(pool: Pool) -> None:
    lines = json.dumps({"cmd": ["echo", "x" * 9_000_000]})
    done = pool.run("--json", "submit", "--jsonl", "-", stdin=lines)
    assert (done.code, done.json["error"]["code"]) == (1, "payload_too_large")


def test_wrong_credentials_are_told_at_once(pool: Pool, tmp_path: Path) -> None:
    keys.create(tmp_path / "stranger.nk")
    context = tmp_path / "stranger.toml"
    context.write_text(f'servers = ["{pool.bus.url}"]\nuser = "alice"\nnkey_file = "stranger.nk"\n')
    done = pool.run("--json", "--context", str(context), "list")
    assert (done.code, done.json["error"]["code"]) == (1, "access_denied")
    # a right key under another name
    context.write_text(
        f'servers = ["{pool.bus.url}"]\nuser = "bob"\nnkey_file = "{pool.bus.credentials("submitter", "alice")}"\n'
    )
    done = pool.run("--json", "--context", str(context), "submit", "--", "true")
    assert (done.code, done.json["error"]["code"]) == (1, "forbidden")


def test_others_jobs_are_not_found(pool: Pool) -> None:
    task_id = submitted(pool, "--delay", "600", "--", "true")
    for words in (["status", task_id], ["cancel", task_id], ["logs", task_id], ["result", task_id]):
        done = pool.run("--json", *words, user="bob")
        assert (done.code, done.json["error"]["code"]) == (1, "not_found"), words
    done = pool.run("--json", "list", "--user", "alice", user="bob")
    assert (done.code, done.json["error"]["code"]) == (1, "forbidden")
    assert pool.run("cancel", task_id, user="olga").code == 0  # operators may


def test_an_unknown_job_is_not_found(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "GRACE", 0.5)
    for words in (["status", "job-none"], ["wait", "job-none"], ["cancel", "job-none"], ["watch", "job-none"]):
        done = pool.run(*words)
        assert (done.code, done.out) == (1, ""), words
        assert "job-none" in done.err


def test_ctrl_c_says_that_the_job_goes_on(pool: Pool) -> None:
    task_id = submitted(pool, "--", "sleep", "600")
    command = pool.command("tail-state", task_id)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it watches
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert f"{task_id} goes on" in err
    assert f"maestroctl cancel {task_id}" in err
    assert pool.run("cancel", task_id).code == 0


# ---- the client ------------------------------------------------------------------------------------------------------


def test_the_blocking_client_goes_the_whole_way(pool: Pool) -> None:
    with Maestro(pool.settings()) as maestro:
        job = maestro.submit(["sh", "-c", "cat /proc/self/comm"], labels={"a": "b"})
        result = job.result(timeout=HANG)
        assert (result.ok, result.stdout, result.labels) == (True, "cat\n", {"a": "b"})
        assert maestro.result(job.task_id) == result
        assert "".join(chunk.text for chunk in job.logs()) == "cat\n"
        with pytest.raises(ConflictError):
            job.cancel()
        with pytest.raises(NotFoundError):
            maestro.status("job-none")
        many = maestro.submit_many({"type": "noop"} for _ in range(20))
        ended = {result.task_id for result in maestro.as_completed(many, timeout=HANG)}
        assert ended == {handle.task_id for handle in many}
    maestro.close()  # a second time does nothing


def test_the_asyncio_client_waits_for_many_at_once(pool: Pool) -> None:
    async def main() -> None:
        async with AsyncMaestro(pool.settings()) as maestro:
            handles = await asyncio.gather(*(maestro.submit(type="noop") for _ in range(30)))
            results = await asyncio.gather(*(handle.result(HANG) for handle in handles))
            assert all(result.ok for result in results)

    asyncio.run(main())
