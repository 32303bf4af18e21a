# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module and gpucache-ctl on real mounts: prediction, idempotence, refusals, and nothing left after the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from organism.core import _gpucache as gpucache

from .conftest import mounts_below

COLLECTIONS = next(path for path in sys.path if (Path(path) / "ansible_collections/organism/proxmox").exists())


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd is the manager here: units would be touched (the lab tier does that)")
    return {
        "GPU_IDS": ["gpu0", "gpu-b"],
        "CACHE_MB": 32,
        "BASE_ROOT": f"{tmp_path}/data",
        "PERSIST_ROOT": f"{tmp_path}/data",
        "RAM_ROOT": f"{tmp_path}/run",
        "MERGE_ROOT": f"{tmp_path}/srv",
        "NATS_ENABLE": False,
    }


class Machine:
    """Runs the module as Ansible does: as a program that gets its arguments as JSON."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.config = top / "gpucache.conf"

    def module(self, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
        given = {"path": str(self.config), "_ansible_check_mode": check, "_ansible_diff": True, **arguments}
        file = self.top / "arguments.json"
        file.write_text(json.dumps({"ANSIBLE_MODULE_ARGS": given}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.organism.proxmox.plugins.modules.gpucache", str(file)],
            capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": COLLECTIONS},
        )  # fmt: skip
        assert done.stdout, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def ctl(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "organism.cli.gpucache_ctl", "--config", str(self.config), "--json", *arguments],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else {"usage": done.stderr}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_from_nothing_to_caches_and_back(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    predicted = machine.module(check=True, settings=settings)
    assert predicted["changed"]
    assert "CACHE_MB=32" in predicted["diff"]["after"]
    assert not machine.config.exists()
    assert not mounts_below(tmp_path)

    made = machine.module(settings=settings)
    assert made["changed"]
    assert made["msg"] == predicted["msg"]
    assert {cache["gpu"]: cache["overlay"] for cache in made["caches"]} == {"gpu0": True, "gpu-b": True}
    assert len(mounts_below(tmp_path)) == 4
    assert (tmp_path / "srv/gpu0/models").is_dir()
    assert not machine.module(settings=settings)["changed"]
    assert not machine.module(check=True, settings=settings)["changed"]

    (tmp_path / "srv/gpu0/out/result").write_text("42", encoding="utf-8")
    assert machine.module(check=True, state="absent")["changed"]
    assert len(mounts_below(tmp_path)) == 4
    assert machine.module(state="absent", settings=settings)["changed"]
    assert not mounts_below(tmp_path)
    assert not machine.config.exists()
    assert not machine.module(state="absent", settings=settings)["changed"]

    machine.module(settings=settings)
    assert (tmp_path / "srv/gpu0/out/result").read_text(encoding="utf-8") == "42"
    purged = machine.module(state="absent", purge=True)
    assert purged["changed"]
    assert not (tmp_path / "data/gpu0").exists()


def test_a_gpu_that_is_no_longer_listed_is_saved_and_unmounted(
    machine: Machine, settings: dict[str, Any], tmp_path: Path
) -> None:
    machine.module(settings=settings)
    (tmp_path / "srv/gpu-b/kept").write_text("kept", encoding="utf-8")
    changed = machine.module(settings={**settings, "GPU_IDS": ["gpu0"]})
    assert "remove cache of gpu-b" in changed["msg"]
    assert [Path(target).name for target in mounts_below(tmp_path)] == ["gpu0", "gpu0"]
    machine.module(settings=settings)
    assert (tmp_path / "srv/gpu-b/kept").exists()


def test_a_new_size_is_applied_in_place(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    machine.module(settings=settings)
    larger = {**settings, "CACHE_MB": 64}
    assert machine.module(check=True, settings=larger)["changed"]
    assert "32 to 64 MiB" in " ".join(machine.module(settings=larger)["done"])
    assert not machine.module(settings=larger)["changed"]
    (tmp_path / "srv/gpu0/big").write_bytes(b"x" * (40 * 1024 * 1024))
    before = machine.config.read_text(encoding="utf-8")
    refused = machine.module(settings=settings)
    assert refused["failed"]
    assert "MiB are in use, the limit cannot become 32 MiB" in refused["msg"]
    assert machine.config.read_text(encoding="utf-8") == before


def test_bad_settings_change_nothing(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    refused = machine.module(settings={**settings, "CACHE_MB": 1, "CACHEMB": 500})
    assert refused["failed"]
    assert "CACHE_MB is 1, the least is 16" in refused["msg"]
    assert "did you mean CACHE_MB" in refused["msg"]
    assert not machine.config.exists()
    assert not mounts_below(tmp_path)


def test_more_than_the_machine_can_spare_is_refused(machine: Machine, settings: dict[str, Any]) -> None:
    refused = machine.module(settings={**settings, "CACHE_MB": 1_000_000})
    assert refused["failed"]
    assert "2 x 1000000 MiB" in refused["msg"]
    assert "lower CACHE_MB to" in refused["msg"]
    assert not machine.config.exists()


def test_a_kept_file_wins_and_its_bad_lines_are_named(
    machine: Machine, settings: dict[str, Any], tmp_path: Path
) -> None:
    machine.module(settings=settings)
    text = machine.config.read_text(encoding="utf-8").replace("CACHE_MB=32", "CACHE_MB=48")
    machine.config.write_text(text, encoding="utf-8")
    kept = machine.module(settings=settings, keep_existing=True)
    assert kept["settings"]["CACHE_MB"] == 48
    assert machine.config.read_text(encoding="utf-8") == text
    broken = text + "SYNC_SEC = 5\n"
    machine.config.write_text(broken, encoding="utf-8")
    refused = machine.module(settings=settings, keep_existing=True)
    assert refused["failed"]
    assert f"{machine.config}:{len(broken.splitlines())}: expected KEY=VALUE" in refused["msg"]
    assert len(mounts_below(tmp_path)) == 4
    code, answer = machine.ctl("status")
    assert code == 2
    assert "expected KEY=VALUE" in answer["error"]


def test_mounted_caches_are_not_moved(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    machine.module(settings=settings)
    refused = machine.module(settings={**settings, "MERGE_ROOT": f"{tmp_path}/elsewhere"})
    assert refused["failed"]
    assert "would move while mounted" in refused["msg"]


def test_prediction_before_the_map_of_gpus_exists(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    if gpucache.pci_gpus(gpucache.Root()):
        pytest.skip("this machine has GPUs of its own")
    unmapped = {**settings, "GPU_IDS": [], "GPU_MAP": f"{tmp_path}/gpus.json"}
    predicted = machine.module(check=True, settings=unmapped)
    assert predicted["changed"]
    assert "cannot be predicted" in json.dumps(predicted["warnings"])
    assert "set GPU_IDS or GPU_COUNT" in machine.module(settings=unmapped)["msg"]
    found = [{"id": "gpu7", "present": True}, {"id": "gpu8", "present": False}]
    (tmp_path / "gpus.json").write_text(json.dumps({"version": 1, "gpus": found}), encoding="utf-8")
    assert machine.module(settings=unmapped)["gpus"] == ["gpu7"]


def test_the_command_from_enable_to_disable(machine: Machine, settings: dict[str, Any], tmp_path: Path) -> None:
    machine.config.write_text(gpucache.SCHEMA.render(gpucache.SCHEMA.coerce(settings)), encoding="utf-8")
    assert machine.ctl("enable")[0] == 0
    (tmp_path / "srv/gpu0/x").write_text("x", encoding="utf-8")
    code, answer = machine.ctl("sync")
    assert code == 0
    assert [(gpu["gpu"], gpu["new"]) for gpu in answer["gpus"]] == [("gpu0", True), ("gpu-b", True)]
    assert machine.ctl("status", "gpu0")[1]["gpus"][0]["overlay"] is True
    assert machine.ctl("commit", "gpu0")[0] == 1
    assert machine.ctl("disable")[0] == 0
    assert not mounts_below(tmp_path)
    code, answer = machine.ctl("sync", "gpu0")
    assert code == 1
    assert "gpu0 is not mounted" in answer["gpus"][0]["error"]
    assert machine.ctl("commit", "gpu0")[0] == 0
    assert (tmp_path / "data/gpu0/base/x").exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["sync", "gpu9"], ["sync", "../x"], ["restore", "gpu0"], []])
def test_wrong_usage_ends_with_2(machine: Machine, settings: dict[str, Any], arguments: list[str]) -> None:
    machine.config.write_text(gpucache.SCHEMA.render(gpucache.SCHEMA.coerce(settings)), encoding="utf-8")
    assert machine.ctl(*arguments)[0] == 2
