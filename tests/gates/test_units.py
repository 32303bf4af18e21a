# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every systemd unit that the collection installs, as systemd itself reads it (systemd-analyze verify).

Units come from roles (files, and templates rendered with the roles' defaults) and from library modules that name one in
UNIT and its text in UNIT_TEXT. They are put together into one root with the system's own units and with stand-ins for
the programs they start, so that a misspelt key, section, dependency or calendar line shows, and a program that is not
on this machine does not.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import organism.core

REPO = Path(__file__).resolve().parents[2]
KINDS = ("service", "timer", "socket", "mount", "path", "slice", "target")
ENDINGS = tuple(f".{kind}" for kind in KINDS)
SYSTEM_UNITS = (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system"))


def unit_files() -> list[Path]:
    return sorted(p for p in (REPO / "roles").glob("*/files/**/*") if p.name.endswith(ENDINGS))


def unit_templates() -> list[Path]:
    return sorted(p for p in (REPO / "roles").glob("*/templates/**/*.j2") if p.stem.endswith(ENDINGS))


def library_units() -> Iterator[tuple[Path, str, str]]:
    """(file, unit's name, its text) of the library's modules."""
    for found in pkgutil.iter_modules(organism.core.__path__):
        if found.name == "_ansible":
            continue
        module = importlib.import_module(f"organism.core.{found.name}")
        name, text = getattr(module, "UNIT", None), getattr(module, "UNIT_TEXT", None)
        if isinstance(name, str) and isinstance(text, str):
            yield REPO / "plugins" / "module_utils" / f"{found.name}.py", name, text


def render(gate: Any, templates: list[Path], into: Path) -> None:
    """Render by Ansible itself, with the roles' defaults and tests/gates/unit_vars.yml for loops and facts."""
    if not templates:
        return
    variables = sorted(p for kind in ("defaults", "vars") for p in (REPO / "roles").glob(f"*/{kind}/main.yml"))
    play = {
        "name": "Render the unit templates",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": True,
        "gather_subset": ["!all", "min"],
        "vars": {"ansible_python_interpreter": "{{ ansible_playbook_python }}"},
        "vars_files": [*map(str, variables), str(REPO / "tests/gates/unit_vars.yml")],
        "tasks": [
            {"name": str(t.relative_to(REPO)), "ansible.builtin.template": {"src": str(t), "dest": str(into / t.stem)}}
            for t in templates
        ],
    }
    playbook = into.parent / "render.yml"
    playbook.write_text(yaml.safe_dump([play], sort_keys=False))
    gate.run("ansible-playbook", "-i", "localhost,", playbook, env=gate.environment(ANSIBLE_LOCALHOST_WARNING="0"))


def stand_in(root: Path, text: str) -> None:
    """Something executable at the path of each program that a unit starts."""
    for match in re.finditer(r"^Exec\w+\s*=\s*[-@:+!|]*(/[^\s%]+)", text, re.MULTILINE):
        program = root / match[1].lstrip("/")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)


@pytest.fixture(scope="module")
def root(gate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system root that holds the collection's units among the system's."""
    top = tmp_path_factory.mktemp("units")
    ours = top / "etc" / "systemd" / "system"
    ours.mkdir(parents=True)
    system = next(path for path in SYSTEM_UNITS if path.is_dir())
    shutil.copytree(system, top / "usr/lib/systemd/system", symlinks=True)
    (top / "lib").symlink_to("usr/lib")
    for file in unit_files():
        shutil.copy(file, ours)
    for _file, name, text in library_units():
        (ours / name).write_text(text)
    render(gate, unit_templates(), ours)
    for unit in ours.iterdir():
        stand_in(top, unit.read_text())
    return top


def names() -> list[str]:
    return sorted(
        {
            *(path.name for path in unit_files()),
            *(path.stem for path in unit_templates()),
            *(name for _file, name, _text in library_units()),
        }
    )


def verify(root: Path, unit: str) -> str:
    """What systemd has to say against a unit of `root`; nothing when it is fine."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", str(root / "etc/systemd/system" / unit)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # a warning (an unknown key) ends 0 and is still a fault
    return done.stdout or (f"systemd-analyze ended with {done.returncode}" if done.returncode else "")


def test_there_are_units() -> None:
    assert names()


@pytest.mark.parametrize("unit", names())
def test_unit_verifies(root: Path, unit: str) -> None:
    said = verify(root, unit)
    assert not said, said


def test_a_misspelt_unit_is_noticed(root: Path) -> None:
    """The check itself: systemd must refuse what is wrong in three ways, and take what is right."""
    good = "[Unit]\nDescription=x\n[Service]\nExecStart=/opt/organism/x --y\n"
    stand_in(root, good)
    unit = root / "etc/systemd/system/gate-check.service"
    try:
        unit.write_text(good)
        assert verify(root, unit.name) == ""
        for bad in (good + "Restrat=always\n", good.replace("/opt/organism/x", "/opt/absent"), good + "[Sevrice]\n"):
            unit.write_text(bad)
            assert verify(root, unit.name)
    finally:
        unit.unlink()


def test_no_unit_hides_from_this_gate(gate: Any, files: list[str]) -> None:
    """A file with a whole unit in it is one of those above."""
    seen = {*unit_files(), *unit_templates(), *(file for file, _name, _text in library_units())}
    hidden = []
    for name in files:
        path = REPO / name
        if not name.startswith(("roles/", "plugins/", "runtime/")) or path.is_symlink() or name.endswith(".md"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        kinds = set(re.findall(r"^\[(\w+)\]$", text, re.MULTILINE))
        if "Unit" in kinds and kinds & {"Service", "Timer", "Mount", "Socket", "Path"} and path not in seen:
            hidden.append(name)
    assert not hidden, f"units that this gate does not see: {hidden}"
