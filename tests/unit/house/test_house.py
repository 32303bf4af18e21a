# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ./run decides before anything is installed: packages, steps, and what an interruption leaves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    from house import clean, debian, main, places, setup, steps

    return SimpleNamespace(clean=clean, debian=debian, main=main, places=places, setup=setup, steps=steps)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; a program put there writes its words to `calls`, one call a line."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, text: str = "") -> None:
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/calls"\n{text}\n')
    file.chmod(0o755)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.fixture
def steps(house: Any, tmp_path: Path) -> Any:
    made = house.steps.Steps(1, tmp_path / "log" / "setup.log")
    made.begin("Debian packages")
    return made


def test_only_missing_packages_are_wanted(house: Any, programs: Path) -> None:
    program(programs, "dpkg-query", 'echo "git installed"; echo "rsync config-files"; exit 1')
    assert house.debian.missing({"git": "", "rsync": "", "strace": ""}) == ["rsync", "strace"]


def test_without_dpkg_all_are_missing_and_without_apt_one_is_told(house: Any, programs: Path, steps: Any) -> None:
    assert house.debian.missing({"git": "x"}) == ["git"]
    with pytest.raises(house.steps.StepFailed, match="no apt-get here: install the equivalents"):
        house.debian.install(["git"], {"git": "x"}, steps)


def test_neither_root_nor_sudo_is_refused_with_the_command(
    house: Any, programs: Path, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(house.steps.StepFailed, match=r"not root and there is no sudo; .*\n  apt-get install git"):
        house.debian.install(["git"], {"git": "x"}, steps)
    assert not (programs / "calls").exists()


def test_sudo_is_asked_first_and_then_used(
    house: Any, programs: Path, steps: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs, "apt-get")
    program(programs, "sudo")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    house.debian.install(["git"], {"git": "why it is wanted"}, steps)
    apt = "sudo -n env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 apt-get -q"
    assert calls(programs) == ["sudo -v", f"{apt} update", f"{apt} install -y --no-install-recommends git"]
    assert "why it is wanted" in capsys.readouterr().err


def test_sudo_that_refuses_ends_it(house: Any, programs: Path, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "apt-get")
    program(programs, "sudo", "exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(house.steps.StepFailed, match="sudo refused"):
        house.debian.install(["git"], {"git": "x"}, steps)
    assert calls(programs) == ["sudo -v"]


def test_a_failed_step_shows_the_tail_of_its_own_output(house: Any, steps: Any) -> None:
    steps.run([sys.executable, "-c", "print('from before')"], env=dict(os.environ))
    lines = house.steps.TAIL_LINES + 5
    with pytest.raises(house.steps.StepFailed) as failure:
        steps.run([sys.executable, "-c", f"[print('line', n) for n in range({lines})]; raise SystemExit(7)"], env={})
    text = str(failure.value)
    assert "[1/1] Debian packages: failed (exit 7)" in text
    assert f"line {lines - 1}" in text
    assert "line 0\n" not in text
    assert "from before" not in text
    assert str(steps.log) in text
    assert "from before" in steps.log.read_text()


@pytest.fixture
def ready(house: Any, tmp_path: Path) -> Any:
    """Places of a checkout whose cache looks as after `./run setup`."""
    where = house.places.Places(REPO, tmp_path / "cache")
    (where.venv / "bin").mkdir(parents=True)
    for name in (f"python{sys.version_info[0]}.{sys.version_info[1]}", "python", "pip"):
        (where.venv / "bin" / name).touch()
    plan = house.setup._Plan(where, "test")
    for name in house.setup.FILES:
        (where.venv / f".stamp-{name}").write_text(plan._stamp(name))
    where.nats.mkdir()
    (where.nats / ".stamp").write_text(plan.nats_stamp)
    where.wheels.mkdir()
    (where.wheels / "wheelhouse.json").touch()
    return where


def todo(house: Any, where: Any, purpose: str = "test") -> tuple[bool, bool, bool, bool]:
    plan = house.setup._Plan(where, purpose)
    return plan.make_venv, plan.install, plan.install_nats, plan.build_wheels


def test_a_ready_cache_needs_nothing(house: Any, ready: Any) -> None:
    assert todo(house, ready) == (False, False, False, False)
    assert house.setup._Plan(ready, "test").count == 0


def test_what_tests_use_also_serves_the_demo_and_not_the_other_way(house: Any, ready: Any) -> None:
    (ready.venv / ".stamp-demo").unlink()
    assert todo(house, ready, "demo") == (False, False, False, False)
    (ready.venv / ".stamp-test").rename(ready.venv / ".stamp-demo")
    assert todo(house, ready, "test") == (False, True, False, False)


def test_an_interrupted_installation_is_made_anew(house: Any, ready: Any) -> None:
    (ready.venv / ".incomplete").touch()
    assert todo(house, ready) == (True, True, False, False)


def test_another_python_makes_another_environment(house: Any, ready: Any) -> None:
    (ready.venv / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}").unlink()
    assert todo(house, ready)[:2] == (True, True)


def test_a_lost_server_or_wheelhouse_is_replaced(house: Any, ready: Any) -> None:
    (ready.nats / ".stamp").unlink()
    (ready.wheels / "wheelhouse.json").unlink()
    assert todo(house, ready) == (False, False, True, True)


def test_the_cache_can_be_elsewhere(house: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORGANISM_CACHE", str(tmp_path / "there"))
    where = house.places.Places.here()
    assert (where.repo, where.cache) == (REPO, tmp_path / "there")
    env = where.environment()
    assert env["PATH"].split(":")[:2] == [str(tmp_path / "there/venv/bin"), str(tmp_path / "there/bin")]
    assert {env[name] for name in ("ANSIBLE_HOME", "ORGANISM_CACHE")} == {
        str(where.cache / "ansible"),
        str(where.cache),
    }
    monkeypatch.delenv("ORGANISM_CACHE")
    assert house.places.Places.here().cache == REPO / ".cache"


def checkout(house: Any, tmp_path: Path) -> Any:
    where = house.places.Places(tmp_path / "checkout", tmp_path / "checkout" / ".cache")
    for name in ("venv/lib", "pip/x", "wheels"):
        (where.cache / name).mkdir(parents=True)
    (where.repo / ".ruff_cache").mkdir()
    (where.repo / "plugins/__pycache__").mkdir(parents=True)
    (where.repo / "plugins/mine.py").touch()
    return where


def test_clean_removes_what_was_made_and_nothing_else(house: Any, tmp_path: Path) -> None:
    where = checkout(house, tmp_path)
    assert house.clean.clean(where, keep_cache=False) == 0
    assert [str(p.relative_to(where.repo)) for p in sorted(where.repo.rglob("*"))] == ["plugins", "plugins/mine.py"]
    assert house.clean.clean(where, keep_cache=False) == 0, "a second time"


def test_clean_can_keep_the_downloads(house: Any, tmp_path: Path) -> None:
    where = checkout(house, tmp_path)
    assert house.clean.clean(where, keep_cache=True) == 0
    assert sorted(path.name for path in where.cache.iterdir()) == ["pip", "wheels"]


def test_clean_stops_where_a_lab_cannot_be_taken_down(
    house: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = checkout(house, tmp_path)
    (where.cache / "lab").mkdir()
    assert house.clean.clean(where, keep_cache=False) == 1  # there is no Python to take it down with
    assert "./run setup" in capsys.readouterr().err
    where.python.parent.mkdir(parents=True)
    where.python.write_text("#!/bin/sh\nexit 3\n")
    where.python.chmod(0o755)
    assert house.clean.clean(where, keep_cache=False) == 1
    assert "the lab could not be taken down (exit 3)" in capsys.readouterr().err
    assert (where.cache / "lab").exists()
    assert (where.cache / "pip/x").exists()


def test_clean_never_removes_through_a_mount(
    house: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = checkout(house, tmp_path)
    monkeypatch.setattr(house.clean, "_mounts_below", lambda folder: [f"{folder}/lab/x"])
    assert house.clean.clean(where, keep_cache=False) == 1
    assert f"still mounted, so {where.cache} stays" in capsys.readouterr().err
    assert (where.cache / "pip/x").exists()


def test_mounts_below_a_folder_are_seen(house: Any, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    points = ("/", "/my\\040files/.cache", "/my\\040files/.cache/lab/proc", "/my\\040files/.cache2/x")
    table.write_text("".join(f"1 2 0:3 / {point} rw - tmpfs none rw\n" for point in points))
    assert house.clean._mounts_below(Path("/my files/.cache"), table) == ["/my files/.cache/lab/proc"]
