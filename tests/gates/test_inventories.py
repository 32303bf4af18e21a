# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventories in the repository: every group has its hosts, and the roles accept every variable.

(That they load and fit the playbooks is tested beside the other files of Ansible.)
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible.vars.manager import VariableManager

from organism.core import _maestro_settings, _worker_settings
from organism.core._keyvalue import SettingsError
from organism.core._levels import LEVELS

REPO = Path(__file__).resolve().parents[2]
INVENTORIES = sorted(path for path in (REPO / "inventories").iterdir() if path.is_dir())
PLAYBOOKS = sorted((REPO / "playbooks").glob("*.yml"))
# settings that a role hands on as they are: the daemon's own schema knows them
SCHEMAS: dict[str, Callable[[Any], object]] = {
    "maestro_settings": _maestro_settings.coerce,
    "gpu_worker_settings": _worker_settings.SCHEMA.coerce,
}
GROUPS = {"pve", "cortex", "gpu_pool", "bus", "conductor"}

inventories = pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.name)


def ansible(tool: str, *words: str | Path) -> str:
    """Output of an Ansible program of this virtual environment, with the repository's own settings."""
    cache = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").absolute()
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(cache / "collections"),
        "ANSIBLE_NOCOLOR": "1",
    }
    done = subprocess.run(
        [str(Path(sys.executable).parent / tool), *map(str, words)],
        cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stderr, done.stderr
    return done.stdout


def specs() -> dict[str, dict[str, Any]]:
    """role -> every option of all its entry points."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((REPO / "roles").glob("*/meta/argument_specs.yml")):
        entries = yaml.safe_load(file.read_text())["argument_specs"]
        options: dict[str, Any] = {}
        for entry in entries.values():
            options.update(entry.get("options", {}))
        found[file.parents[1].name] = options
    return found


def role_of(variable: str, roles: dict[str, dict[str, Any]]) -> str | None:
    """The role that a variable belongs to by its prefix; the longest name wins (gpu_worker before gpu)."""
    fitting = [role for role in roles if variable.startswith(f"{role}_")]
    return max(fitting, key=len) if fitting else None


def problems(inventory: Path) -> list[str]:
    """What a role would refuse, and what no role or playbook reads: a line for each variable of each host."""
    loader = DataLoader()
    manager = InventoryManager(loader=loader, sources=[str(inventory)])
    variables = VariableManager(loader=loader, inventory=manager)
    roles = specs()
    sources = [*PLAYBOOKS, *(REPO / "roles").rglob("*.yml")]
    read = set(re.findall(r"\borganism_\w+", "\n".join(file.read_text() for file in sources)))
    read |= set(re.findall(r"\borganism_\w+", "\n".join(f.read_text() for f in inventory.rglob("*.yml") if _values(f))))
    found = []
    for host in manager.get_hosts():
        everything = variables.get_vars(host=host)
        templar = Templar(loader=loader, variables=everything)
        for name in everything:
            role = role_of(name, roles)
            if role is None:
                if name.startswith("organism_") and name not in read:
                    found.append(f"{host}: no role or playbook reads {name}")
                continue
            if name not in roles[role]:
                found.append(f"{host}: role {role} has no variable {name}")
                continue
            value = templar.template(everything[name])
            spec = {**roles[role][name], "required": False}
            refused = ArgumentSpecValidator({name: spec}).validate({name: value}).error_messages
            found += [f"{host}: {name}: {message}" for message in refused]
            if name in SCHEMAS and not refused:
                try:
                    SCHEMAS[name](value)
                except SettingsError as error:
                    found += [f"{host}: {name}: {problem}" for problem in error.problems]
    return found


def _values(file: Path) -> bool:
    return "{{" in file.read_text()


@inventories
def test_it_loads_and_knows_every_group_that_playbooks_name(inventory: Path) -> None:
    listing = json.loads(ansible("ansible-inventory", "-i", inventory, "--list"))
    groups = set(listing["all"]["children"])
    assert groups >= GROUPS
    for needed in ("pve",) if inventory.name == "rig" else ("bus", "conductor", "gpu_pool"):
        assert listing[needed]["hosts"], f"nobody is in group {needed}"


@inventories
def test_roles_accept_its_variables(inventory: Path) -> None:
    assert problems(inventory) == []


def test_the_reference_rig_has_all_that_level_6_wants() -> None:
    loader = DataLoader()
    manager = InventoryManager(loader=loader, sources=[str(REPO / "inventories" / "pandaminer")])
    variables = VariableManager(loader=loader, inventory=manager)
    panda, pool = (variables.get_vars(host=manager.get_host(name)) for name in ("panda", "gpupool"))
    assert panda["gpu_passthrough_devices"] and panda["gpu_passthrough_cards"] == 12
    assert panda["gpu_pool_vm_image_file"].endswith(".qcow2") and "genericcloud" not in panda["gpu_pool_vm_image_file"]
    for key in panda["gpu_pool_vm_ssh_keys"]:
        kind, blob, _name = key.split()
        raw = base64.b64decode(blob, validate=True)
        assert kind == "ssh-ed25519" and len(raw) == 51 and raw[4:15] == kind.encode()
    address = ipaddress.ip_interface(panda["gpu_pool_vm_ip"])
    assert str(address.ip) == pool["ansible_host"], "level 7 logs in where cloud-init puts the VM"
    assert panda["gpu_pool_vm_user"] == pool["ansible_user"]
    assert ipaddress.ip_address(panda["gpu_pool_vm_gateway"]) in address.network
    assert ipaddress.ip_address(panda["ansible_host"]) in address.network, "the bus lies on the same bridge"
    assert panda["gpu_pool_vm_memory_mib"] >= 2 * 12 * pool["gpucache_cache_mb"], "caches may take half of it"


def test_a_misspelt_and_a_mistyped_variable_are_found(tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text(
        "all: {hosts: {a: {baseline_packges: [x], baseline_min_free_mib: a, organism_of_nobody: 1, runtime_keep: 3,"
        " maestro_settings: {MAX_TEMPC: 1}}}}"
    )
    told = problems(tmp_path)
    assert len(told) == 4
    assert any("did you mean MAX_TEMP_C" in line for line in told)
    assert "a: role baseline has no variable baseline_packges" in told
    assert "a: no role or playbook reads organism_of_nobody" in told
    assert any("baseline_min_free_mib" in line and "int" in line for line in told)


def test_site_has_a_tag_for_each_level_and_each_capability() -> None:
    out = ansible(
        "ansible-playbook", "-i", REPO / "inventories" / "lab", "--list-tags", REPO / "playbooks" / "site.yml"
    )
    tags = {tag for found in re.findall(r"TASK TAGS: \[(.*?)\]", out) for tag in found.split(", ")}
    tags.discard("always")  # the check of a role's arguments, which Ansible adds
    of_levels = {f"level{number}" for number in LEVELS}
    tags.discard("reboot")  # of levels 1 to 4 together
    assert tags == of_levels | {tag for level in LEVELS.values() for tag in level.capabilities}
