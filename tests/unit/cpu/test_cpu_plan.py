# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The stored plan: its file, its table, the module that writes it and the command that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.organism.proxmox.plugins.modules import cpu_plan as module
from organism.core import _cpu_plan, _cpu_zones, _topology
from organism.core._cpu_plan import CpuPlan, CpuPlanError
from organism.core._root import Root
from organism.host import cpu_plan as command

Machines = Callable[[str], Root]
DEFAULTS = {name: option.get("default") for name, option in module.ARGUMENTS.items()}


def apply(root: Root, *, check: bool = False, **params: Any) -> tuple[Any, CpuPlan | None]:
    return module.run({**DEFAULTS, **params}, root, check=check)


def test_a_plan_survives_its_file(machine: Machines, tmp_path: Path) -> None:
    for shape in ("epyc_two_sockets", "alder_lake_hybrid", "single_core_vm"):
        made = _cpu_zones.plan(_topology.read(machine(shape)))
        (tmp_path / "plan.json").write_text(made.text())
        assert _cpu_plan.load(Root(tmp_path), "/plan.json") == made


def test_there_is_no_plan_before_level_1(tmp_path: Path) -> None:
    assert _cpu_plan.load(Root(tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no CPU plan"),
        ('{"format": 2}', "format 2, and this version reads 1; run level 1 again"),
        ('{"format": 1, "host": [0], "vcpu": [1]}', "is no CPU plan"),
        ('{"format": 1, "host": ["0"], "vcpu": [1], "io": [2]}', "is no CPU plan"),
        ('{"format": 1, "host": [true], "vcpu": [1], "io": [2]}', "is no CPU plan"),
        ('{"format": 1, "host": [-1], "vcpu": [1], "io": [2]}', "is no CPU plan"),
    ],
)
def test_a_damaged_plan_is_never_half_used(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CpuPlanError, match=said):
        _cpu_plan.load(Root(tmp_path), "/plan.json")


def test_zones_by_name_and_nodes_by_cpu(machine: Machines) -> None:
    made = _cpu_zones.plan(_topology.read(machine("epyc_two_sockets")))
    assert made.zone("io") == made.io
    assert (made.node_of(0), made.node_of(16), made.node_of(99)) == (0, 1, None)
    with pytest.raises(ValueError, match="zones are host, vcpu, io"):
        made.zone("gpu")


def test_tables(machine: Machines) -> None:
    plain = _cpu_zones.plan(_topology.read(machine("coffee_lake_12_gpus"))).table()
    assert plain.splitlines() == [
        "zone  CPUs      cores  nodes",
        "HOST  0,6       1      0",
        "VCPU  2-5,8-11  4      0",
        "IO    1,7       1      0",
    ]
    hybrid = _cpu_zones.plan(_topology.read(machine("alder_lake_hybrid"))).table().splitlines()
    assert hybrid[1].split() == ["HOST", "0-1,17-19", "4", "0", "P+E"]
    assert hybrid[2].split()[-1] == "P"
    assert hybrid[4].startswith("- HOST has 4 cores instead of 1")


def test_the_module_predicts_writes_keeps_and_takes_back(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    before = sorted(str(path) for path in root.top.rglob("*"))
    predicted, made = apply(root, check=True)
    assert predicted.difference.changed
    assert sorted(str(path) for path in root.top.rglob("*")) == before
    done, _ = apply(root)
    assert done.difference.as_diff() == predicted.difference.as_diff()
    stored = _cpu_plan.load(root)
    assert stored and made and stored.as_dict() == made.as_dict()
    assert root.path(_cpu_plan.PATH).stat().st_mode & 0o777 == 0o644
    assert not apply(root)[0].difference.changed
    changed, more = apply(root, io_cores=2)
    assert changed.difference.changed and more is not None and len(more.io) == 4
    assert apply(root, state="absent", check=True)[0].difference.changed
    assert root.exists(_cpu_plan.PATH)
    assert apply(root, state="absent")[0].difference.changed
    assert not root.exists("/etc/organism") and not apply(root, state="absent")[0].difference.changed


def test_an_earlier_plan_of_the_operator_comes_back(machine: Machines) -> None:
    root = machine("amd_apu")
    path = root.path(_cpu_plan.PATH)
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    apply(root)
    apply(root, state="absent")
    assert path.read_text() == "mine\n"


def test_a_plan_that_others_changed_stays_and_is_named(machine: Machines) -> None:
    root = machine("amd_apu")
    apply(root)
    root.path(_cpu_plan.PATH).write_text("theirs\n")
    kept = apply(root, state="absent")[0].kept_by_others
    assert [entry["key"] for entry in kept] == [_cpu_plan.PATH, "folder:/etc/organism"]
    assert root.read(_cpu_plan.PATH) == "theirs"


def test_refused_lists_change_nothing(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    for wrong, said in (
        ({"host_cpus": "0-1", "vcpu_cpus": "2-9", "io_cpus": "10-11"}, "CPUs 0,6 is split"),
        ({"io_cpus": "3-1"}, "io_cpus: the range '3-1' is reversed"),
        ({"io_cpus": "40"}, "there is no CPU 40"),
        ({"host_cores": 9}, "leave none of 6"),
    ):
        with pytest.raises(ValueError, match=said):
            apply(root, **wrong)
    assert not root.exists("/etc/organism")


def test_the_command_shows_the_stored_plan(machine: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    root = machine("coffee_lake_12_gpus")
    assert command.main(["--root", str(root.top)]) == 1
    assert "run level 1" in capsys.readouterr().err
    apply(root, io_cores=2)
    assert command.main(["--root", str(root.top)]) == 0
    assert "IO    1-2,7-8   2      0" in capsys.readouterr().out
    assert command.main(["--root", str(root.top), "--compute", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lists"] == {"host": "0,6", "vcpu": "2-5,8-11", "io": "1,7"}
    root.path(_cpu_plan.PATH).write_text("{")
    assert command.main(["--root", str(root.top), "--json"]) == 1
    assert "is no JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        command.main(["--nonsense"])
    assert usage.value.code == 2
