# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ARC limits against a model of what OpenZFS does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_arc as arc
from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_arc_host as host
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError
from ansible_collections.organism.proxmox.plugins.modules import zfs_arc

from .conftest import snapshot

MIB, GIB = 1 << 20, 1 << 30
RAM = 32 * GIB


@dataclass
class Zfs:
    """arc_tuning_update(): each write looks at both parameters again, and ignores what it does not like in silence."""

    ram: int = RAM
    c_min: int = GIB
    c_max: int = 31 * GIB
    zfs_arc_min: int = 0
    zfs_arc_max: int = 0

    def write(self, name: str, value: int) -> None:
        setattr(self, name, value)
        low, top = self.zfs_arc_min, self.zfs_arc_max
        if low and low != self.c_min and arc.LOWEST_MIN <= low <= self.c_max:
            self.c_min = low
        if top and top != self.c_max and arc.LOWEST_MAX <= top < self.ram and top > self.c_min:
            self.c_max = top

    def live(self) -> arc.Live:
        texts = {"zfs_arc_min": str(self.zfs_arc_min), "zfs_arc_max": str(self.zfs_arc_max)}
        return arc.Live(self.c_min, self.c_max, 0, texts)


SIZES = st.integers(32, 40 * 1024).map(lambda mib: mib * MIB)


@given(
    before=st.tuples(SIZES, SIZES).filter(lambda p: p[0] < p[1] < RAM),
    low=st.one_of(st.none(), SIZES),
    top=SIZES,
    set_before=st.booleans(),
)
def test_what_is_not_refused_is_taken_in_the_planned_order(
    before: tuple[int, int], low: int | None, top: int, set_before: bool
) -> None:
    zfs = Zfs(c_min=before[0], c_max=before[1])
    if set_before:
        zfs.zfs_arc_min, zfs.zfs_arc_max = before
    limits = arc.Limits(low, top)
    if arc.refusal(limits, RAM, zfs.live()):
        return
    for name, value in arc.steps(limits, zfs.live()):
        zfs.write(name, value)
    assert arc.untaken(limits, zfs.live()) is None
    assert arc.steps(limits, zfs.live()) == []


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (arc.Limits(None, 63 * MIB), "64 MiB"),
        (arc.Limits(None, RAM), "memory"),
        (arc.Limits(16 * MIB, GIB), "32 MiB"),
        (arc.Limits(8 * GIB, 8 * GIB), "not below arc_max"),
        (arc.Limits(9 * GIB, 8 * GIB), "not below arc_max"),
        (arc.Limits(None, GIB), "give arc_min"),
    ],
)
def test_limits_that_zfs_would_ignore_are_refused(limits: arc.Limits, said: str) -> None:
    assert said in str(arc.refusal(limits, RAM, Zfs().live()))


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * GIB), ("8GiB", 8 * GIB), ("1.5g", GIB * 3 // 2), ("512M", 512 * MIB), ("99", 99)]
)
def test_sizes(text: str, size: int) -> None:
    assert arc.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8X", "-1", "G", "8 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        arc.parse_size(text)


INSTALLER = "options zfs zfs_arc_max=3435134976\n"
MIXED = "# mine\noptions zfs zfs_arc_max=1 zfs_prefetch_disable=1\noptions kvm x=1\n"


@pytest.mark.parametrize("text", [INSTALLER, MIXED, "options zfs zfs_arc_min=1"])
def test_a_file_taken_over_has_no_limit_and_comes_back(text: str) -> None:
    taken = arc.without_limits(text)
    assert not any(arc._is_limit(word) for line in taken.splitlines() for word in arc._options(line) or [])
    assert arc.with_limits_again(taken).rstrip("\n") == text.rstrip("\n")
    assert arc.with_limits_again("# new\n" + taken).rstrip("\n") == "# new\n" + text.rstrip("\n")
    assert "zfs_prefetch_disable" not in text or "\noptions zfs zfs_prefetch_disable=1\n" in taken


def test_shrinking_asks_until_the_limit_or_the_end_of_the_time() -> None:
    sizes = iter([10 * GIB, 9 * GIB, 6 * GIB, 4 * GIB])
    asked: list[int] = []
    done = arc.shrink(lambda: arc.Live(GIB, 4 * GIB, next(sizes), {}), lambda: asked.append(1), lambda: True)
    assert (done.converged, done.before, done.after, len(asked)) == (True, 10 * GIB, 4 * GIB, 3)
    stuck = arc.shrink(lambda: arc.Live(GIB, 4 * GIB, 9 * GIB, {}), lambda: None, lambda: False)
    assert (stuck.converged, stuck.after) == (False, 9 * GIB)


class Machine:
    """A tree with a zfs module that behaves."""

    def __init__(self, top: Path, run: Callable[..., Any]) -> None:
        self.top, self.run, self.zfs = top, run, Zfs()
        self.commands: list[str] = []
        self.fail = False

    def show(self) -> None:
        """The module's state as files."""
        size = min(self.zfs.c_max, 6 * GIB)
        values = {"c_min": self.zfs.c_min, "c_max": self.zfs.c_max, "size": size}
        text = "13 1 0x01 147 39984 1 2\nname type data\n" + "".join(f"{key} 4 {n}\n" for key, n in values.items())
        put(self.top, "proc/spl/kstat/zfs/arcstats", text)
        for name in arc.LIMITS:
            put(self.top, f"sys/module/zfs/parameters/{name}", f"{getattr(self.zfs, name)}\n")

    def etc(self) -> dict[str, str]:
        return snapshot(self.top / "etc")


def put(top: Path, name: str, text: str) -> None:
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    (top / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, module_runner: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    put(tmp_path, "proc/meminfo", f"MemTotal:       {RAM // 1024} kB\n")
    put(tmp_path, "proc/self/mounts", "rpool/ROOT/pve-1 / zfs rw,relatime 0 0\n")
    put(tmp_path, "proc/cmdline", "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n")
    put(tmp_path, "etc/modprobe.d/zfs.conf", INSTALLER)
    made = Machine(tmp_path, module_runner(zfs_arc))
    made.show()

    def write(_root: Root, name: str, text: str) -> None:
        made.zfs.write(name, int(text))
        made.show()

    def run(argv: list[str]) -> str:
        made.commands.append(" ".join(argv))
        if made.fail:
            raise CommandError("`update-initramfs` ended with 1: no space left on device")
        return ""

    monkeypatch.setattr(host, "write_parameter", write)
    monkeypatch.setattr(zfs_arc, "run", run)
    monkeypatch.setattr(zfs_arc, "PAUSE", 0)
    return made


ARGS: dict[str, Any] = {"arc_min": "2G", "arc_max": "8G", "take_over": ["/etc/modprobe.d/zfs.conf"]}


def test_present_check_idempotence_absent(machine: Machine) -> None:
    before = machine.etc()
    foreseen = machine.run(check=True, diff=True, **ARGS)
    assert foreseen.result["changed"] and foreseen.result["boot_image"]
    assert machine.etc() == before and machine.commands == [] and machine.zfs == Zfs()
    done = machine.run(diff=True, **ARGS)
    assert done.result["diff"] == foreseen.result["diff"]
    assert (machine.zfs.c_min, machine.zfs.c_max) == (2 * GIB, 8 * GIB)
    assert done.result["arc"]["c_max"] == 8 * GIB
    assert f"options zfs zfs_arc_min={2 * GIB} zfs_arc_max={8 * GIB}\n" in machine.etc()["modprobe.d/zfs-organism.conf"]
    assert machine.etc()["modprobe.d/zfs.conf"].startswith("#")
    assert machine.commands == ["update-initramfs -u -k all"]
    again = machine.run(**ARGS)
    assert (again.result["changed"], again.result["boot_image"]) == (False, False)
    lower = machine.run(**{**ARGS, "arc_min": "512M", "arc_max": "1G"})  # below the minimum of now
    assert lower.result["changed"] and (machine.zfs.c_min, machine.zfs.c_max) == (512 * MIB, GIB)
    back = machine.run(state="absent")
    assert back.result["changed"] and machine.etc() == before
    assert machine.zfs == Zfs()
    assert not machine.run(state="absent").result["changed"]
    assert not (machine.top / "var/lib/organism/earlier/zfs_arc.json").exists()


def test_a_second_owner_is_refused_by_name(machine: Machine) -> None:
    refused = machine.run(arc_max="8G")
    assert (
        refused.failed and "/etc/modprobe.d/zfs.conf" in refused.result["msg"] and "take_over" in refused.result["msg"]
    )
    put(machine.top, "proc/cmdline", "root=/dev/a zfs.zfs_arc_max=1\n")
    assert "zfs.zfs_arc_max=1" in machine.run(**ARGS).result["msg"]
    put(machine.top, "proc/cmdline", "root=/dev/a\n")
    put(machine.top, "usr/lib/modprobe.d/vendor.conf", INSTALLER)
    packaged = machine.run(**{**ARGS, "take_over": [*ARGS["take_over"], "/usr/lib/modprobe.d/vendor.conf"]})
    assert packaged.failed and "package" in packaged.result["msg"]
    assert machine.zfs == Zfs() and machine.commands == []


@pytest.mark.parametrize("low", ["8G", "9G", "1M"])
def test_a_minimum_at_or_above_the_maximum_is_refused_before_anything(machine: Machine, low: str) -> None:
    before = machine.etc()
    assert machine.run(**{**ARGS, "arc_min": low}).failed
    assert machine.etc() == before and machine.zfs == Zfs()


def test_without_the_module_only_the_file_is_written_and_that_is_said(machine: Machine) -> None:
    for name in ("sys/module/zfs/parameters/zfs_arc_min", "sys/module/zfs/parameters/zfs_arc_max"):
        (machine.top / name).unlink()
    (machine.top / "sys/module/zfs/parameters").rmdir()
    done = machine.run(**ARGS)
    assert done.result["changed"] and done.result["arc"] is None and "not loaded" in done.result["notes"][0]
    machine.zfs.write("zfs_arc_min", 2 * GIB)
    machine.zfs.write("zfs_arc_max", 8 * GIB)
    machine.show()  # loaded, with our file
    assert not machine.run(**ARGS).result["changed"]
    gone = machine.run(state="absent")
    assert "loaded again" in gone.result["notes"][0] and machine.zfs.c_max == 8 * GIB


def test_a_boot_image_that_cannot_be_made_puts_all_back(machine: Machine) -> None:
    before, machine.fail = machine.etc(), True
    failed = machine.run(**ARGS)
    assert failed.failed and "no space left" in failed.result["msg"]
    assert machine.etc() == before and machine.zfs == Zfs()
    machine.fail = False
    assert machine.run(**ARGS).result["changed"]


def test_a_module_that_does_not_take_the_value_is_an_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.etc()
    monkeypatch.setattr(host, "write_parameter", lambda _root, _name, _text: None)
    failed = machine.run(**ARGS)
    assert failed.failed and "c_max" in failed.result["msg"] and str(31 * GIB) in failed.result["msg"]
    assert machine.etc() == before


def test_later_edits_by_others_survive(machine: Machine) -> None:
    machine.run(**ARGS)
    installer = machine.top / "etc/modprobe.d/zfs.conf"
    installer.write_text(installer.read_text() + "options zfs zfs_txg_timeout=9\n")
    machine.zfs.write("zfs_arc_max", 5 * GIB)
    machine.show()
    back = machine.run(state="absent")
    assert installer.read_text() == INSTALLER + "options zfs zfs_txg_timeout=9\n"
    assert machine.zfs.c_max == 5 * GIB
    assert {entry["name"] for entry in back.result["kept_by_others"]} == {
        "/etc/modprobe.d/zfs.conf", "running zfs module"
    }  # fmt: skip


def test_the_boot_image_is_made_only_where_zfs_is_in_it(machine: Machine) -> None:
    put(machine.top, "proc/self/mounts", "/dev/sda1 / ext4 rw 0 0\n")
    put(machine.top, "proc/cmdline", "root=/dev/sda1\n")
    assert machine.run(check=True, **ARGS).result["boot_image"] is False
    put(machine.top, "proc/sys/kernel/osrelease", "6.14.8-2-pve\n")
    put(machine.top, "boot/initrd.img-6.14.8-2-pve", "")
    put(machine.top, "usr/bin/lsinitramfs", "")
    listing = "usr/lib/modules/6.14.8-2-pve/zfs/zfs.ko\n"
    assert host.image_needed(Root(machine.top), "auto", lambda _argv: listing)
    assert not host.image_needed(Root(machine.top), "auto", lambda _argv: "usr/bin/zfs.sh\n")
    assert host.image_needed(Root(machine.top), "always") and not host.image_needed(Root(machine.top), "never")


def test_shrinking_now(machine: Machine) -> None:
    put(machine.top, "proc/sys/vm/drop_caches", "0")
    done = machine.run(**{**ARGS, "arc_max": "4G", "shrink": True, "drop_caches": True})
    assert done.result["changed"] and done.result["shrink"]["converged"] and "ARC size" in done.result["msg"]
    assert not machine.run(**{**ARGS, "arc_max": "4G", "shrink": True}).result["changed"]
