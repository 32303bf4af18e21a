# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The unit tests on every pair of ansible-core and Python that the collection promises.

One of the pairs may be this very session's; the others run in virtual environments of their own, kept in the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# (Python, requirement file that pins ansible-core): the oldest and the newest that there is
PAIRS = (("3.11", "setup.txt"), ("3.13", "newest.txt"))


def pinned_core(requirements: Path) -> str:
    match = re.search(r"^ansible-core==(\S+)$", requirements.read_text(), re.MULTILINE)
    assert match is not None, f"{requirements} does not pin ansible-core"
    return match[1]


def interpreter(wanted: str) -> Path | None:
    """A Python of that version that has venv and ensurepip: Debian's, on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [f"/usr/bin/python{wanted}", shutil.which(f"python{wanted}")]
    candidates += [str(path) for path in sorted(pyenv.glob(f"{wanted}.*/bin/python{wanted}"), reverse=True)]
    check = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '{wanted}')"
    for candidate in candidates:
        if candidate is None or not Path(candidate).exists():
            continue
        # pyenv leaves a launcher on PATH for versions that are not active: ask it, do not trust its name
        done = subprocess.run([candidate, "-I", "-c", check], capture_output=True, check=False)
        if done.returncode == 0:
            return Path(candidate)
    return None


def virtual_environment(gate: Any, python: Path, digits: str, core: str) -> Path:
    """Make (or find) `.cache/venv<digits>` with that ansible-core, pytest and what the runtime needs."""
    place: Path = gate.cache / f"venv{digits}"
    requirements = gate.repo / "requirements"
    runtime = tomllib.loads((gate.repo / "runtime/pyproject.toml").read_text())["project"]
    tests = [line for line in (requirements / "test.txt").read_text().splitlines() if line and line[0] != "#"]
    extra = [pin for pins in runtime["optional-dependencies"].values() for pin in pins]
    wanted = [f"ansible-core=={core}", *tests, *runtime["dependencies"], *extra]
    constraints = requirements / "constraints.txt"
    words = f"{python} {place} {wanted} {constraints.read_text()}"
    stamp = hashlib.sha256(words.encode()).hexdigest()
    if (place / ".stamp").exists() and (place / ".stamp").read_text() == stamp:
        return place
    if place.exists():
        shutil.rmtree(place)
    gate.run(python, "-I", "-m", "venv", place)
    gate.run(place / "bin/python", "-m", "pip", "install", "-q", "-c", constraints, *wanted)
    (place / ".stamp").write_text(stamp)
    return place


def test_this_session_is_one_of_the_pairs_or_they_all_run_below() -> None:
    """The pins of requirements/setup.txt are what this session really runs on."""
    here = Path(__file__).resolve().parents[2] / "requirements" / "setup.txt"
    assert version("ansible-core") == pinned_core(here)


@pytest.mark.slow
@pytest.mark.parametrize(("python", "file"), PAIRS, ids=[f"python{python}" for python, _file in PAIRS])
def test_unit_tests(gate: Any, python: str, file: str) -> None:
    core = pinned_core(gate.repo / "requirements" / file)
    if (python, core) == (f"{sys.version_info[0]}.{sys.version_info[1]}", version("ansible-core")):
        return  # the unit tier of this session is that
    found = interpreter(python)
    if found is None:
        pytest.skip(f"no Python {python} with venv here: the unit tests did not run on ansible-core {core} with it")
    place = virtual_environment(gate, found, python.replace(".", ""), core)
    env = gate.environment(PYTHONPATH=str(gate.repo / "runtime" / "src"))
    env["PATH"] = f"{place / 'bin'}:{env['PATH']}"
    said = gate.run(place / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit", env=env)
    assert re.search(r"^=*\s*\d+ passed", said, re.MULTILINE), said
