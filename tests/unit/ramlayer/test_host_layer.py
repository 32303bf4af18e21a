# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's layer on recorded trees: units and drop-ins, snapshots of ZFS, metrics."""

from __future__ import annotations

import dataclasses
import errno
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _ramlayer_host as host
from organism.core import _ramlayer_metrics as metrics
from organism.core import _ramlayer_units as units
from organism.core._earlier import EarlierState
from organism.core._keyvalue import Settings, SettingsError
from organism.core._overlay import LayerError
from organism.core._ramlayer import Presence
from organism.core._ramlayer_archive import snapshot
from organism.core._ramlayer_content import is_pinned
from organism.core._ramlayer_spill import Cold, choose
from organism.core._root import Root
from organism.core._systemd import UnitState

ZFS = """\
22 1 0:30 / / rw,relatime shared:1 - zfs rpool/ROOT/pve-1 rw,xattr
30 22 0:31 / /mnt/fast/ram-persist rw,noatime - zfs nvme-store/organism/ram-persist rw,xattr
31 22 0:32 / /mnt/fast/base rw,noatime - zfs nvme-store/organism/base rw,xattr
"""
ARCHIVE = "32 22 0:33 / /mnt/archive rw,noatime - zfs zarchive/organism rw,xattr\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("proc/self", "mnt/fast/base", "mnt/fast/ram-persist", "etc/organism"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(ZFS, encoding="utf-8")
    (tmp_path / "proc/meminfo").write_text("MemTotal:       32768000 kB\n", encoding="utf-8")
    return tmp_path


def settings(**given: object) -> Settings:
    return host.SCHEMA.coerce(given)


def with_archive(tree: Path) -> None:
    (tree / "mnt/archive").mkdir(parents=True)
    (tree / "proc/self/mountinfo").write_text(ZFS + ARCHIVE, encoding="utf-8")


def test_the_reference_rig_carries_the_defaults(tree: Path) -> None:
    assert host.problems(settings(), Root(tree)) == []


def test_the_archive_timer_runs_only_where_the_second_pool_is(tree: Path) -> None:
    root = Root(tree)
    assert not units.wishes(settings(), root, on=True)[units.ARCHIVE].enabled
    assert host.no_archive(settings(), root) == "/mnt/archive does not exist (ARCHIVE_DIR /mnt/archive/ram-persist)"
    with_archive(tree)
    assert units.wishes(settings(), root, on=True)[units.ARCHIVE].enabled
    assert host.no_archive(settings(), root) is None
    assert "RequiresMountsFor=/mnt/archive/ram-persist" in str(units.dropins(settings(), root))
    assert host.no_archive(settings(ARCHIVE_DIR=""), root) == "ARCHIVE_DIR is empty"


def test_the_units_follow_the_configuration(tree: Path) -> None:
    found = units.dropins(settings(SYNC_SEC=17, MERGED="/fast/now"), Root(tree))
    text = "".join(value or "" for value in found.values())
    assert "RequiresMountsFor=/mnt/fast/base /mnt/fast/ram-persist /ramlayer /fast/now" in text
    # an empty assignment clears OnBootSec= as well, so both follow it
    assert "OnUnitActiveSec=\nOnBootSec=60\nOnUnitActiveSec=17\n" in text


def test_a_timer_is_stopped_before_the_layer(tree: Path) -> None:
    order = list(units.wishes(settings(), Root(tree), on=False))
    assert order.index(units.SYNC) < order.index(host.SERVICE)


def test_a_plan_names_only_what_differs(tree: Path) -> None:
    wanted = units.wishes(settings(), Root(tree), on=True)
    states = {
        name: UnitState(
            name, active="active" if wish.running else "inactive", unit_file="enabled" if wish.enabled else ""
        )
        for name, wish in wanted.items()
    }
    there = units.Facts({"/etc/x": "same"}, states, Presence(None, None, False))
    made = units.plan(there, wanted=wanted, files={"/etc/x": "same\n"}, size_mb=8192, merged="/fast/active")
    assert [change.name for change in made.difference.changes] == ["RAM layer at /fast/active"]
    assert made.mount and not made.units and not made.files
    stopped = dict(states) | {units.SYNC: dataclasses.replace(states[units.SYNC], active="inactive")}
    made = units.plan(
        units.Facts({}, stopped, there.layer), wanted=wanted, files={}, size_mb=None, merged="/fast/active"
    )
    assert list(made.units) == [units.SYNC]


def test_folders_that_were_made_go_when_they_are_empty(tree: Path) -> None:
    root = Root(tree)
    assert units.new_folders(settings(), root) == ["/ramlayer", "/fast", "/fast/active"]
    earlier = EarlierState(units.CAPABILITY, root)
    nothing = units.Facts({}, None, Presence(None, None, False))
    units.remember(earlier, units.Plan(), nothing, settings(), root, "/etc/organism/ramlayer.conf")
    for folder in ("ramlayer", "fast/active"):
        (tree / folder).mkdir(parents=True)
    (tree / "ramlayer/somebodys").touch()
    units.remove_folders(earlier, "/etc/organism/ramlayer.conf", root)
    assert not (tree / "fast").exists()
    assert (tree / "ramlayer").exists()
    assert (tree / "mnt/fast/ram-persist").exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"PERSIST_DIR": "/mnt/fast/base/persist"}, "PERSIST_DIR /mnt/fast/base/persist must not lie below LOWERDIR"),
        ({"MERGED": "/mnt/fast"}, "must not lie below MERGED"),
        ({"STATE_DIR": "/ramlayer/state"}, "STATE_DIR /ramlayer/state must not lie below RAMDIR"),
        ({"ARCHIVE_DIR": "/mnt/fast/base/a"}, "must not lie in LOWERDIR"),
        ({"MERGED": "/fast/a,b"}, "does not match"),
        ({"RAM_MB": 8}, "the least is 16"),
    ],
)
def test_settings_that_would_lose_data_are_refused(given: dict[str, object], why: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(why)):
        settings(**given)


class Zfs:
    """``zfs`` as far as it is asked."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def __call__(self, argv: list[str]) -> str:
        verb, name = argv[1], argv[-1]
        if verb == "snapshot":
            assert name not in self.names
            self.names.append(name)
        elif verb == "destroy":
            assert "@ramlayer-" in name and "-r" not in argv
            self.names.remove(name)
        return "".join(f"{each}\n" for each in self.names) if verb == "list" else ""


def test_snapshots_keep_the_newest_and_never_touch_others(tree: Path) -> None:
    data = "nvme-store/organism/ram-persist"
    zfs = Zfs(f"{data}@daily-1", f"{data}@ramlayer-8", f"{data}@ramlayer-9", f"{data}@ramlayer-x")
    layer, root = host.layer(settings()), Root(tree)
    assert snapshot(layer, root, 10, keep=2, command=zfs) == [f"{data}@ramlayer-9", f"{data}@ramlayer-10"]
    assert zfs.names == [f"{data}@daily-1", f"{data}@ramlayer-9", f"{data}@ramlayer-x", f"{data}@ramlayer-10"]
    assert snapshot(layer, root, 10, keep=2, command=zfs)[-1] == f"{data}@ramlayer-10"
    (tree / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", encoding="utf-8")
    assert snapshot(layer, root, 11, keep=2, command=zfs) == []


def status(**more: object) -> dict[str, object]:
    return {"overlay": True, "size_mb": 8, "generation": None, "generation_age_s": None, "last_sync": None, "ts": 1e9,
            **more}  # fmt: skip


def test_metrics_leave_out_what_is_not_known() -> None:
    text = metrics.render("gpu0", metrics.values(status(), dict.fromkeys(metrics.COUNTERS, 0)))
    assert 'organism_ramlayer_mounted{layer="gpu0"} 1\n' in text
    assert "last_sync" not in text and "generation_created" not in text
    for line in text.splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) organism_ramlayer_\w+ .+|organism_ramlayer_\w+\{layer="gpu0"\} [0-9.e+]+', line
        )


def test_metrics_tell_when_a_generation_was_made() -> None:
    found = metrics.values(
        status(generation=7, generation_age_s=60.5, used_mb=1.5, last_sync={"ok": True, "at": 5.0, "seconds": 0.25}),
        dict.fromkeys(metrics.COUNTERS, 3),
        dirty=11,
    )
    assert found["generation_created_timestamp_seconds"] == 1e9 - 60.5
    assert (found["used_bytes"], found["dirty_bytes"], found["enospc_total"]) == (1.5 * 2**20, 11, 3)
    assert (found["last_sync_success"], found["sync_duration_seconds"]) == (1, 0.25)


def test_a_missing_collector_is_no_error(tree: Path) -> None:
    assert not metrics.publish(Root(tree), "/var/lib/prometheus/node-exporter", "host", {"mounted": 1})
    assert not metrics.publish(Root(tree), "", "host", {"mounted": 1})


def test_a_full_disk_is_told_from_other_errors() -> None:
    full = LayerError("not saved")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert metrics.no_room(full)
    assert metrics.no_room(LayerError("rsync ended with 11: write failed: No space left on device (28)"))
    assert not metrics.no_room(LayerError("not mounted"))
    assert not metrics.no_room(None)


@given(st.lists(st.builds(Cold, st.text("ab", min_size=1), st.integers(0, 50), st.integers(0, 9))), st.integers(0, 200))
def test_a_spill_takes_the_coldest_and_no_more_than_it_needs(found: list[Cold], need: int) -> None:
    found.sort(key=lambda cold: cold.used_ns)
    chosen = choose(found, need)
    filled = [cold for cold in found if cold.size]
    assert chosen == filled[: len(chosen)]
    assert sum(cold.size for cold in chosen[:-1]) < need or not chosen
    assert sum(cold.size for cold in chosen) >= need or chosen == filled


def test_pins_are_shell_patterns_over_the_whole_path() -> None:
    assert is_pinned("models/a/b.bin", ["models/*"])
    assert is_pinned("x.idx", ["y", "*.idx"])
    assert not is_pinned("out/models/x", ["models/*"])
    assert not is_pinned("x", [])
