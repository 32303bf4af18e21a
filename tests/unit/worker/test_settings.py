# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The workers' settings: defaults, layers, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from organism.core._keyvalue import SettingsError
from organism.core._root import Root
from organism.core._worker_settings import SCHEMA, check_cpuset, job_user, load_settings, parse_cpulist


def write(top: Path, path: str, text: str) -> None:
    target = top / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def test_the_documented_defaults_hold_without_any_file(tmp_path: Path) -> None:
    settings = load_settings(Root(tmp_path), "gpu3")
    documented = {
        "GPU_ID": "gpu3",
        "NATS_URL": ["nats://127.0.0.1:4222"],
        "MERGE_ROOT": "/srv/gpucache",
        "BASE_ROOT": "/data/gpucache",
        "RAM_ROOT": "/run/gpucache",
        "HEARTBEAT_SEC": 5,
        "METRICS_SEC": 5,
        "TASK_TIMEOUT_DEFAULT": 3600,
        "GPU_WORKER_CPUSET": "",
        "WORK_ROOT": "/srv/gpucache/gpu3",
        "NKEY_FILE": "/etc/organism/keys/worker-gpu3.nk",
        "JOB_USER": "organism-job-gpu3",
        "JOB_MEMORY_MAX": "80%",
    }
    assert {name: settings[name] for name in documented} == documented


def test_a_gpus_own_file_lies_over_the_common_one(tmp_path: Path) -> None:
    write(tmp_path, "/etc/organism/gpu-worker.conf", "HEARTBEAT_SEC=2\nMETRICS_SEC=3\n")
    write(tmp_path, "/etc/organism/gpu-worker.d/gpu1.conf", "# mine\nMETRICS_SEC=9\nWORK_ROOT=/fast/%i\n")
    own = load_settings(Root(tmp_path), "gpu1")
    other = load_settings(Root(tmp_path), "gpu2")
    assert (own["HEARTBEAT_SEC"], own["METRICS_SEC"], own["WORK_ROOT"]) == (2, 9, "/fast/gpu1")
    assert (other["HEARTBEAT_SEC"], other["METRICS_SEC"], other["WORK_ROOT"]) == (2, 3, "/srv/gpucache/gpu2")


def test_what_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, "/etc/organism/gpu-worker.conf", "HEARTBEAT=5\nMETRICS_SEC=soon\nJOB_MEMORY_MAX=much\n")
    with pytest.raises(SettingsError) as refusal:
        load_settings(Root(tmp_path), "gpu0")
    first, second, third = refusal.value.problems
    assert first.endswith("conf:1: gpu-worker has no setting HEARTBEAT; did you mean HEARTBEAT_SEC?")
    assert "conf:2: METRICS_SEC expects a number" in second
    assert "conf:3: JOB_MEMORY_MAX" in third


def test_a_file_for_another_gpu_and_a_bad_id_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "/etc/organism/gpu-worker.conf", "GPU_ID=gpu7\n")
    with pytest.raises(SettingsError, match="GPU_ID=gpu7, but this worker was started for gpu0"):
        load_settings(Root(tmp_path), "gpu0")
    with pytest.raises(ValueError, match=r"must match"):
        load_settings(Root(tmp_path), "gpu.0")


def test_each_gpu_has_a_user_of_its_own_whatever_its_id(tmp_path: Path) -> None:
    ids = ["gpu0", "gpu1", "GPU0", "rack-7_host-12-gpu-with-a-long-name", "g" * 64]
    users = [str(load_settings(Root(tmp_path), gpu)["JOB_USER"]) for gpu in ids]
    assert len(set(users)) == len(ids)
    assert users[:2] == ["organism-job-gpu0", "organism-job-gpu1"]
    for user in users:
        assert re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user)
    assert job_user("someone", "gpu0") == "someone"


def test_cpu_lists() -> None:
    assert parse_cpulist("0-2,5") == [0, 1, 2, 5]
    for bad in ("", "a", "3-1", "1,,2", "-1", "0-", "1 2"):
        with pytest.raises(ValueError, match=r"CPU list|backward"):
            parse_cpulist(bad)


def test_a_cpuset_is_held_against_the_machine_that_the_worker_runs_in(tmp_path: Path) -> None:
    write(tmp_path, "/sys/devices/system/cpu/online", "0-3\n")
    assert check_cpuset("1-3", Root(tmp_path)) == [1, 2, 3]
    with pytest.raises(ValueError, match="names CPU 10, 11, but this machine has 0-3 online"):
        check_cpuset("10-11", Root(tmp_path))


def test_what_the_role_renders_is_what_the_worker_reads() -> None:
    settings = SCHEMA.coerce({"NATS_URL": ["tls://a:4222", "tls://b:4222"], "JOB_NETWORK": "yes"})
    assert SCHEMA.parse(SCHEMA.render(settings)) == settings
