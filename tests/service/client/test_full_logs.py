# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A result carries head and tail of a long output; the whole of it is kept where the job ran."""

from __future__ import annotations

from pathlib import Path

from organism.bus import messages
from organism.client import Maestro
from service.client.pool import Pool

LINES = 40_000


def test_the_whole_output_is_had_as_long_as_its_worker_is_there(tmp_path: Path) -> None:
    pool = Pool(tmp_path, gpus=("gpu0",), worker={"LOG_MAX_MB": 1, "LOG_UPLOAD_MB_SEC": 0}).start()
    try:
        script = f"seq {LINES}; seq 900000 999999 >&2; seq 900000 999999 >&2"
        done = pool.run("--json", "submit", "--", "sh", "-c", script)
        task_id = str(done.json["task_id"])
        with Maestro(pool.settings()) as maestro:
            result = maestro.job(task_id).result(timeout=60)
            assert result.ok
            assert len(result.stdout) <= messages.OUTPUT_LIMIT
            assert result.stdout.startswith("1\n2\n") and result.stdout.endswith(f"\n{LINES}\n")
            assert "bytes left out" in result.stdout

            whole = "".join(f"{number}\n" for number in range(1, LINES + 1))
            assert "".join(chunk.text for chunk in maestro.logs(task_id)) == whole
        assert pool.run("logs", task_id).out == whole
        # more than is kept at all: as much as that, and word of it
        errors = pool.run("logs", "--stderr", task_id).out
        assert errors.startswith("900000\n900001\n")
        assert 1024 * 1024 < len(errors) < 1024 * 1024 + 200
        assert "the log's limit of 1048576 bytes is reached" in errors

        pool.workers["gpu0"].kill()
        cut = pool.run("logs", task_id).out
        assert cut.startswith("1\n2\n") and cut.endswith(f"\n{LINES}\n")
        assert "bytes left out" in cut
    finally:
        pool.stop()
