# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The example profile, and the acceptance checks on a host that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from organism.core import _guard_profile, _guard_pve
from organism.core._check import Check
from organism.core._guard_config import Config, from_dict
from organism.core._guard_records import Records
from organism.core._root import Root

EXAMPLE = Path(__file__).resolve().parents[3] / "docs/examples/ml-mode.yml"
VMS = {101: "vm-gpu-1", 102: "vm-gpu-2", 103: "vm-train", 104: "vm-infer"}


@pytest.fixture
def config() -> Config:
    raw: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    named = {key.removeprefix("vm_guard_"): value for key, value in raw.items() if key.startswith("vm_guard_")}
    return from_dict({key.removesuffix("_mib"): value for key, value in named.items()}, str(EXAMPLE))


@pytest.fixture
def top(tmp_path: Path, config: Config) -> Path:
    folder = tmp_path / "etc/pve/qemu-server"
    folder.mkdir(parents=True)
    for vmid, name in VMS.items():
        values = dict(config.profile[name])
        lines = [f"name: {name}", "hookscript: local:snippets/organism-hook"]
        lines += ["hostpci0: 0000:0" + str(vmid - 100) + ":00"] if name.startswith("vm-gpu") else []
        lines += [f"balloon: {0 if name.startswith('vm-gpu') else values['memory']}"]
        (folder / f"{vmid}.conf").write_text("\n".join([*lines, *(f"{key}: {each}" for key, each in values.items())]))
    for entry in _guard_profile.ENTRIES:
        (tmp_path / entry.lstrip("/")).parent.mkdir(parents=True)
        (tmp_path / entry.lstrip("/")).write_text("")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {262144 * 1024} kB\n")
    return tmp_path


def checks(top: Path, config: Config) -> list[Check]:
    root = Root(top)
    state = _guard_pve.read_state(root, config, Records(root))
    return list(_guard_profile.checks(root, state, config, _guard_pve.configs(root), lambda _unit: True))


def test_the_plan_is_the_host_it_was_made_for(config: Config) -> None:
    assert sum(values["memory"] for values in config.profile.values()) == 231424
    assert 231424 + config.reserve == config.host_total == 262144
    assert sum(values["cores"] for values in config.profile.values()) == 232


def test_a_host_that_has_it_passes_every_check(top: Path, config: Config) -> None:
    found = checks(top, config)
    assert [check for check in found if check.ok is not True] == []
    order = list(dict.fromkeys(check.check for check in found))
    assert order[:3] == ["plan.memory", "plan.sum", "plan.cpu"]


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ("memory: 34816", "memory: 32768", "plan.memory"),
        ("cores: 24", "cores: 12", "plan.cpu"),
        ("cpu: host", "cpu: x86-64-v2-AES", "plan.cpu"),
        ("agent: 1", "agent: 0", "plan.agent"),
        ("balloon: 34816", "balloon: 1024", "plan.fixed"),
        ("name: vm-train", "name: vm-other", "plan.vm"),
        ("hookscript: local:snippets/organism-hook", "hookscript: local:snippets/own.pl", "guard.hook"),
    ],
)
def test_what_differs_fails_with_the_next_step(top: Path, config: Config, before: str, after: str, check: str) -> None:
    path = top / "etc/pve/qemu-server/103.conf"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    failed = [each for each in checks(top, config) if each.ok is False]
    assert failed and failed[0].check == check and failed[0].next
