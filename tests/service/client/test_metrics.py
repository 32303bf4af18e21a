# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Metrics of a real conductor and a real worker, as Prometheus and node_exporter get them."""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from organism.client import Maestro
from service.client.pool import Pool
from service.support import HANG, free_port


class Scraped(Pool):
    port: int
    folder: Path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder, port = tmp_path_factory.mktemp("textfiles"), free_port()
    made = Scraped(
        tmp_path_factory.mktemp("pool"),
        ["gpu0"],
        {"TEXTFILE_COLLECTOR": folder},
        METRICS_PORT=port,
    )
    made.port, made.folder = port, folder
    made.start()
    with Maestro(made.settings()) as maestro:
        maestro.submit(type="noop").result(HANG)
        maestro.submit(["sh", "-c", "exit 3"], max_retries=1).result(HANG)
    yield made
    made.stop()


def get(pool: Scraped, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", pool.port, timeout=HANG)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def value(text: str, name: str) -> float | None:
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return None


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a file or a page that changes tells nobody


def test_the_conductor_tells_queue_times_retries_and_gpus(pool: Scraped) -> None:
    status, text = get(pool)
    assert status == 200
    assert value(text, 'organism_maestro_finished_total{shard="0",state="done"}') == 1
    assert value(text, 'organism_maestro_finished_total{shard="0",state="failed"}') == 1
    assert value(text, 'organism_maestro_retries_total{shard="0",error="exit"}') == 1
    assert value(text, 'organism_maestro_dispatch_seconds_count{shard="0",type="cmd"}') == 2
    assert value(text, 'organism_maestro_wait_seconds_count{shard="0",type="cmd"}') == 1
    assert value(text, 'organism_maestro_run_seconds_count{shard="0",type="cmd"}') == 2
    assert value(text, 'organism_maestro_gpu_up{shard="0",gpu="gpu0"}') == 1
    age = value(text, 'organism_maestro_gpu_heartbeat_age_seconds{shard="0",gpu="gpu0"}')
    assert age is not None and 0 <= age < HANG
    # the sensors are read beside the jobs, and two quick jobs may end before the first reading has come
    eventually(lambda: 'organism_maestro_gpu_utilisation_ratio{shard="0",gpu="gpu0"}' in get(pool)[1])


def test_what_waits_is_seen_in_its_class(pool: Scraped) -> None:
    assert pool.run("pause", "night", user="olga").code == 0
    submitted = pool.run("--json", "submit", "--queue", "night", "--type", "noop")
    depth = 'organism_maestro_queue_depth{shard="0",queue="night",type="noop"}'
    eventually(lambda: value(get(pool)[1], depth) == 1)
    assert value(get(pool)[1], 'organism_maestro_queue_paused{shard="0",queue="night"}') == 1
    assert pool.run("resume", "night", user="olga").code == 0
    assert pool.run("wait", submitted.json["task_id"], "--timeout", "50").code == 0
    assert value(get(pool)[1], depth) is None


def test_prometheus_reads_both(pool: Scraped) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    file = pool.folder / "organism-gpu-worker-gpu0.prom"
    eventually(file.exists)
    for text in (get(pool)[1], file.read_text()):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=HANG
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_nonsense_on_the_port_harms_nobody(pool: Scraped) -> None:
    assert get(pool, "/etc/passwd")[0] == 404
    assert get(pool, method="POST")[0] == 405
    assert get(pool, method="HEAD") == (200, "")
    for nonsense in (b"\0" * 100_000, b"GET\r\n\r\n", b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", pool.port), HANG) as raw:
            raw.settimeout(HANG)
            try:
                raw.sendall(nonsense)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(4096):
                    continue
            except ConnectionError:
                continue  # hung up on, as it should be
    assert get(pool)[0] == 200


def test_the_worker_leaves_its_numbers_and_takes_them_along(pool: Scraped) -> None:
    file = pool.folder / "organism-gpu-worker-gpu0.prom"
    eventually(lambda: 'organism_gpu_worker_jobs_total{gpu="gpu0",outcome="exit"} 2.0' in file.read_text())
    text = file.read_text()
    heard = value(text, 'organism_gpu_worker_last_heartbeat_timestamp_seconds{gpu="gpu0"}')
    assert heard is not None and abs(time.time() - heard) < HANG
    assert value(text, 'organism_gpu_worker_job_seconds_count{gpu="gpu0",outcome="exit"}') == 2
    assert value(text, 'organism_gpu_worker_gpu_temperature_celsius{gpu="gpu0"}') is not None
    pool.workers["gpu0"].signal(signal.SIGTERM)
    eventually(lambda: not file.exists())
