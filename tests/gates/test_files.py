# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every file: licence, shell, size, and the shortcuts that this project does without."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# lines: more than a reader holds, and more than anybody should have to
LONG, TOO_LONG = 500, 700

CODE = (".py", ".yml", ".yaml", ".sh", ".j2", ".service", ".timer")
# Each hides a failure, or is a promise that nobody keeps. The patterns are split so that this file passes them.
# What `except` may catch is ruff's part (E722, BLE001, S110).
SMELLS = {
    "a failure thrown away": re.compile(r"\|\|\s*(true\b|:\s*$)"),
    "errors ignored": re.compile(r"\bignore_" + r"errors:\s*(true|yes)"),
    "a task that cannot fail": re.compile(r"\bfailed_when:\s*" + r"(false|no)\b"),
    "any exception suppressed": re.compile(r"\bsuppress\((Base)?" + r"Exception\)"),
    "a string for the shell": re.compile(r"\bshell=" + r"True\b"),
    "work put off": re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b"),
    "a check silenced without a reason": re.compile(
        r"#\s*(noqa(:\s*[A-Z]+[0-9]+(,\s*[A-Z]+[0-9]+)*)?|type:\s*ignore(\[[\w,\- ]+\])?)\s*$"
    ),
}


def test_licences(gate: Any, tree: Path) -> None:
    gate.run("reuse", "--root", tree, "lint", cwd=tree)


def test_shellcheck(gate: Any, shell_scripts: list[str]) -> None:
    assert "run" in shell_scripts
    gate.run("shellcheck", "--severity=style", *shell_scripts)


def test_no_smells(gate: Any, files: list[str], shell_scripts: list[str]) -> None:
    found = []
    for name in files:
        path = gate.repo / name
        if path.is_symlink() or not (name.endswith(CODE) or name in shell_scripts or name == "Makefile"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{name}:{number}: {what}: {line.strip()}" for what, smell in SMELLS.items() if smell.search(line)
            ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a failure thrown away", "rm x || " + "true"),
        ("errors ignored", "  ignore_" + "errors: true"),
        ("a task that cannot fail", "  failed_when: " + "false"),
        ("any exception suppressed", "with suppress(" + "Exception):"),
        ("a string for the shell", "run(x, shell=" + "True)"),
        ("work put off", "# TO" + "DO later"),
        ("a check silenced without a reason", "x = 1  # no" + "qa: S101"),
        ("a check silenced without a reason", "x = 1  # type: " + "ignore[arg-type]"),
    ],
)
def test_smells_are_noticed(what: str, line: str) -> None:
    assert SMELLS[what].search(line)


def test_files_are_of_a_size_to_read(gate: Any, of_kind: Callable[..., list[str]]) -> None:
    sizes = {
        name: len((gate.repo / name).read_text(encoding="utf-8").splitlines()) for name in of_kind(".py", ".yml", ".j2")
    }
    for name, lines in sizes.items():
        if LONG < lines <= TOO_LONG:
            warnings.warn(f"{name} has {lines} lines: split it by subject", stacklevel=1)
    assert not {name: lines for name, lines in sizes.items() if lines > TOO_LONG}
