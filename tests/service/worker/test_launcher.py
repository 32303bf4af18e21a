# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The warden with real processes, awkward ones: what a job can do to its launcher, and the other way round."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from organism.bus.messages import JobSpec, Report, RunOrder
from organism.core import _policy
from organism.worker.devices.simulated import SimulatedGpu
from organism.worker.handlers import builtin_handlers
from organism.worker.process import ProcessLauncher
from organism.worker.runner import Runner, RunSettings, Stop
from organism.worker.store import TaskStore
from service.worker.double import await_file, await_gone


class Bench:
    """A runner without a bus."""

    def __init__(self, directory: Path) -> None:
        self.launcher = ProcessLauncher()
        self.cache = directory / "cache"
        self.cache.mkdir(exist_ok=True)
        self.runner = Runner(
            RunSettings(gpu="gpu0", cache=self.cache, kill_grace=0.3),
            TaskStore(self.cache),
            self.launcher,
            SimulatedGpu("sim:0"),
            builtin_handlers(sys.executable),
            _policy.Policy(types=frozenset({"cmd", "noop", "python", "shell"})).allows,
            {"LANG": "C.UTF-8", "SECRET": "no"},
        )
        self.stop = Stop()
        self._number = 0

    @property
    def work(self) -> Path:
        return self.cache / f"tasks/job{self._number}/1/work"

    def begin(self, *cmd: str, **spec: object) -> asyncio.Task[Report | None]:
        """The next job, started; ``timeout`` and ``cwd``, ``env``, ``args`` as in a submission."""
        self._number += 1
        self.stop = Stop()
        timeout = float(spec.pop("timeout", 60))  # type: ignore[arg-type]  # a number, by the callers below
        described = JobSpec(cmd=list(cmd), **spec) if cmd else JobSpec(**spec)  # type: ignore[arg-type]  # likewise
        order = RunOrder(
            ts="t",
            task_id=f"job{self._number}",
            attempt=1,
            gpu="gpu0",
            incarnation="i",
            user="u",
            timeout=timeout,
            spec=described,
            enq_seq=1,
        )
        return asyncio.create_task(self.runner.run(order, self.stop))

    async def run(self, *cmd: str, **spec: object) -> Report:
        report = await self.begin(*cmd, **spec)
        assert report is not None
        return report

    def warden(self) -> int:
        process = self.launcher._warden
        assert process is not None
        return process.pid


def fill_up(log: Path) -> None:
    """A disk that takes nothing more, as far as this process's own descriptor of a file is concerned."""
    for entry in Path("/proc/self/fd").iterdir():
        if os.path.realpath(entry) == str(log.resolve()):
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, int(entry.name))
            os.close(full)


def benched(tmp_path: Path, test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench(tmp_path)
        try:
            await test(bench)
        finally:
            await bench.launcher.close()

    asyncio.run(main())


def test_what_cannot_be_started_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        plain = tmp_path / "plain"
        plain.write_text("#!/bin/sh\n")
        script = tmp_path / "script"
        script.write_text("#!/no/such/interpreter\n")
        script.chmod(0o755)
        for program, reason in (
            ("no-such-program", "No such file or directory"),
            (str(plain), "Permission denied"),
            (str(tmp_path), "Permission denied"),
            (str(script), "No such file or directory"),
        ):
            report = await bench.run(program)
            assert (report.error, report.returncode) == ("start", None)
            assert report.message == f"cannot run {program!r}: {reason}"
        assert (await bench.run("true")).returncode == 0

    benched(tmp_path, test)


def test_a_python_program_may_be_larger_than_a_word_and_tells_its_lines_when_it_fails(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        program = "import sys\nDATA = '" + "x" * 1_000_000 + "'\nprint(len(DATA), sys.argv[1:], __name__)\n"
        report = await bench.run(type="python", python=program, argv=["-u", "a b"])
        assert (report.returncode, report.stdout) == (0, "1000000 ['-u', 'a b'] __main__\n"), report
        report = await bench.run(type="python", python="def train():\n    raise ValueError('no data')\n\n\ntrain()\n")
        assert (report.returncode, report.error) == (1, "exit")
        assert 'script.py", line 2, in train' in report.stderr
        assert "    raise ValueError('no data')\n" in report.stderr
        report = await bench.run(type="python", python="def train(:\n    pass\n")
        assert report.returncode == 1 and "SyntaxError" in report.stderr

    benched(tmp_path, test)


def test_what_a_python_program_has_printed_is_kept_when_it_is_killed(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        program = "import os, signal\nprint('halfway')\nos.kill(os.getpid(), signal.SIGKILL)\n"
        report = await bench.run(type="python", python=program)
        assert (report.returncode, report.error, report.stdout) == (-9, "signal", "halfway\n")

    benched(tmp_path, test)


def test_a_huge_argument_list_arrives_and_one_that_is_too_large_is_told(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        words = ["x" * 100_000] * 15
        report = await bench.run(sys.executable, "-c", "import sys; print(sum(map(len, sys.argv[1:])))", *words)
        assert report.stdout == "1500000\n"
        report = await bench.run("echo", "y" * 200_000)  # one argument is at most 128 KiB (execve(2))
        assert (report.error, report.message) == ("start", "cannot run 'echo': Argument list too long")

    benched(tmp_path, test)


def test_a_job_has_no_input_no_foreign_files_and_only_the_environment_it_was_given(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        looks = (
            "import os, sys\n"
            "print(repr(sys.stdin.read()), sorted(int(fd) for fd in os.listdir('/proc/self/fd')))\n"
            "print('SECRET' in os.environ, os.environ['LANG'], os.environ['MINE'], os.environ['ORGANISM_GPU_ID'])\n"
            "print(os.environ['CUDA_VISIBLE_DEVICES'] == '', os.getsid(0) == os.getpid())\n"
        )
        report = await bench.run(
            sys.executable, "-c", looks, env={"MINE": "m", "ORGANISM_GPU_ID": "gpu9", "CUDA_VISIBLE_DEVICES": "0"}
        )
        # descriptor 3 is the listing itself
        assert report.stdout.splitlines() == ["'' [0, 1, 2, 3]", "False C.UTF-8 m gpu0", "True True"], report.stderr

    benched(tmp_path, test)


def test_a_job_that_closes_its_output_can_still_go_on_and_end(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        report = await bench.run("sh", "-c", "echo before; exec >&- 2>&-; echo lost; sleep 0.2; exit 4")
        assert (report.returncode, report.stdout, report.message) == (4, "before\n", "exit status 4")

    benched(tmp_path, test)


def test_a_stopped_tree_is_ended_all_the_same(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        running = bench.begin("sh", "-c", "sleep 300 & echo $! $$ >pids; kill -STOP $! $$")
        pids = [int(pid) for pid in (await asyncio.to_thread(await_file, bench.work / "pids")).split()]
        bench.stop.ask("cancelled", "by the test")
        report = await running
        assert report is not None
        assert report.error == "cancelled"
        await asyncio.to_thread(await_gone, pids)

    benched(tmp_path, test)


def test_a_crowd_of_children_ends_with_its_job(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        crowd = (
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do setsid sleep 300 & echo $! >>pids; done"
        )
        report = await bench.run("sh", "-c", crowd)
        assert report.returncode == 0
        pids = [int(pid) for pid in (bench.work / "pids").read_text().split()]
        assert len(pids) == 20
        await asyncio.to_thread(await_gone, pids)

    benched(tmp_path, test)


def test_when_the_warden_is_killed_the_job_dies_and_the_next_one_runs(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        running = bench.begin("sh", "-c", "echo $$ >pid; exec sleep 300")
        pid = int(await asyncio.to_thread(await_file, bench.work / "pid"))
        os.kill(bench.warden(), signal.SIGKILL)
        report = await running
        assert report is not None
        assert (report.error, report.returncode) == ("signal", -9)
        assert "warden" in report.message
        await asyncio.to_thread(await_gone, [pid])
        assert (await bench.run("true")).returncode == 0

    benched(tmp_path, test)


def test_a_value_comes_back_and_a_trap_in_its_place_does_not_hold(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        doubles = "import json, os; n = json.load(open(os.environ['ORGANISM_ARGS'])); "
        doubles += "json.dump({'twice': n['n'] * 2}, open(os.environ['ORGANISM_VALUE'], 'w'))"
        report = await bench.run(sys.executable, "-c", doubles, args={"n": 21})
        assert report.value == {"twice": 42}, report.stderr
        for trap, told in (
            ("ln -s /etc/passwd value.json", "cannot be read"),
            ("mkfifo value.json", "is ignored"),
            ("head -c 300000 /dev/zero >value.json", "is ignored"),
            ("echo '{' >value.json", "is not JSON"),
        ):
            report = await bench.run("sh", "-c", trap)
            assert (report.returncode, report.value) == (0, None)
            assert told in report.message

    benched(tmp_path, test)


def test_a_full_log_costs_the_log_and_not_the_job(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        running = bench.begin(
            "sh", "-c", "echo one; while ! test -e go; do sleep 0.05; done; yes | head -c 1000000; exit 0"
        )
        log = bench.work.parent / "stdout.log"
        await asyncio.to_thread(await_file, log)
        fill_up(log)
        (bench.work / "go").touch()
        report = await running
        assert report is not None
        assert report.returncode == 0
        assert "stdout.log is incomplete: No space left on device" in report.message
        assert report.stdout.startswith("one\ny\n")

    benched(tmp_path, test)
