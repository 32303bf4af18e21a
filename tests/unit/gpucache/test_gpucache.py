# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which GPUs get a cache, what they may take, and what has to be done for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from organism.core import _gpucache as gpucache
from organism.core import _gpucache_units as units
from organism.core._keyvalue import Settings, SettingsError
from organism.core._overlay import Mount
from organism.core._ramlayer import Presence
from organism.core._root import Root
from organism.core._systemd import UnitState
from organism.gpucache import messages

OFF = Presence(None, None, False)


def settings(**values: Any) -> Settings:
    return gpucache.SCHEMA.coerce(values)


def up(size_mb: int) -> Presence:
    ram = Mount("/run/gpucache/gpu0", "tmpfs", "ram", frozenset({"rw", f"size={size_mb * 1024}k"}))
    return Presence(ram, Mount("/srv/gpucache/gpu0", "overlay", "layer", frozenset({"rw"})), True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine with 32 GiB, 4 CPUs, one disk for everything, two AMD cards with audio, and one NVIDIA card."""

    def write(path: str, text: str) -> None:
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")

    write("proc/meminfo", "MemTotal:       33554432 kB\nMemFree: 1 kB\n")
    write("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    write("sys/devices/system/cpu/online", "0-3\n")
    for address, vendor, kind in [
        ("0000:03:00.0", "0x1002", "0x030000"),
        ("0000:03:00.1", "0x1002", "0x040300"),
        ("0000:04:00.0", "0x1002", "0x038000"),
        ("0000:05:00.0", "0x10de", "0x030200"),
        ("0000:00:02.0", "0x8086", "0x030000"),
    ]:
        write(f"sys/bus/pci/devices/{address}/vendor", vendor)
        write(f"sys/bus/pci/devices/{address}/class", kind)
    return tmp_path


def write_map(tree: Path, *entries: dict[str, Any]) -> None:
    (tree / "etc/organism").mkdir(parents=True, exist_ok=True)
    (tree / "etc/organism/gpus.json").write_text(json.dumps({"version": 1, "gpus": entries}), encoding="utf-8")


def test_named_gpus_win_over_the_map(tree: Path) -> None:
    write_map(tree, {"id": "gpu0"})
    assert gpucache.gpus(settings(GPU_IDS=["a", "b"]), Root(tree)).ids == ("a", "b")


def test_the_map_gives_the_gpus_that_are_present(tree: Path) -> None:
    write_map(tree, {"id": "left", "present": True}, {"id": "gone", "present": False}, {"id": "right", "present": True})
    assert gpucache.gpus(settings(), Root(tree)).ids == ("left", "right")


def test_without_a_map_display_devices_are_counted(tree: Path) -> None:
    found = gpucache.gpus(settings(), Root(tree))
    assert found.ids == ("gpu0", "gpu1", "gpu2")
    assert gpucache.pci_gpus(Root(tree))[2] == ("0000:05:00.0", "nvml")


def test_a_count_names_them_in_order(tree: Path) -> None:
    assert gpucache.gpus(settings(GPU_COUNT=2), Root(tree)).ids == ("gpu0", "gpu1")


def test_no_gpu_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set GPU_IDS or GPU_COUNT"):
        gpucache.gpus(settings(), Root(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"gpus": [{"id": "../x"}]}', '{"gpus": [{}]}', '{"gpus": [{"id": 3}]}'])
def test_a_broken_map_is_named(tree: Path, text: str) -> None:
    write_map(tree)
    (tree / "etc/organism/gpus.json").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"gpus\.json is not a map of GPUs"):
        gpucache.gpus(settings(), Root(tree))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"GPU_IDS": ["a", "a"]}, "names a more than once"),
        ({"GPU_IDS": ["a/b"]}, "does not match"),
        ({"GPU_IDS": ["a"], "GPU_COUNT": 2}, "leave GPU_COUNT at auto"),
        ({"RAM_ROOT": "/srv/gpucache"}, "must not be"),
        ({"MERGE_ROOT": "/data/gpucache/merged"}, "lie below"),
        ({"RAM_ROOT": "/run/../data"}, "does not match"),
        ({"BASE_ROOT": "/data,x"}, "does not match"),
        ({"GPU_WORKER_CPUSET": "3-1"}, "GPU_WORKER_CPUSET"),
        ({"SYNC_SEC": 1}, "the least is 5"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        settings(**values)


def test_the_reference_rig_fits_and_a_small_guest_does_not(tree: Path) -> None:
    twelve = gpucache.Gpus(tuple(f"gpu{n}" for n in range(12)), "test")
    assert gpucache.budget(settings(), 12, Root(tree)).warning is None
    gpucache.check(settings(), twelve, Root(tree))
    told = gpucache.budget(settings(CACHE_MB=1000), 12, Root(tree)).warning
    assert told == "12 x 1000 MiB = 11.7 GiB of RAM for caches, the machine has 32.0 GiB"
    (tree / "proc/meminfo").write_text("MemTotal: 8388608 kB\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"12 x 500 MiB = 5\.9 GiB .* lower CACHE_MB to 341"):
        gpucache.check(settings(), twelve, Root(tree))
    gpucache.check(settings(CACHE_MB=341), twelve, Root(tree))


def test_cpus_of_another_machine_are_refused(tree: Path) -> None:
    with pytest.raises(SettingsError, match=r"CPU 10, 11.*0-3"):
        gpucache.check(settings(GPU_WORKER_CPUSET="10-11"), gpucache.Gpus(("gpu0",), "test"), Root(tree))


def test_the_caches_own_work_keeps_off_the_computing_cpus(tree: Path) -> None:
    found = units.dropins(settings(GPU_WORKER_CPUSET="1-3", SYNC_SEC=30), Root(tree))
    assert all("CPUAffinity=0\n" in (found[path] or "") for path in units.AFFINITY)
    interval = found[units.INTERVAL] or ""
    assert (
        interval.index("OnUnitActiveSec=\n") < interval.index("OnBootSec=90\n") < interval.index("OnUnitActiveSec=30")
    )
    assert all(units.dropins(settings(), Root(tree))[path] is None for path in units.AFFINITY)


def test_data_on_the_root_file_system_is_worth_a_warning(tree: Path) -> None:
    one = gpucache.Gpus(("gpu0",), "test")
    assert "/data/gpucache is on the root file system" in gpucache.warnings(settings(), one, Root(tree))[0]
    mountinfo = tree / "proc/self/mountinfo"
    mountinfo.write_text(mountinfo.read_text() + "23 22 0:5 / /data rw - tmpfs tmpfs rw\n", encoding="utf-8")
    assert "survives a reboot" in gpucache.warnings(settings(), one, Root(tree))[0]
    mountinfo.write_text(mountinfo.read_text().replace("tmpfs tmpfs", "ext4 /dev/sdb1"), encoding="utf-8")
    assert gpucache.warnings(settings(), one, Root(tree)) == []


def facts(**changes: Any) -> units.Facts:
    return units.Facts(**{"config": None, "files": {}, "units": {}, "layers": {"gpu0": OFF}, **changes})


def test_from_nothing_everything_is_planned() -> None:
    wanted = units.wishes(settings(), ["gpu0"])
    plan = units.plan(facts(), wanted=wanted, files={"/etc/x": "x\n"}, ids=["gpu0"], size_mb=500)
    assert plan.mount == ["gpu0"]
    assert plan.files == {"/etc/x": "x\n"}
    assert list(plan.units) == [*units.cache_units("gpu0"), units.AGENT]


def test_what_is_as_wanted_is_left_alone() -> None:
    names = [*units.cache_units("gpu0"), units.AGENT]
    running = {name: UnitState(name, "loaded", "active", "running", "enabled") for name in names}
    running[names[2]] = UnitState(names[2], "loaded", "inactive", "dead", "enabled")
    present = facts(units=running, layers={"gpu0": up(500)}, files={"/etc/x": "x"})
    wanted = units.wishes(settings(), ["gpu0"])
    plan = units.plan(present, wanted=wanted, files={"/etc/x": "x\n"}, ids=["gpu0"], size_mb=500)
    assert not plan.difference
    changed = units.plan(present, wanted=wanted, files={"/etc/x": "y\n"}, ids=["gpu0"], size_mb=600)
    assert (changed.resize, changed.restart, changed.units) == (["gpu0"], [units.AGENT], {})


def test_a_gpu_that_is_gone_is_stopped_timer_first() -> None:
    running = {name: UnitState(name, "loaded", "active", "running", "enabled") for name in units.cache_units("gpu0")}
    wanted = units.wishes(settings(NATS_ENABLE=False), [], ["gpu0"])
    plan = units.plan(facts(units=running, layers={"gpu0": up(500)}), wanted=wanted, files={}, ids=[], size_mb=500)
    assert plan.unmount == ["gpu0"]
    assert list(plan.units) == [f"gpucache-{unit}" for unit in ("sync@gpu0.timer", "prewarm@gpu0.service")] + [
        "gpucache@gpu0.service"
    ]
    assert set(plan.units.values()) == {units.Wish(False, False)}


def test_without_systemd_no_unit_is_planned() -> None:
    wanted = units.wishes(settings(), ["gpu0"])
    plan = units.plan(facts(units=None), wanted=wanted, files={}, ids=["gpu0"], size_mb=500)
    assert (plan.mount, plan.units) == (["gpu0"], {})


def test_enabled_instances_are_found_by_their_links(tmp_path: Path) -> None:
    for link in ("multi-user.target.wants/gpucache@gpu-1.service", "gpucache@x.service.wants/gpucache-sync@x.timer",
                 "multi-user.target.wants/gpucache-agent.service"):  # fmt: skip
        (tmp_path / "etc/systemd/system" / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "etc/systemd/system" / link).touch()
    assert units.instances(Root(tmp_path)) == ["gpu-1", "x"]


def test_requests_name_a_gpu_by_id_or_number() -> None:
    assert messages.read_request(b'{"gpu": "left"}') == "left"
    assert messages.read_request(b'{"gpu": 3}') == "gpu3"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"gpu": null}', b'{"gpu": "a b"}', b'{"gpu": -1.5}', b"\xff"]
)
def test_requests_that_say_nothing_are_refused(data: bytes) -> None:
    with pytest.raises(messages.BadRequest):
        messages.read_request(data)
