# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of systemd for a job, and how its answer is read."""

from __future__ import annotations

import asyncio
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from organism.worker import runner, systemd
from organism.worker.launch import Ending, Launch
from organism.worker.process import JobUser
from organism.worker.sandbox import SystemdLimits, properties
from organism.worker.systemd import (
    SystemdProcess,
    command_line,
    find_program,
    on_disks,
    own_unit,
    read_ending,
    shown_status,
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


def test_the_whole_list_of_a_job_of_one_gpu() -> None:
    """Nothing goes missing unnoticed: what each line is for is said where it is set."""
    tmpfs = "rw,mode=1777,nosuid,nodev,size=1G"
    assert of(SystemdLimits(memory_max="8G", cpu_weight=50, io_weight=50, tmp_max="1G")) == [
        "BindsTo=gpu-worker@gpu0.service",
        "After=gpu-worker@gpu0.service",
        "KillMode=control-group",
        "SendSIGKILL=yes",
        "OOMPolicy=kill",
        "TimeoutStopSec=5",
        "RuntimeMaxSec=75",
        'ExecStopPost=+:/bin/sh -c \'echo "$SERVICE_RESULT $EXIT_CODE $EXIT_STATUS" >"$1"\' status '
        '"/srv/gpucache/gpu0/tasks/job/1/end/status"',
        "User=organism-job",
        "SupplementaryGroups=render",
        "UMask=0022",
        "KeyringMode=private",
        "PrivateIPC=yes",
        "RemoveIPC=yes",
        "ProtectProc=invisible",
        "OOMScoreAdjust=500",
        "LimitCORE=0",
        "TasksMax=4096",
        "MemoryMax=8G",
        "MemorySwapMax=0",
        "CPUWeight=50",
        "IOWeight=50",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "ReadOnlyPaths=-/run",
        f"TemporaryFileSystem=/tmp:{tmpfs}",
        f"TemporaryFileSystem=/var/tmp:{tmpfs}",
        f"TemporaryFileSystem=/dev/shm:{tmpfs}",
        "InaccessiblePaths=-/etc/organism/keys",
        "InaccessiblePaths=-/var/lib/nats",
        "InaccessiblePaths=-/run/dbus",
        "InaccessiblePaths=-/run/systemd/private",
        "TemporaryFileSystem=/srv/gpucache:ro",
        "BindPaths=/srv/gpucache/gpu0",
        "TemporaryFileSystem=/srv/gpucache/gpu0/tasks:ro",
        f"BindPaths={WORK}",
        f"BindPaths={STATUS.parent}",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=~@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap",
        "SystemCallErrorNumber=EPERM",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/dri/renderD128 rw",
        "DeviceAllow=/dev/kfd rw",
        "PrivateNetwork=yes",
        "IPAddressDeny=any",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    ]


def test_limits_are_passed_on_only_where_a_site_sets_them() -> None:
    bare = of()
    limited = ("MemoryMax", "MemorySwap", "CPUQuota", "CPUWeight", "IO", "CPUAffinity", "AllowedCPUs")
    assert [entry for entry in bare if entry.startswith(limited)] == []
    found = of(SystemdLimits(memory_max="8G", cpu_percent=150, network=True, cpuset="1-3", cache_writable=False))
    assert {
        "MemoryMax=8G",
        "MemorySwapMax=0",
        "CPUQuota=150%",
        "CPUAffinity=1-3",
        "AllowedCPUs=1-3",
        "BindReadOnlyPaths=/srv/gpucache/gpu0",
    } <= set(found)
    assert not [entry for entry in found if "Network" in entry or "IPAddress" in entry]


def test_each_disk_gets_the_limits_of_speed() -> None:
    limits = SystemdLimits(io_read_max="500M", io_write_max="200M")
    found = properties(
        LAUNCH, limits, user=USER, groups=[], bind_to="", status=STATUS, disks=(Path("/"), Path("/data/gpucache"))
    )
    assert [entry for entry in found if entry.startswith("IO")] == [
        "IOReadBandwidthMax=/ 500M",
        "IOReadBandwidthMax=/data/gpucache 500M",
        "IOWriteBandwidthMax=/ 200M",
        "IOWriteBandwidthMax=/data/gpucache 200M",
    ]


def test_a_file_system_in_memory_has_no_disk_and_two_paths_of_one_disk_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {"/ram": os.makedev(0, 40), "/disk": os.makedev(259, 1), "/disk/a": os.makedev(259, 1)}
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0, 0, devices[str(path)], 0, 0, 0, 0, 0, 0, 0)))
    assert on_disks([Path("/ram"), Path("/disk"), Path("/disk/a")]) == (Path("/disk"),)


def test_a_job_without_device_nodes_gets_none_at_all() -> None:
    found = of(launch=replace(LAUNCH, nodes=()))
    assert "PrivateDevices=yes" in found
    assert not [entry for entry in found if entry.startswith(("DeviceAllow", "SupplementaryGroups"))]


def test_a_worker_that_runs_by_hand_binds_to_nothing() -> None:
    assert not [entry for entry in of(bind_to="") if entry.startswith(("BindsTo", "After"))]


def test_arguments_reach_the_program_as_they_are() -> None:
    line = command_line(LAUNCH, "/bin/echo", ["User=x"])
    assert line[:5] == ["systemd-run", "--quiet", "--pipe", "--wait", "--service-type=exec"]
    # systemd turns $$ back into $
    assert line[line.index("--") :] == [
        "--", "/usr/bin/env", "-i", "--", "A=$$x y", "/bin/echo", "$$HOME", "a b", "--", "%n",
    ]  # fmt: skip
    assert f"--working-directory={WORK}/sub" in line


def test_a_jobs_environment_is_never_that_of_what_the_unit_runs_as_root() -> None:
    launch = replace(LAUNCH, env={"LD_PRELOAD": "/srv/gpucache/gpu0/mine.so"})
    line = command_line(launch, "/bin/echo", of(launch=launch))
    assert not [word for word in line[: line.index("--")] if "LD_PRELOAD" in word or word.startswith("--setenv")]
    assert any("ExecStopPost=+" in word for word in line)  # which is why


def test_a_program_with_an_equals_sign_is_no_variable() -> None:
    job = command_line(LAUNCH, "/opt/a=b/tool", [])
    assert job[job.index("A=$$x y") + 1 :] == [
        "/bin/sh", "-c", 'exec "$$0" "$$@"', "/opt/a=b/tool", "$$HOME", "a b", "--", "%n",
    ]  # fmt: skip
    # and what the shell makes of it
    script = job[job.index("-c") + 1].replace("$$", "$")
    done = subprocess.run(
        ["/usr/bin/env", "-i", "--", "A=1", "/bin/sh", "-c", script, "/bin/echo", "$HOME", "a b"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "$HOME a b\n"


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


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        ("Result=oom-kill\nExecMainCode=2\nExecMainStatus=9\n", "oom-kill killed 9"),
        ("Result=exit-code\nExecMainCode=1\nExecMainStatus=3\n", "exit-code exited 3"),
        ("Result=core-dump\nExecMainCode=3\nExecMainStatus=11\n", "core-dump dumped 11"),
        ("Result=resources\nExecMainCode=0\nExecMainStatus=0\n", None),
        ("", None),
    ],
)
def test_a_unit_that_could_not_write_down_its_end_is_asked(shown: str, status: str | None) -> None:
    assert shown_status(shown) == status
    if status is not None:
        assert read_ending(status, 1, "x").returncode in (-9, 3, -11)


def test_the_workers_own_unit_is_read_from_its_control_group() -> None:
    slice_ = r"/system.slice/system-gpu\x2dworker.slice/gpu-worker@gpu0.service"
    assert own_unit(f"0::{slice_}\n") == "gpu-worker@gpu0.service"
    assert own_unit(f"1:name=systemd:/x\n0::{slice_}\n") == "gpu-worker@gpu0.service"
    assert own_unit("0::/user.slice/session-3.scope\n") == ""


@pytest.mark.parametrize("grace", [0, 5])
def test_a_wish_to_stop_that_overtakes_the_start_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace: float
) -> None:
    """systemctl does not know the unit until systemd has heard of it from systemd-run."""
    calls, loaded = tmp_path / "calls", tmp_path / "loaded"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        f'#!/bin/sh\necho "$*" >>{calls}\n'
        f'[ -e {loaded} ] || {{ [ "$(wc -l <{calls})" = 3 ] && touch {loaded}; '
        'echo "Unit organism-job-x.service not loaded." >&2; exit 5; }\n'
        f'case $1 in stop|kill) kill "$(cat {tmp_path}/pid)" ;; esac\n'
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "AGAIN", 0.01)

    async def main() -> Ending:
        runner = await asyncio.create_subprocess_exec("sleep", "60")
        (tmp_path / "pid").write_text(str(runner.pid))
        process = SystemdProcess("organism-job-x.service", runner, tmp_path / "status", "sleep")
        async with asyncio.timeout(60):
            await process.stop(grace)
            return await process.wait()

    assert asyncio.run(main()).returncode is None
    verb = "stop --no-block" if grace else "kill --signal=SIGKILL"
    assert calls.read_text().splitlines()[:4] == [f"{verb} organism-job-x.service"] * 4


@pytest.mark.parametrize("answers", [True, False])
def test_a_stop_that_never_comes_through_makes_the_gpu_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Neither a unit that never appears nor a systemctl that hangs may hold the worker for ever."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\n" + ("exit 5\n" if answers else "[ $1 = stop ] || exit 5\nexec sleep 60\n"))
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "AGAIN", 0.01)
    monkeypatch.setattr(runner, "UNKILLABLE", 0.2)
    made = runner.Runner(
        runner.RunSettings("gpu0", tmp_path, kill_grace=0.1), *([None] * 3), {}, lambda _: True  # type: ignore[arg-type]  # unused
    )  # fmt: skip

    async def main() -> None:
        started = await asyncio.create_subprocess_exec("sleep", "60")
        process = SystemdProcess("organism-job-x.service", started, tmp_path / "status", "sleep")
        stop = runner.Stop()
        stop.ask("cancelled", "")
        try:
            async with asyncio.timeout(60):
                with pytest.raises(runner.Stuck, match="did not end"):
                    await made._until_end(process, stop, 60)
        finally:
            started.kill()
            await asyncio.wait({process.ended})

    asyncio.run(main())
