# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules as Ansible runs them, each in a process of its own: check mode, diff, idempotence, absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def module(name: str, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
    """The module's result; a failure is a result, too."""
    given = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, "-m", f"ansible_collections.organism.proxmox.plugins.modules.{name}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_map_is_predicted_written_kept_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "etc/gpus.json"
    wish = {"path": str(path), "vendors": [], "simulated": 2}
    predicted = module("gpu_map", check=True, **wish)
    assert predicted["changed"]
    assert not path.exists()
    made = module("gpu_map", **wish)
    assert made["gpus"] == predicted["gpus"]
    assert [gpu["id"] for gpu in made["gpus"]] == ["gpu0", "gpu1"]
    assert "GPU gpu1" in made["diff"]["after"]
    assert path.stat().st_mode & 0o777 == 0o644
    again = module("gpu_map", **wish)
    assert (again["changed"], again["gpus"]) == (False, made["gpus"])
    fewer = module("gpu_map", **{**wish, "simulated": 1})
    assert [(gpu["id"], gpu["present"]) for gpu in fewer["gpus"]] == [("gpu0", True), ("gpu1", False)]
    assert module("gpu_map", check=True, path=str(path), state="absent")["changed"]
    assert path.exists()
    assert module("gpu_map", path=str(path), state="absent")["changed"]
    assert not path.exists()
    assert not module("gpu_map", path=str(path), state="absent")["changed"]


def test_an_empty_map_is_a_map(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    assert module("gpu_map", path=str(path), vendors=[])["changed"]
    assert json.loads(path.read_text()) == {"version": 1, "gpus": []}
    assert not module("gpu_map", path=str(path), vendors=[])["changed"]


def test_a_damaged_map_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    path.write_text("{")
    result = module("gpu_map", path=str(path), vendors=[], simulated=1)
    assert result["failed"]
    assert f"{path} is not JSON" in result["msg"]
    assert path.read_text() == "{"


def test_wrong_arguments_are_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "gpus.json")
    assert "prefix 'a.b'" in module("gpu_map", path=path, vendors=[], simulated=1, prefix="a.b")["msg"]
    assert "simulated must be 0 or more" in module("gpu_map", path=path, simulated=-1)["msg"]
    refused = module("gpu_worker", check=True, gpus=["gpu0"], settings={"HEARTBEAT": 5})
    assert "did you mean HEARTBEAT_SEC?" in refused["msg"]
    refused = module("gpu_worker", check=True, gpus=["gpu0"], types=["Rm -rf"])
    assert "does not match" in refused["msg"]


def test_workers_are_predicted_before_anything_of_them_is_there() -> None:
    result = module("gpu_worker", check=True, gpus=["gpu0"], settings={"NATS_URL": ["nats://bus1:4222"]})
    assert not result.get("failed"), result["msg"]
    assert result["gpus"] == ["gpu0"]
