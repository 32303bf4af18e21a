# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs that mean harm, under a real kernel and a real systemd: containers do not enforce what is shown here.

A worker without the bus (hostile/worker.py) runs each job exactly as the product does. Every limit is small on purpose,
and what a job must not reach is reached by root beside it, so that no test passes because there was nothing to reach.
"""

from __future__ import annotations

import io
import json
import shlex
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from organism.core import _wheelhouse
from rig.config import REPO
from rig.driver import Rig

HERE = Path(__file__).parent / "hostile"
LIBRARY = "/opt/organism/lib"
# of the runtime's dependencies those that a worker imports
NEEDED = ("organism-", "msgspec-", "nats_py-", "nkeys-", "pynacl-", "cffi-", "pycparser-")
PYTHONS = ("3.11", "3.13")
GUARD = 600.0


def library(cache: Path, python: str) -> bytes:
    """The worker's own wheel and what it imports, as one archive: the rig has no package index."""
    house, runtime = cache / "wheels", REPO / "runtime"
    requirements = runtime / "requirements-node.txt"
    want = _wheelhouse.wanted(runtime, requirements, PYTHONS)
    if _wheelhouse.plan(_wheelhouse.present(house), want):
        _wheelhouse.build(house, runtime, requirements, PYTHONS, want)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for wheel in sorted(house.glob("*.whl")):
            if wheel.name.startswith(NEEDED) and any(tag in wheel.name for tag in (python, "-py3-", "-abi3-")):
                with zipfile.ZipFile(wheel) as source:
                    for name in source.namelist():
                        archive.writestr(name, source.read(name))
    return packed.getvalue()


@pytest.fixture(scope="module")
def pool(able: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig of its own, from the snapshot: nobody else has to live with what is done to it."""
    with Rig("hostile") as rig:
        packed = tmp_path_factory.mktemp("library") / "library.zip"
        packed.write_bytes(library(rig.where.cache, "cp313"))
        rig.put(packed, "/root/library.zip")
        rig.must(f"mkdir -p {LIBRARY} && python3 -m zipfile -e /root/library.zip {LIBRARY}")
        for name in ("worker.py", "attempts.py"):
            rig.put(HERE / name, f"{LIBRARY}/{name}")
        rig.must("bash -s", input=(HERE / "setup.sh").read_text())
        yield rig


def run(rig: Rig, gpu: str, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of these jobs, one after the other on one GPU."""
    command = (
        f"systemd-run --quiet --pipe --wait --collect --unit=gpu-worker@{gpu}.service --setenv=PYTHONPATH={LIBRARY} "
        f"--property=ProtectSystem=full --property=OOMScoreAdjust=-500 python3 {LIBRARY}/worker.py {gpu}"
    )
    done = rig.ssh(command, input=json.dumps(jobs), timeout=GUARD)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == len(jobs)
    # whatever a job does, nothing of it stays
    units = f"systemctl list-units --all --plain --no-legend 'organism-job-{gpu}-*'"
    assert rig.ssh(f"ps -o pid=,args= -u organism-job-{gpu}; {units}").stdout == ""
    return found


def shell(task_id: str, script: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "cmd": ["/bin/sh", "-c", script], **more}


def python(task_id: str, script: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "cmd": ["/usr/bin/python3", "-c", script], **more}


def test_a_job_reaches_its_own_and_nothing_else(pool: Rig) -> None:
    attempts = f"/usr/bin/python3 {LIBRARY}/attempts.py"
    earlier, curious = run(
        pool, "gpu0", shell("earlier", "echo secret > mine"), {"task_id": "curious", "cmd": shlex.split(attempts)}
    )
    assert earlier["returncode"] == 0, earlier
    assert curious["returncode"] == 0, curious
    told: dict[str, Any] = json.loads(curious["stdout"])
    cache, work = "/srv/gpucache/gpu0", "/srv/gpucache/gpu0/tasks/curious/1/work"
    assert told.pop("writable") == sorted(["/dev/mqueue", "/dev/shm", "/tmp", "/var/tmp", cache, work])
    allowed = {
        name for name in told if name.startswith(("open its own", "write to its directory", "write to its GPU's"))
    }
    allowed |= {"write to /tmp", "write to /dev/shm"}
    assert {name for name, how in told.items() if how == "done"} == allowed, told
    # its temporary files were its own, and the machine is as it was
    assert pool.must("find /tmp /dev/shm /etc /usr /run -name mine -o -name large -o -name organism-was-here") == ""
    assert pool.must("cat /proc/sys/kernel/hostname") != "mallory\n"

    # all of it is there to be reached
    pool.must("systemd-run --quiet --unit=decoy bash -c 'exec -a worker.py sleep 600'")
    control: dict[str, str] = json.loads(pool.must(f"{attempts} control"))
    pool.must("systemctl stop decoy")
    assert {name: how for name, how in control.items() if how != "done"} == {}


def test_what_runs_as_root_at_a_jobs_end_does_not_obey_the_jobs_environment(pool: Rig) -> None:
    """LD_PRELOAD, LD_AUDIT and their like: the loader's trace shows who obeyed it."""
    trace = "/srv/gpucache/gpu0/trace"
    (report,) = run(pool, "gpu0", shell("preload", "true", env={"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": trace}))
    assert report["returncode"] == 0, report
    owners = pool.must("find /srv/gpucache/gpu0 /tmp /root -name 'trace.*' -printf '%u\\n' | sort -u").split()
    assert owners == ["organism-job-gpu0"]


def test_a_fork_bomb_meets_its_limit_and_ends_whole(pool: Rig) -> None:
    bomb = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
refused = False
while True:
    try:
        os.fork()
    except BlockingIOError:
        if not refused:
            print("refused", flush=True)
        refused = True
"""
    (report,) = run(pool, "gpu0", python("bomb", bomb, timeout=40))
    assert (report["error"], report["returncode"]) == ("timeout", -9), report
    assert "refused" in report["stdout"]


HOG = "x = bytearray(600 << 20); print('had it all')"
# the cache lies in a file system in memory: in RAM by way of files
FILES = """with open("large", "wb") as stream:
    while stream.tell() < 600 << 20:
        stream.write(b"x" * (1 << 20))
print("had it all")
"""


@pytest.mark.parametrize(("gpu", "hog"), [("gpu0", HOG), ("gpu1", FILES)], ids=["memory", "files in RAM"])
def test_a_memory_hog_is_ended_within_its_limit(pool: Rig, gpu: str, hog: str) -> None:
    hog_report, after = run(pool, gpu, python("hog", hog), shell("after", "echo fine"))
    assert (hog_report["error"], hog_report["returncode"]) == ("signal", -9), hog_report
    assert "out of memory" in hog_report["message"]
    assert "had it all" not in hog_report["stdout"]
    assert after["stdout"] == "fine\n", after
    pool.must(f"rm -rf /srv/gpucache/{gpu}/tasks/hog")


FREE = "df --output=avail -k /srv/gpucache/gpu0 | tail -1"


def filler(where: str) -> dict[str, Any]:
    script = f"""
import os, time
path = {"." if where == "nameless" else where!r} + "/fill"
with open(path, "wb") as stream:
    if {where == "nameless"}:
        os.unlink(path)
    try:
        while True:
            stream.write(b"x" * (1 << 20))
            stream.flush()
    except OSError as error:
        print(error.strerror, flush=True)
        time.sleep(3600)
"""
    return python("filler", script)


@pytest.mark.parametrize("where", [".", "/srv/gpucache/gpu0", "nameless"])
def test_a_disk_filler_is_ended_and_what_it_wrote_is_gone(pool: Rig, where: str) -> None:
    before = int(pool.must(FREE))
    full, after = run(pool, "gpu0", filler(where), shell("after", "echo fine > file && cat file"))
    assert full["error"] == "disk", full
    assert "has filled the disk" in full["message"]
    assert after["stdout"] == "fine\n", after
    assert int(pool.must(FREE)) > before - 10 * 1024  # KiB


def test_a_filler_that_may_go_on_on_disk_leaves_nothing_in_the_cache(pool: Rig) -> None:
    before = int(pool.must(FREE))
    pool.must("umount /data/gpucache/gpu0")
    full, after = run(pool, "gpu0", filler("/srv/gpucache/gpu0"), shell("after", "pwd"))
    pool.must("mount -t tmpfs -o size=64M tmpfs /data/gpucache/gpu0")
    assert full["error"] == "cache_full", full
    assert "the next attempt works on disk" in full["message"]
    assert after["stdout"] == "/srv/gpucache/gpu0/tasks/after/1/work\n", "the cache has room again"
    assert int(pool.must(FREE)) > before - 10 * 1024  # KiB


def test_a_flood_of_output_costs_neither_memory_nor_disk(pool: Rig) -> None:
    (report,) = run(pool, "gpu0", shell("flood", "trap 'echo last words; exit 3' TERM; yes & wait", timeout=30))
    assert report["error"] == "timeout", report
    assert report["stdout_bytes"] > 2 * 1024 * 1024
    assert len(report["stdout"]) <= 64_000
    assert report["stdout"].startswith("y\ny\n") and "bytes left out" in report["stdout"]
    size = int(pool.must("stat -c %s /srv/gpucache/gpu0/tasks/flood/1/stdout.log"))
    assert 1024 * 1024 <= size < 1024 * 1024 + 200
    assert "limit of 1048576 bytes is reached" in pool.must("tail -1 /srv/gpucache/gpu0/tasks/flood/1/stdout.log")


def test_a_daemon_ends_with_its_job(pool: Rig) -> None:
    daemon = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print("escaped", flush=True)
        os.close(1)
        os.close(2)
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
"""
    (report,) = run(pool, "gpu0", python("daemon", daemon + "time.sleep(2)\n"))  # and run() looks for what is left
    assert report["returncode"] == 0, report
    assert report["stdout"] == "escaped\n"


def test_who_ignores_the_request_to_end_is_killed(pool: Rig) -> None:
    stubborn = """
import signal, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: print("no", flush=True))
print("ready", flush=True)
while True:
    time.sleep(1)
"""
    (report,) = run(pool, "gpu0", python("stubborn", stubborn, timeout=30))
    assert (report["error"], report["returncode"]) == ("timeout", -9), report
    assert report["stdout"].startswith("ready\nno\n")


def test_two_jobs_at_the_same_time_cannot_touch_each_other(pool: Rig) -> None:
    victim = "echo secret > mine; exec 9< mine; while ! test -e /srv/gpucache/gpu1/go; do sleep 1; done; cat <&9"
    reports: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: reports.extend(run(pool, "gpu1", shell("victim", victim))))
    thread.start()
    try:
        unit = "organism-job-gpu1-victim-1.service"
        where = "/srv/gpucache/gpu1/tasks/victim/1/work/mine"
        pool.must(f"timeout 120 sh -c 'until test -s {where}; do sleep 1; done'", timeout=GUARD)
        pid = int(pool.must(f"systemctl show --value --property=MainPID {unit}"))
        assert pid > 0
        assert pool.must(f"cat /proc/{pid}/root{where}") == "secret\n"  # the way is there, for root
        attack = f"""
import os, signal
def attempt(name, call):
    try:
        print(name, "done", call())
    except OSError as error:
        print(name, type(error).__name__)
attempt("read", lambda: open("{where}").read())
attempt("root", lambda: open("/proc/{pid}/root{where}").read())
attempt("descriptor", lambda: open("/proc/{pid}/fd/9").read())
attempt("memory", lambda: open("/proc/{pid}/mem"))
attempt("kill", lambda: os.kill({pid}, signal.SIGKILL))
attempt("limits", lambda: os.sched_setaffinity({pid}, [0]))
attempt("everyone", lambda: os.kill(-1, signal.SIGKILL))
"""
        (report,) = run(pool, "gpu0", python("attacker", attack))
        assert " done" not in report["stdout"].replace("everyone done", ""), report
        assert report["stdout"].count("\n") >= 6, report
    finally:
        pool.must("touch /srv/gpucache/gpu1/go")
        thread.join(GUARD)
    assert not thread.is_alive()
    assert [(one["returncode"], one["stdout"]) for one in reports] == [(0, "secret\n")]


def test_neither_the_clock_nor_a_directory_moves_a_limit(pool: Rig) -> None:
    begun = float(pool.must("date +%s"))
    tricks = [
        shell("above", "pwd", cwd="../../other"),
        shell("absolute", "pwd", cwd="/etc"),
        shell("below", "pwd", cwd="deep/er"),
        shell("moved", "rm -rf ../work ../../moved 2>/dev/null; ln -s /etc dir; cd dir && pwd"),
    ]
    reports = run(pool, "gpu0", *tricks)
    assert [report["error"] for report in reports] == ["refused", "refused", None, None], reports
    assert reports[2]["stdout"].endswith("/tasks/below/1/work/deep/er\n")
    assert float(pool.must("date +%s")) < begun + 3600

    # the machine's own clock leaps by a day while a job runs: its time limit is a duration
    leap = threading.Thread(
        target=lambda: pool.must(
            "timeout 120 sh -c 'until test -e /srv/gpucache/gpu0/leap; do sleep 1; done'; "
            "date -s '+1 day' > /dev/null; touch /srv/gpucache/gpu0/leapt",
            timeout=GUARD,
        )
    )
    leap.start()
    wait = (
        "touch /srv/gpucache/gpu0/leap; until test -e /srv/gpucache/gpu0/leapt; do sleep 1; done; sleep 3; echo on time"
    )
    (patient,) = run(pool, "gpu0", shell("patient", wait, timeout=200))
    leap.join(GUARD)
    pool.must("date -s '-1 day' > /dev/null")
    assert patient["stdout"] == "on time\n", patient
    assert patient["error"] is None
