# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From nothing to a layer and back: prediction, idempotence, refusals, and what is there afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from organism.core import _ramlayer_host as host
from organism.core._root import Root

from .conftest import EARLIER, Machine, mounts_below


def test_from_nothing_to_a_layer_and_back(machine: Machine) -> None:
    predicted = machine.module(check=True)
    assert predicted["changed"], predicted
    assert "RAM_MB=32" in predicted["diff"]["after"]
    assert not machine.config.exists()
    assert not mounts_below(machine.top)
    assert not EARLIER.exists()

    made = machine.module()
    assert made["changed"], made
    assert made["msg"] == predicted["msg"]
    assert made["layer"]["overlay"] and made["layer"]["layer"] == "host"
    assert (machine.merged / "sub/old").read_text(encoding="utf-8") == "from base"
    assert not machine.module()["changed"]
    assert not machine.module(check=True)["changed"]

    (machine.merged / "new").write_text("42", encoding="utf-8")
    gone = machine.module(check=True, state="absent")
    assert gone["changed"] and machine.mounted()
    assert machine.module(state="absent")["changed"]
    assert not mounts_below(machine.top)
    assert not machine.config.exists()
    assert not EARLIER.exists()
    assert not (machine.top / "fast").exists() and not (machine.top / "ramlayer").exists()
    assert not list((machine.top / "textfiles").iterdir())
    assert not (machine.base / "new").exists()
    assert not machine.module(state="absent", settings=machine.settings)["changed"]

    machine.module()
    assert (machine.merged / "new").read_text(encoding="utf-8") == "42"


def test_taken_away_with_a_merge_leaves_everything_in_base(machine: Machine) -> None:
    machine.module()
    (machine.merged / "new").write_text("42", encoding="utf-8")
    (machine.merged / "sub/old").unlink()
    assert "not in base" in machine.module(check=True, state="absent", merge=True)["diff"]["before"]
    machine.module(state="absent", merge=True)
    assert (machine.base / "new").read_text(encoding="utf-8") == "42"
    assert not (machine.base / "sub/old").exists()
    assert not machine.module(state="absent", merge=True, settings=machine.settings)["changed"]


def test_purge_removes_what_was_saved_and_the_directories_made(machine: Machine) -> None:
    machine.module()
    (machine.merged / "new").write_text("42", encoding="utf-8")
    machine.module(state="absent", purge=True)
    assert not machine.persist.exists()
    assert (machine.base / "sub/old").exists()


def test_a_configuration_that_was_there_before_comes_back(machine: Machine) -> None:
    machine.module()
    machine.module(state="absent", purge=True)
    text = "RAM_MB=64\n"
    machine.config.write_text(text, encoding="utf-8")
    machine.module()
    assert machine.config.read_text(encoding="utf-8") != text
    machine.module(state="absent")
    assert machine.config.read_text(encoding="utf-8") == text


def test_a_configuration_that_somebody_changed_stays_and_is_named(machine: Machine) -> None:
    machine.module()
    machine.config.write_text(machine.config.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    gone = machine.module(state="absent")
    assert gone["kept_by_others"] == [str(machine.config)]
    assert machine.config.read_text(encoding="utf-8").endswith("# mine\n")
    assert not mounts_below(machine.top)


def test_a_new_size_is_applied_in_place(machine: Machine) -> None:
    machine.module()
    machine.settings["RAM_MB"] = 64
    assert machine.module(check=True)["changed"]
    assert "32 to 64 MiB" in " ".join(machine.module()["done"])
    (machine.merged / "big").write_bytes(b"x" * (40 * 1024 * 1024))
    machine.settings["RAM_MB"] = 32
    refused = machine.module()
    assert refused["failed"] and "MiB are in use, the limit cannot become 32 MiB" in refused["msg"]


def refused(machine: Machine, **settings: Any) -> str:
    answer = machine.module(settings={**machine.settings, **settings})
    assert answer.get("failed"), answer
    assert not machine.config.exists()
    assert not machine.mounted()
    return str(answer["msg"])


def test_what_must_not_be_is_refused_before_anything_changes(machine: Machine, tmp_path: Path) -> None:
    volatile = tmp_path / "volatile"
    volatile.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "volatile", str(volatile)], check=True)
    assert f"PERSIST_DIR {volatile}/persist is on a tmpfs" in refused(machine, PERSIST_DIR=f"{volatile}/persist")
    (volatile / "base").mkdir()
    assert f"LOWERDIR {volatile}/base is on a tmpfs" in refused(machine, LOWERDIR=f"{volatile}/base")
    assert "does not exist; create it" in refused(machine, LOWERDIR=f"{tmp_path}/disk/absent")
    assert "lower RAM_MB to" in refused(machine, RAM_MB=4_000_000)
    assert "holds another mount (tmpfs of volatile)" in refused(machine, MERGED=str(volatile))
    assert "must not lie below LOWERDIR" in refused(machine, PERSIST_DIR=f"{machine.base}/persist")
    assert "MERGED and RAMDIR are both" in refused(machine, MERGED=machine.settings["RAMDIR"])
    assert "did you mean RAM_MB" in refused(machine, RAMMB=5)
    assert "SYNC_SEC is 1, the least is 5" in refused(machine, SYNC_SEC=1)


def test_a_foreign_overlay_on_the_merged_path_is_refused(machine: Machine, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "fast/active"):
        (tmp_path / name).mkdir(parents=True)
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "foreign", str(machine.merged)], check=True)
    answer = machine.module()
    assert answer["failed"] and f"overlay of {tmp_path}/lower" in answer["msg"]


def test_a_base_that_an_earlier_task_will_make_is_predicted(machine: Machine) -> None:
    machine.settings["LOWERDIR"] = f"{machine.top}/disk/later"
    predicted = machine.module(check=True)
    assert predicted["changed"]
    assert "later is not there yet" in str(predicted["warnings"])


def test_the_gpu_caches_of_the_machine_count(machine: Machine, tmp_path: Path) -> None:

    recorded = tmp_path / "recorded"
    (recorded / "proc").mkdir(parents=True)
    (recorded / "etc/gpucache").mkdir(parents=True)
    (recorded / "proc/meminfo").write_text("MemTotal: 33554432 kB\n", encoding="utf-8")
    (recorded / "etc/gpucache/gpucache.conf").write_text("GPU_COUNT=12\nCACHE_MB=500\n", encoding="utf-8")
    budget = host.budget(host.SCHEMA.coerce({"RAM_MB": 12000}), Root(recorded))
    assert budget.total_mb == 18000
    assert budget.refusal is not None
    assert "lower RAM_MB to 10384" in budget.refusal
    assert host.budget(host.SCHEMA.coerce({}), Root(recorded)).refusal is None


def test_places_do_not_move_underneath_a_mounted_layer(machine: Machine) -> None:
    machine.module()
    (machine.top / "disk/other").mkdir()
    machine.settings["LOWERDIR"] = f"{machine.top}/disk/other"
    answer = machine.module()
    assert answer["failed"]
    assert "holds another mount" in answer["msg"] or "underneath the mounted layer" in answer["msg"]
