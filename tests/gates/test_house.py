# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The house itself: ./run's verbs, and the account that ends a test session."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(gate: Any, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(gate.repo / "run"), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env or gate.environment(ORGANISM_CACHE=str(gate.cache)),
        timeout=120,
        check=False,
    )


def test_help_lists_every_verb_and_which_come_later(gate: Any) -> None:
    done = run(gate, "help")
    assert done.returncode == 0
    verbs = dict(re.findall(r"^  ([a-z-]+)\b(.*)$", done.stdout, re.MULTILINE))
    assert {"demo", "test", "setup", "lint", "docs", "bench", "chaos", "rig", "rig-test", "clean", "help"} <= set(verbs)
    later = {verb for verb, text in verbs.items() if "comes with a later version" in text}
    for verb in sorted(later):
        refused = run(gate, verb)
        assert refused.returncode == 2, verb
        assert "comes with a later version" in refused.stderr, verb
        assert not refused.stdout, verb


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "no verb 'nonsense'"),
        (["setup", "more"], "setup takes no such argument: more"),
        (["clean", "--all"], "clean takes nothing but --keep-cache"),
        (["completion", "fish"], "bash or zsh"),
        (["lab"], "lab wants one of"),
        (["rig-down", "more"], "rig-down takes nothing but"),
    ],
)
def test_wrong_words_end_2_and_say_so(gate: Any, words: list[str], said: str) -> None:
    done = run(gate, *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_second_setup_has_nothing_to_do(gate: Any) -> None:
    """This session was set up by ./run, so another setup must find all in place: no step is announced."""
    done = run(gate, "setup")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"Ready: {gate.cache / 'venv'}\n"


def test_a_python_that_does_not_fit_is_refused(gate: Any, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run(gate, "setup", env=gate.environment(ORGANISM_PYTHON=str(old)))
    assert done.returncode == 1
    assert f"ORGANISM_PYTHON={old} is not a Python 3.11 to 3.13" in done.stderr


def test_completion_offers_the_verbs(gate: Any) -> None:
    script = run(gate, "completion", "bash").stdout
    asked = 'COMP_WORDS=(./run ri); COMP_CWORD=1; _organism_run; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["rig", "rig-down", "rig-test"]


def test_make_calls_run(gate: Any) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed here (nothing but this check needs it)")
    # asked for by a verb that make offers, so that a verb which ./run does not know shows
    verbs = re.findall(r"^verbs := (.*)$", (gate.repo / "Makefile").read_text(), re.MULTILINE)[0].split()
    listed = run(gate, "help").stdout
    assert [verb for verb in verbs if not re.search(rf"^  {verb}\b", listed, re.MULTILINE)] == []
    assert "./run test -k x" in gate.run("make", "--dry-run", "test", "ARGS=-k x")


TIERS = {
    "rig": "def test_rig(): pass\n",
    "lab": "def test_lab(): pass\n",
    "unit": "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip('no unicorn here')\n",
    "service": "import pytest\n@pytest.mark.skip(reason='no unicorn here')\ndef test_service(): pass\n",
    "gates": "def test_gate(): assert 0\n",
}


def session(gate: Any, top: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A pytest session of its own with this project's conftest and settings, on five little tiers."""
    tests = top / "tests"
    for tier, text in TIERS.items():
        (tests / tier).mkdir(parents=True)
        (tests / tier / f"test_{tier}.py").write_text(text)
    shutil.copy(gate.repo / "tests/conftest.py", tests)
    shutil.copy(gate.repo / "pyproject.toml", top)
    env = gate.environment(ORGANISM_CACHE=str(top / "cache"))
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, cwd=top, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_tiers_run_in_order_and_the_account_comes_last(gate: Any, tmp_path: Path) -> None:
    done = session(gate, tmp_path)
    assert done.returncode == 1
    assert re.findall(r"^tier (\w+): (\d+) tests?", done.stdout, re.MULTILINE) == [
        *(("unit", "2"), ("gates", "1"), ("service", "1"), ("lab", "1"), ("rig", "1")),
    ]
    lines = done.stdout.rstrip().splitlines()
    marks = ["short test summary info", " tiers ", "SKIPPED: 2", " in "]
    places = [max(n for n, line in enumerate(lines) if line.startswith("=") and mark in line) for mark in marks]
    assert places == sorted(places), done.stdout
    assert places[-1] == len(lines) - 1
    assert re.fullmatch(r"=+ 1 failed, 3 passed, 2 skipped in \S+ =+", lines[-1]), lines[-1]
    table = {line.split()[0]: line.split()[1:6] for line in lines[places[1] + 1 : places[2]]}
    assert table["unit"] == ["2", "1", "0", "0", "1"]
    assert table["gates"] == ["1", "0", "1", "0", "0"]
    told = [line for line in lines[places[2] + 1 : -1] if line.startswith("SKIPPED")]
    assert told == ["SKIPPED tests/unit/test_unit.py::test_two and 1 more: no unicorn here"]


def test_tiers_that_were_not_chosen_are_named(gate: Any, tmp_path: Path) -> None:
    done = session(gate, tmp_path, "tests/unit", "-k", "one")
    assert done.returncode == 0
    assert "not chosen in this run: gates, service, lab, rig" in done.stdout
    assert "nothing was skipped" in done.stdout
    assert re.fullmatch(r"=+ 1 passed, 1 deselected in \S+ =+", done.stdout.rstrip().splitlines()[-1])
