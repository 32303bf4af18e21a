# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hook with real entries: order, refusals, time limits, processes left behind, and the hookscript of before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from organism.core import _hook
from organism.core._hook_run import Report, run_plan
from organism.core._root import Root

Add = Callable[..., Path]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Adds an executable shell script as an entry."""

    def make(name: str, text: str, phase: str = "pre-start", mode: int = 0o755) -> Path:
        path = tmp_path / "etc/organism/hook.d" / phase / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        return path

    return make


def call(root: Path, phase: str = "pre-start", **limits: float) -> tuple[Report, list[str]]:
    said: list[str] = []
    plan = _hook.plan(Root(root), phase, 100, _hook.Settings(**limits), owner=os.geteuid())
    return run_plan(plan, Root(root), os.environ, said.append), said


def test_entries_run_in_order_with_the_words_and_the_environment_of_proxmox(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PVE_MIGRATED_FROM", "pve2")
    add("20-b", 'echo "two $1 $2 from $PVE_MIGRATED_FROM"')
    add("10-a", "echo one; echo warned >&2; printf unended")
    report, said = call(tmp_path)
    assert report.code == 0
    assert said == ["10-a: one", "10-a: warned", "10-a: unended", "20-b: two 100 pre-start from pve2"]


def test_before_a_start_the_first_failure_ends_it_with_its_code(add: Add, tmp_path: Path) -> None:
    add("10-ok", ":")
    add("20-guard", "echo vm 101 has the GPU; exit 7")
    add("30-late", f"touch {tmp_path}/ran")
    report, said = call(tmp_path)
    assert (report.code, report.not_run) == (7, ("30-late",))
    assert not (tmp_path / "ran").exists()
    assert "20-guard: vm 101 has the GPU" in said
    assert any("20-guard ended with 7" in line and "hook.d/pre-start/20-guard" in line for line in said)
    assert said[-1] == "organism-hook: VM 100 is not started; not run: 30-late"


@pytest.mark.parametrize("phase", ["post-start", "pre-stop", "post-stop"])
def test_the_other_phases_go_on_and_report(add: Add, tmp_path: Path, phase: str) -> None:
    add("10-bad", "exit 7", phase)
    add("20-next", f"touch {tmp_path}/ran", phase)
    report, said = call(tmp_path, phase)
    assert report.code == 7
    assert (tmp_path / "ran").exists()
    assert not any("is not started" in line for line in said)


@pytest.mark.parametrize(("mode", "why"), [(0o644, "is not executable"), (0o757, "can be written by everybody")])
def test_an_entry_that_must_not_run_is_refused_by_name(add: Add, tmp_path: Path, mode: int, why: str) -> None:
    add("10-x", f"touch {tmp_path}/ran", mode=mode)
    report, said = call(tmp_path)
    assert report.code == 126
    assert not (tmp_path / "ran").exists()
    assert "/etc/organism/hook.d/pre-start/10-x" in said[0] and why in said[0]


def test_a_folder_that_everybody_can_write_makes_its_entries_refused(add: Add, tmp_path: Path) -> None:
    add("10-x", ":").parent.chmod(0o777)
    assert call(tmp_path)[0].code == 126


def test_leftovers_of_editors_are_ignored_and_listed(add: Add, tmp_path: Path) -> None:
    add("10-x.bak", "exit 1")
    add("10-y~", "exit 1")
    plan = _hook.plan(Root(tmp_path), "pre-start", 100, _hook.Settings())
    assert [name for name, _reason in plan.ignored] == ["10-x.bak", "10-y~"]
    assert call(tmp_path)[0].code == 0


def test_an_overrun_ends_the_whole_group_even_where_sigterm_is_ignored(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("organism.core._hook_run.GRACE_S", 0.2)
    add("10-hangs", f'trap "" TERM; sleep 1000 & echo $! > {tmp_path}/child; echo begun; wait; wait')
    report, said = call(tmp_path, entry=0.5)
    assert report.code == 124
    assert said[0] == "10-hangs: begun"
    assert "did not end within 0.5 s" in said[1]
    assert ended(int((tmp_path / "child").read_text()))


def test_the_phase_has_a_limit_of_its_own(add: Add, tmp_path: Path) -> None:
    add("10-slow", "sleep 1000", "post-start")
    add("20-next", "echo reached", "post-start")
    report, _said = call(tmp_path, "post-start", total=0.4)
    assert [outcome.code for outcome in report.outcomes] == [124, 124]
    assert "no time left" in report.outcomes[1].reason


def test_a_process_that_stays_behind_does_not_hold_the_lock(add: Add, tmp_path: Path) -> None:
    """It inherits the entry's output; whoever waits for the end of that waits for ever."""
    add("10-daemon", f"sleep 1000 & echo $! > {tmp_path}/child; echo started")
    report, said = call(tmp_path, entry=100)
    child = int((tmp_path / "child").read_text())
    try:
        assert (report.code, said) == (0, ["10-daemon: started"])
        assert not gone(child), "it did not overrun anything, so it is left alone"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_killed_entry_is_told_by_its_signal(add: Add, tmp_path: Path) -> None:
    add("10-x", "kill -KILL $$")
    report, said = call(tmp_path)
    assert report.code == 137
    assert "was killed by SIGKILL" in said[0]


def test_a_missing_interpreter_is_told(add: Add, tmp_path: Path) -> None:
    add("10-x", "").write_text("#!/no/such/shell\n")
    report, said = call(tmp_path)
    assert report.code == 126
    assert "cannot be started" in said[0]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    script = tmp_path / "var/lib/vz/snippets/mine.sh"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/sh\necho "mine $1 $2"\nexit 9\n')
    script.chmod(0o755)
    record = tmp_path / "etc/organism/hook.foreign/100.json"
    record.parent.mkdir(parents=True)
    record.write_text(_hook.foreign_text("local:snippets/mine.sh", "/var/lib/vz/snippets/mine.sh"))
    return script


def test_the_hookscript_of_before_is_chained_with_its_code_and_its_words(
    add: Add, tmp_path: Path, foreign: Path
) -> None:
    for phase in _hook.PHASES:
        add("10-ours", "echo ours", phase)
    assert call(tmp_path)[1][:2] == ["10-ours: ours", "mine 100 pre-start"]
    assert call(tmp_path)[0].code == 9
    assert call(tmp_path, "post-stop")[1][0] == "mine 100 post-stop", "on the way down it goes first"
    foreign.unlink()
    report, said = call(tmp_path)
    assert report.code == 126
    assert any("hook.foreign/100.json" in line for line in said)


def command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """organism-hook itself, with its root moved."""
    code = (
        "import sys; from organism.core._root import Root; import organism.host.hook as hook;"
        f"hook.Root = lambda: Root({str(root)!r}); sys.exit(hook.main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


def test_the_command_as_proxmox_calls_it(add: Add, tmp_path: Path, foreign: Path) -> None:
    add("10-a", "echo hello")
    done = command(tmp_path, "100", "pre-start")
    assert done.returncode == 9
    assert done.stdout.splitlines()[:2] == ["10-a: hello", "mine 100 pre-start"]
    shown = json.loads(command(tmp_path, "100", "pre-start", "--json").stdout)
    assert [(each["name"], each["code"]) for each in shown["outcomes"]] == [("10-a", 0), ("local:snippets/mine.sh", 9)]


def test_list_explain_and_wrong_calls(add: Add, tmp_path: Path) -> None:
    add("10-a", "exit 1", mode=0o644)
    assert "10-a: REFUSED: is not executable" in command(tmp_path, "--list").stdout
    assert "keeps the VM from starting" in command(tmp_path, "--explain").stdout
    listed = json.loads(command(tmp_path, "--list", "--json", "100").stdout)
    assert listed["phases"]["pre-start"]["entries"][0]["refused"].startswith("is not executable")
    for words in (("100",), ("100", "start"), ("x", "pre-start"), ("99", "pre-start"), ()):
        done = command(tmp_path, *words)
        assert done.returncode == 2 and done.stderr


@pytest.mark.parametrize("text", ["{", '{"format": 2}', '{"format": 1, "entry_timeout_s": 0, "total_timeout_s": 1}'])
def test_settings_that_cannot_be_used_stop_a_start(add: Add, tmp_path: Path, text: str) -> None:
    add("10-a", ":")
    (tmp_path / "etc/organism/hook.json").write_text(text)
    done = command(tmp_path, "100", "pre-start")
    assert done.returncode == 2
    assert "organism-hook: " in done.stderr


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ended(pid: int) -> bool:
    """Waits for the end of a process that was killed (its parent is not this test); 10 s are a guard."""
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)
