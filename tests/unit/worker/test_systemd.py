# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of systemd for a job, and how its answer is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from organism.worker.launch import Launch
from organism.worker.process import JobUser
from organism.worker.systemd import (
    SystemdLimits,
    command_line,
    find_program,
    own_unit,
    properties,
    read_ending,
    unit_name,
)

WORK = Path("/srv/gpucache/gpu0/tasks/job/1/work")
LAUNCH = Launch(
    name="gpu0-job-1",
    argv=["echo", "$HOME", "a b", "--", "%n"],
    env={"A": "$x y"},
    cwd=WORK / "sub",
    work=WORK,
    cache=Path("/srv/gpucache/gpu0"),
    stdout=1,
    stderr=2,
    limit=75.0,
    nodes=("/dev/dri/renderD128", "/dev/kfd"),
)
USER = JobUser("organism-job", 990, 990, [990])
STATUS = WORK.parent / "end/status"


def of(
    limits: SystemdLimits | None = None, launch: Launch = LAUNCH, bind_to: str = "gpu-worker@gpu0.service"
) -> list[str]:
    return properties(
        launch, limits or SystemdLimits(), user=USER, groups=["render"], bind_to=bind_to, status=STATUS
    )  # fmt: skip


def test_a_job_sees_its_own_gpu_its_own_directory_and_nothing_to_climb() -> None:
    found = of()
    for wanted in (
        "BindsTo=gpu-worker@gpu0.service",
        "User=organism-job",
        "SupplementaryGroups=render",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/dri/renderD128 rw",
        "DeviceAllow=/dev/kfd rw",
        "ProtectSystem=strict",
        "InaccessiblePaths=-/etc/organism/keys",
        "TemporaryFileSystem=/srv/gpucache:ro",
        "BindPaths=/srv/gpucache/gpu0",
        "TemporaryFileSystem=/srv/gpucache/gpu0/tasks:ro",
        f"BindPaths={WORK}",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "PrivateNetwork=yes",
        "IPAddressDeny=any",
        "KillMode=control-group",
        "RuntimeMaxSec=75",
    ):
        assert wanted in found
    assert not [entry for entry in found if entry.startswith(("MemoryMax", "CPUQuota", "PrivateDevices"))]


def test_limits_are_passed_on_only_where_a_site_sets_them() -> None:
    found = of(SystemdLimits(memory_max="8G", cpu_percent=150, network=True, cpuset="1-3", cache_writable=False))
    assert {"MemoryMax=8G", "CPUQuota=150%", "CPUAffinity=1-3", "BindReadOnlyPaths=/srv/gpucache/gpu0"} <= set(found)
    assert not [entry for entry in found if "Network" in entry or "IPAddress" in entry]


def test_a_job_without_device_nodes_gets_none_at_all() -> None:
    found = of(launch=replace(LAUNCH, nodes=()))
    assert "PrivateDevices=yes" in found
    assert not [entry for entry in found if entry.startswith(("DeviceAllow", "SupplementaryGroups"))]


def test_a_worker_that_runs_by_hand_binds_to_nothing() -> None:
    assert not [entry for entry in of(bind_to="") if entry.startswith(("BindsTo", "After"))]


def test_arguments_reach_the_program_as_they_are() -> None:
    line = command_line(LAUNCH, "/bin/echo", ["User=x"])
    assert line[:6] == ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
    # systemd turns $$ back into $
    assert line[line.index("--") :] == ["--", "/bin/echo", "$$HOME", "a b", "--", "%n"]
    assert "--setenv=A=$x y" in line
    assert f"--working-directory={WORK}/sub" in line


def test_the_longest_ids_make_a_name_that_systemd_takes() -> None:
    assert len(unit_name(f"{'g' * 64}-{'t' * 64}-{10**18}")) < 256


def test_programs_are_found_as_execve_would(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    env = {"PATH": str(tmp_path)}
    with pytest.raises(FileNotFoundError):
        find_program(["tool"], env, tmp_path)
    with pytest.raises(PermissionError):
        find_program(["./tool"], env, tmp_path)
    (tmp_path / "tool").chmod(0o755)
    assert find_program(["tool"], env, Path("/")) == str(tmp_path / "tool")
    assert find_program(["./tool"], env, tmp_path) == str(tmp_path / "tool")
    with pytest.raises(PermissionError):
        find_program([str(tmp_path)], env, tmp_path)
    with pytest.raises(FileNotFoundError):
        find_program(["/no/such"], env, tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "returncode", "told"),
    [
        ("success exited 0", 0, 0, ""),
        ("exit-code exited 3", 3, 3, ""),
        ("signal killed TERM", 0, -15, ""),  # an end that systemd counts as success
        ("signal killed KILL", 255, -9, ""),
        ("core-dump dumped SEGV", 255, -11, ""),
        ("oom-kill killed KILL", 255, -9, "out of memory"),
        ("timeout killed TERM", 255, -15, "ended by systemd's own guard"),
        ("exit-code exited 203", 203, 203, ""),  # the program's own status
        ("exit-code exited 217", 1, None, "systemd could not start it (status 217"),
        ("resources  ", 1, None, "systemd lacked a resource"),
        (None, 0, 0, ""),
        (None, 1, None, "systemd did not start organism-job-x.service"),
    ],
)
def test_endings(status: str | None, code: int, returncode: int | None, told: str) -> None:
    ending = read_ending(status, code, "organism-job-x.service")
    assert ending.returncode == returncode
    assert ending.message.startswith(told)
    assert bool(ending.message) == bool(told)


def test_the_workers_own_unit_is_read_from_its_control_group() -> None:
    slice_ = r"/system.slice/system-gpu\x2dworker.slice/gpu-worker@gpu0.service"
    assert own_unit(f"0::{slice_}\n") == "gpu-worker@gpu0.service"
    assert own_unit(f"1:name=systemd:/x\n0::{slice_}\n") == "gpu-worker@gpu0.service"
    assert own_unit("0::/user.slice/session-3.scope\n") == ""
