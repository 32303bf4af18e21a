# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Python: style, format, types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_ruff_check(gate: Any) -> None:
    gate.run("ruff", "check", "--no-fix", "--cache-dir", gate.cache / "ruff", ".")


def test_ruff_format(gate: Any) -> None:
    gate.run("ruff", "format", "--diff", "--cache-dir", gate.cache / "ruff", ".")


@pytest.mark.parametrize(
    "package",
    [
        pytest.param("organism", id="runtime-and-library"),
        # the same library once more, as the modules see it
        pytest.param("ansible_collections.organism.proxmox.plugins", id="modules"),
        pytest.param("lab", id="lab"),
        pytest.param("rig", id="rig"),
        pytest.param("house", id="house"),
    ],
)
def test_mypy_strict(gate: Any, package: str) -> None:
    paths = {"house": gate.repo / "scripts", "lab": gate.repo, "rig": gate.repo}
    path = paths.get(
        package, gate.cache / "collections" if package.startswith("ansible") else gate.repo / "runtime/src"
    )
    env = gate.environment(MYPYPATH=str(path))
    gate.run("mypy", "--strict", "--cache-dir", gate.cache / "mypy" / package, "-p", package, env=env)


def test_every_python_file_compiles(gate: Any, of_kind: Callable[..., list[str]]) -> None:
    names = of_kind(".py")
    assert names
    for name in names:
        compile(Path(gate.repo, name).read_bytes(), name, "exec", dont_inherit=True)
