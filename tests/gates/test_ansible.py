# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""YAML, roles, playbooks, inventories, and what ansible-test says of the plugins."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (REPO / "roles").glob("*") if path.is_dir())
PLAYBOOKS = sorted(path.name for path in (REPO / "playbooks").glob("*.yml"))
INVENTORIES = sorted(path.name for path in (REPO / "inventories").glob("*") if path.is_dir())

# Stands for the script that ansible-test would fetch to put pip into its virtual environments: the same by ensurepip.
GET_PIP = """\
import subprocess, sys
subprocess.check_call([sys.executable, "-m", "ensurepip"])
words = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *words]))
"""
# of ansible-test's output, which is mostly about how it installs its tools
COMPLAINTS = ("ERROR", "FATAL", "WARNING")


def test_yamllint(gate: Any, of_kind: Callable[..., list[str]]) -> None:
    gate.run("yamllint", "--strict", "-f", "parsable", *of_kind(".yml", ".yaml", ".yamllint", ".ansible-lint"))


@pytest.mark.slow
def test_ansible_lint_production(gate: Any, tree: Path) -> None:
    gate.run("ansible-lint", "--offline", "--strict", "--nocolor", "-q", "--profile", "production", cwd=tree)


@pytest.mark.slow
def test_ansible_test_sanity(gate: Any, tree: Path) -> None:
    home = gate.cache / "ansible-test"
    cached = home / ".ansible" / "test" / "cache"
    cached.mkdir(parents=True, exist_ok=True)
    for version in ("24_2", "25_2"):  # ansible-core 2.19 and 2.21 ask for these
        (cached / f"get_pip_{version}.py").write_text(GET_PIP)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    env = gate.environment(HOME=str(home))
    env.pop("ANSIBLE_HOME")
    env.pop("ANSIBLE_COLLECTIONS_PATH")  # it finds the tree's by itself, and wants no other
    # Its business is what Ansible loads. The rest is held to more than it asks by ruff, mypy and shellcheck, and breaks
    # rules that are made for plugins (a link to a folder, which is how runtime and library are one).
    others = [
        word
        for folder in ("lab", "rig", "runtime", "scripts", "inventories", "tests")
        for word in ("--exclude", f"{folder}/")
    ]
    gate.run("ansible-test", "sanity", "--color", "no", "--python", python, *others, cwd=tree, env=env, only=COMPLAINTS)


def test_there_are_roles_playbooks_and_inventories() -> None:
    """The tests below run once for each, so an empty list would hide a wrong path."""
    assert ROLES
    assert "site.yml" in PLAYBOOKS
    assert INVENTORIES


@pytest.mark.parametrize("role", ROLES)
def test_role_is_whole(role: str) -> None:
    wanted = ("README.md", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml")
    lacking = [name for name in wanted if not (REPO / "roles" / role / name).is_file()]
    assert not lacking, f"roles/{role} lacks {', '.join(lacking)}"


@pytest.mark.parametrize("role", ROLES)
def test_role_argument_specs_equal_defaults(role: str) -> None:
    """The same names with the same defaults; an option that is required has none."""
    folder = REPO / "roles" / role
    specs = _yaml(folder / "meta/argument_specs.yml").get("argument_specs", {})
    defaults = _yaml(folder / "defaults/main.yml")
    options: dict[str, Any] = {}
    for entry in specs.values():
        options.update(entry.get("options") or {})
    faults = [
        f"{name}: in defaults/main.yml, not in meta/argument_specs.yml" for name in sorted(set(defaults) - set(options))
    ]
    for name, option in sorted(options.items()):
        if not name.startswith((f"{role}_", "organism_")):
            faults.append(f"{name}: does not begin with {role}_ (nor organism_, which all roles share)")
        if option.get("required"):
            if name in defaults:
                faults.append(f"{name}: required, and yet it has a default")
        elif name not in defaults:
            # shared ones (organism_*) may be set by the inventory alone; their default is that they are not defined
            if "default" in option or not name.startswith("organism_"):
                faults.append(f"{name}: in meta/argument_specs.yml, not in defaults/main.yml")
        elif "default" not in option:
            faults.append(f"{name}: meta/argument_specs.yml does not say its default")
        elif option["default"] != defaults[name]:
            faults.append(f"{name}: the spec says {option['default']!r}, defaults/main.yml {defaults[name]!r}")
        if not option.get("description"):
            faults.append(f"{name}: no description")
    assert not faults, f"roles/{role}:\n  " + "\n  ".join(faults)


def _yaml(file: Path) -> dict[str, Any]:
    """The mapping in a file; empty when there is none (test_role_is_whole says which must be there)."""
    return (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_inventory_reads(gate: Any, inventory: str) -> None:
    listing = gate.run("ansible-inventory", "-i", f"inventories/{inventory}", "--list", env=strict(gate))
    assert json.loads(listing)["_meta"]["hostvars"], f"inventories/{inventory} has no host"


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_site_fits_inventory(gate: Any, inventory: str) -> None:
    gate.run(
        *("ansible-playbook", "-i", f"inventories/{inventory}", "--syntax-check"),
        *(f"playbooks/{name}" for name in PLAYBOOKS),
        env=strict(gate),
    )


def strict(gate: Any) -> dict[str, str]:
    """An unreadable inventory is an error, not a warning; deprecations would mix with the output."""
    env: dict[str, str] = gate.environment(
        ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED="1", ANSIBLE_DEPRECATION_WARNINGS="0", ANSIBLE_LOCALHOST_WARNING="0"
    )
    return env


@pytest.mark.slow
def test_documentation_lint(gate: Any, tree: Path) -> None:
    env = gate.environment(ANSIBLE_COLLECTIONS_PATH=str(tree.parents[2]))
    gate.run(
        "antsibull-docs",
        "lint-collection-docs",
        "--plugin-docs",
        "--validate-collection-refs=self",
        ".",
        cwd=tree,
        env=env,
    )


def test_changelog_fragments(gate: Any, tmp_path: Path) -> None:
    # it leaves a cache of plugins beside its settings: work on a copy
    for name in ("changelogs", "galaxy.yml", "meta"):
        source = gate.repo / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    gate.run("antsibull-changelog", "lint", cwd=tmp_path)
