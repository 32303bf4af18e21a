# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ZFS layouts against a small model of zfs(8) and zpool(8): inheritance, sources, mounts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_layout as layout
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError
from ansible_collections.organism.proxmox.plugins.modules import zfs_layout

DEFAULTS = {
    "compression": "on", "atime": "on", "recordsize": "131072", "xattr": "sa", "acltype": "off", "sync": "standard",
    "logbias": "latency", "primarycache": "all", "secondarycache": "all", "canmount": "on",
}  # fmt: skip
POOL = {"health": ("ONLINE", "-"), "ashift": ("12", "local"), "autotrim": ("off", "default"),
        "autoexpand": ("off", "default"), "listsnapshots": ("off", "default"), "capacity": ("3", "-")}  # fmt: skip
ALIASES = {"posixacl": "posix"}
SUFFIX = {"K": 1 << 10, "M": 1 << 20}


def fail(argv: list[str], said: str) -> CommandError:
    return CommandError(f"`{' '.join(argv)}` ended with 1: {said}")


@dataclass
class Zfs:
    """Datasets with their local properties; what is not local is inherited or a default."""

    pools: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    local: dict[str, dict[str, str]] = field(default_factory=dict)
    volumes: set[str] = field(default_factory=set)
    mounted: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    broken: str = ""

    def __call__(self, argv: list[str]) -> str:
        if argv[1] == "get":
            return self.pool_get(argv) if argv[0] == "zpool" else self.get(argv)
        self.log.append(" ".join(argv))
        if self.broken and self.broken in self.log[-1]:
            raise fail(argv, "cannot do that: pool is busy")
        if argv[0] == "zpool":
            name, _, value = argv[2].partition("=")
            self.pools[argv[3]][name] = (value, "local")
            return ""
        return str(getattr(self, argv[1])(argv[2:]) or "")

    def pool_get(self, argv: list[str]) -> str:
        lines = []
        for name in argv[5].split(","):
            if name not in POOL:
                raise fail(argv, f"bad property list: invalid property '{name}'\nusage: ...")
        for pool, values in self.pools.items():
            lines += ["\t".join((pool, name, *values[name])) for name in argv[5].split(",")]
        return "\n".join(lines) + "\n"

    def setting(self, name: str, prop: str) -> tuple[str, str]:
        if prop == "type":
            return ("volume" if name in self.volumes else "filesystem", "-")
        if prop == "mounted":
            return ("yes" if name in self.mounted else "no", "-")
        if prop == "used":
            return ("1", "-")
        if prop in self.local[name]:
            return (self.local[name][prop], "local")
        parts = name.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            parent = "/".join(parts[:depth])
            if prop in self.local.get(parent, {}) and prop != "canmount":
                value = self.local[parent][prop]
                if prop == "mountpoint" and value.startswith("/"):
                    value = "/".join([value, *parts[depth:]])
                return (value, f"inherited from {parent}")
        return (f"/{name}", "default") if prop == "mountpoint" else (DEFAULTS.get(prop, "-"), "default")

    def get(self, argv: list[str]) -> str:
        props, pools = argv[8].split(","), argv[9:]
        for prop in props:
            if prop not in DEFAULTS and prop not in ("type", "mounted", "mountpoint", "used"):
                raise fail(argv, f"bad property list: invalid property '{prop}'\nusage: ...")
        names = [name for name in self.local if name.split("/")[0] in pools]
        rows = [(name, prop, *self.setting(name, prop)) for name in names for prop in props]
        return "".join("\t".join(row) + "\n" for row in rows)

    @staticmethod
    def stored(value: str) -> str:
        value = ALIASES.get(value, value)
        return str(int(value[:-1]) * SUFFIX[value[-1]]) if value[:-1].isdigit() and value[-1] in SUFFIX else value

    def create(self, words: list[str]) -> None:
        name, options = words[-1], words[1:-1:2]
        assert name not in self.local
        if name.rpartition("/")[0] not in self.local:
            raise fail(words, "parent does not exist")
        self.local[name] = {k: self.stored(v) for k, v in (word.split("=", 1) for word in options)}
        if self.setting(name, "canmount")[0] == "on":
            self.mounted.add(name)

    def need_idle(self, words: list[str]) -> None:
        """A mount point does not change while a dataset with one of its own is mounted inside."""
        at = self.setting(words[-1], "mountpoint")[0]
        for other in self.mounted if words[-1] in self.mounted else ():
            point, source = self.setting(other, "mountpoint")
            if point.startswith(at + "/") and source == "local":
                raise fail(words, f"cannot unmount '{at}': pool or dataset is busy")

    def settle(self) -> None:
        """Datasets whose mount point went away are not mounted any more; those that got one are."""
        for name in self.local:
            point = self.setting(name, "mountpoint")[0]
            if point == "none":
                self.mounted.discard(name)

    def unmount(self, words: list[str]) -> None:
        self.mounted.remove(words[0])

    def set(self, words: list[str]) -> None:
        if any(word.startswith("mountpoint=") for word in words):
            self.need_idle(words)
        for word in words[:-1]:
            prop, _, value = word.partition("=")
            self.local[words[-1]][prop] = self.stored(value)

    def inherit(self, words: list[str]) -> None:
        if words[-2] == "mountpoint":
            self.need_idle(words)
        del self.local[words[-1]][words[-2]]
        self.settle()

    def mount(self, words: list[str]) -> None:
        if self.setting(words[0], "mountpoint")[0] == "none":
            raise fail(words, "no mountpoint set")
        self.mounted.add(words[0])


@pytest.fixture
def zfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zfs:
    model = Zfs(
        {"tank": dict(POOL), "arch": dict(POOL)},
        {"tank": {}, "tank/old": {"compression": "lz4"}, "tank/old/kid": {}, "arch": {"canmount": "off"}},
        mounted={"tank", "tank/old", "tank/old/kid"},
    )
    monkeypatch.setattr(zfs_layout, "run", model)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("30 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    return model


@pytest.fixture
def run(module_runner: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = module_runner(zfs_layout)
    return found


def tree(*entries: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "properties": properties} for name, properties in entries]


WANTED = tree(
    ("tank/organism/base", {"mountpoint": "/mnt/fast/base", "recordsize": "128K", "atime": False}),
    ("tank/organism", {"mountpoint": "/mnt/fast", "compression": "zstd", "acltype": "posixacl", "recordsize": "1M"}),
    ("tank/old", {"compression": "zstd", "atime": "off"}),
    ("tank/old/kid", {"atime": False, "sync": "always"}),
)


def test_present_check_idempotence_absent(zfs: Zfs, run: Callable[..., Any]) -> None:
    before = deepcopy(zfs)
    foreseen = run(datasets=WANTED, pools={"tank": {"autotrim": True}}, check=True, diff=True)
    assert foreseen.result["changed"] and zfs == before
    done = run(datasets=WANTED, pools={"tank": {"autotrim": True}}, diff=True)
    assert done.result["diff"] == foreseen.result["diff"] and done.result["commands"] == foreseen.result["commands"]
    assert zfs.log == done.result["commands"]
    assert zfs.log[0] == "zpool set autotrim=on tank"
    created = [line.split()[-1] for line in zfs.log if " create " in line]
    assert created == ["tank/organism", "tank/organism/base"]
    assert zfs.local["tank/organism"]["acltype"] == "posix" and zfs.setting("tank/old", "compression")[0] == "zstd"
    again = run(datasets=WANTED, pools={"tank": {"autotrim": True}})
    assert not again.result["changed"] and again.result["commands"] == []
    assert again.result["pools"]["tank"]["autotrim"] == "on"
    back = run(state="absent")
    assert back.result["changed"] and back.result["left_datasets"] == ["tank/organism", "tank/organism/base"]
    for name in before.local:
        assert zfs.local[name] == before.local[name]  # local again what was local, inherited again what was not
    assert zfs.pools["tank"]["autotrim"][0] == "off"
    assert not run(state="absent").result["changed"]
    assert not any("destroy" in line for line in zfs.log)


def test_a_value_that_is_inherited_already_is_not_set(zfs: Zfs, run: Callable[..., Any]) -> None:
    assert not run(datasets=tree(("tank/old/kid", {"compression": "lz4"}))).result["changed"]


def test_what_is_no_longer_declared_is_taken_back(zfs: Zfs, run: Callable[..., Any]) -> None:
    run(datasets=WANTED)
    smaller = run(datasets=[entry for entry in WANTED if entry["name"] != "tank/old"])
    assert smaller.result["changed"] and zfs.local["tank/old"] == {"compression": "lz4"}


def test_later_edits_by_others_survive_and_are_named(zfs: Zfs, run: Callable[..., Any]) -> None:
    run(datasets=WANTED)
    zfs.local["tank/old"]["compression"] = "gzip-9"
    back = run(state="absent")
    assert zfs.local["tank/old"] == {"compression": "gzip-9"}
    assert [entry["name"] for entry in back.result["kept_by_others"]] == ["tank/old compression"]


def test_missing_and_broken_pools_are_left_out_with_the_reason(zfs: Zfs, run: Callable[..., Any]) -> None:
    zfs.pools["arch"]["health"] = ("SUSPENDED", "-")
    wanted = [*WANTED, *tree(("gone/a", {}), ("arch/a", {}))]
    done = run(datasets=wanted, pools={"gone": {"autotrim": True}})
    reasons = {entry["name"]: entry["reason"] for entry in done.result["left_out"]}
    assert "no pool gone" in reasons["gone"] and "SUSPENDED" in reasons["arch"]
    assert done.result["changed"] and not any("gone" in line or "arch" in line for line in zfs.log)


def test_a_pool_that_comes_back_is_restored_then(zfs: Zfs, run: Callable[..., Any]) -> None:
    run(datasets=tree(("tank/old", {"atime": False})))
    away, zfs.pools = zfs.pools, {}
    gone = run(state="absent")
    assert gone.result["left_out"][0]["name"] == "tank"
    zfs.pools = away
    assert run(state="absent").result["changed"] and zfs.local["tank/old"] == {"compression": "lz4"}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("zpool is not installed on this host", "not installed"),
        ("The ZFS modules cannot be auto-loaded.\nTry running 'modprobe zfs' as root", "not loaded"),
    ],
)
def test_a_host_without_zfs(
    zfs: Zfs, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    def broken(_argv: list[str]) -> str:
        raise CommandError(said)

    monkeypatch.setattr(zfs_layout, "run", broken)
    done = run(datasets=WANTED)
    assert not done.failed and not done.result["changed"] and reason in done.result["left_out"][0]["reason"]


@pytest.mark.parametrize(
    ("datasets", "more", "said"),
    [
        (tree(("tank/a", {"frobnicate": "on"})), {}, "invalid property 'frobnicate'"),
        (WANTED, {"pools": {"tank": {"frobnicate": "on"}}}, "invalid property 'frobnicate'"),
        (WANTED, {"pools": {"tank": {"autotrim": "maybe"}}}, "autotrim=maybe"),
        (WANTED, {"pools": {"tank": {"capacity": "3"}}}, "cannot be set"),
        (tree(("tank/a", {"compression": "zip"})), {}, "compression=zip"),
        (tree(("tank/a", {"recordsize": "100K"})), {}, "power of two"),
        (tree(("tank/a", {"recordsize": "big"})), {}, "no size"),
        (tree(("tank/a", {"sync": "disabled"})), {}, "unsafe_sync_disabled_on"),
        (tree(("tank/a", {"used": "3"})), {}, "cannot be set"),
        (tree(("tank/old", {"used": "3"})), {}, "cannot be set"),
        (tree(("tank/a/b", {})), {}, "parent tank/a neither"),
        (tree(("tank/a", {}), ("tank/a", {})), {}, "twice"),
        (tree(("tank/a b", {})), {}, "not a dataset's name"),
        (tree(("-o", {})), {}, "not a dataset's name"),
        (tree(("tank/a", {"mountpoint": "mnt"})), {}, "mountpoint=mnt"),
        (tree(("tank/a", {"mountpoint": "/m"}), ("tank/b", {"mountpoint": "/m"})), {}, "one mount point"),
        (WANTED, {"unsafe_sync_disabled_on": ["tank/other"]}, "not declared"),
    ],
)
def test_bad_declarations_are_refused_before_anything_changes(
    zfs: Zfs, run: Callable[..., Any], tmp_path: Path, datasets: Any, more: dict[str, Any], said: str
) -> None:
    refused = run(datasets=datasets, **more)
    assert refused.failed and said in refused.result["msg"]
    assert zfs.log == [] and not (tmp_path / "var").exists()


def test_a_mount_point_with_files_or_another_mount_is_refused(
    zfs: Zfs, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mnt/fast").mkdir(parents=True)
    (tmp_path / "mnt/fast/precious").touch()
    refused = run(datasets=WANTED)
    assert refused.failed and "precious" in refused.result["msg"]
    (tmp_path / "mnt/fast/precious").unlink()
    with (tmp_path / "proc/self/mountinfo").open("a") as table:
        table.write("31 30 8:2 / /mnt/fast rw - ext4 /dev/sdb1 rw\n")
    assert "/dev/sdb1 is mounted" in run(datasets=WANTED).result["msg"]
    assert zfs.log == []


def test_a_volume_is_not_made_a_file_system(zfs: Zfs, run: Callable[..., Any]) -> None:
    zfs.volumes.add("tank/old")
    assert "is a volume" in run(datasets=WANTED).result["msg"]


def test_an_unmounted_dataset_is_mounted(zfs: Zfs, run: Callable[..., Any]) -> None:
    zfs.mounted.discard("tank/old")
    done = run(datasets=tree(("tank/old", {})))
    assert done.result["commands"] == ["zfs mount tank/old"] and "tank/old" in zfs.mounted


def test_a_mount_point_moves_although_datasets_are_mounted_inside(zfs: Zfs, run: Callable[..., Any]) -> None:
    zfs.local["tank"]["mountpoint"] = "none"
    zfs.mounted -= {"tank", "tank/old", "tank/old/kid"}
    zfs.local["tank/old/kid"]["mountpoint"] = "/else"
    zfs.mounted.add("tank/old/kid")
    before = deepcopy((zfs.local, zfs.mounted))
    outer, inner = ("tank/old", {"mountpoint": "/m"}), ("tank/old/kid", {"mountpoint": "/m/kid"})
    assert run(datasets=tree(outer, inner, ("tank/old/own", {"mountpoint": "/m/own"}))).result["changed"]
    assert {"tank/old", "tank/old/kid", "tank/old/own"} <= zfs.mounted
    moved = run(datasets=tree(("tank/old", {"mountpoint": "/n"}), inner, ("tank/old/own", {"mountpoint": "/m/own"})))
    assert moved.result["commands"] == [
        "zfs unmount tank/old/own", "zfs unmount tank/old/kid", "zfs set mountpoint=/n tank/old",
        "zfs mount tank/old/kid", "zfs mount tank/old/own",
    ]  # fmt: skip
    run(state="absent")
    assert zfs.local.pop("tank/old/own") == {"mountpoint": "/m/own"} and "tank/old/own" in zfs.mounted
    assert (zfs.local, zfs.mounted - {"tank/old/own"}) == before


def test_unsafe_is_possible_when_named_and_goes_back_when_not(zfs: Zfs, run: Callable[..., Any]) -> None:
    wanted = tree(("tank/old", {"sync": "standard"}))
    run(datasets=wanted, unsafe_sync_disabled_on=["tank/old"])
    assert zfs.local["tank/old"]["sync"] == "disabled"
    run(datasets=wanted)
    assert zfs.setting("tank/old", "sync")[0] == "standard"


def test_a_command_that_fails_says_what_was_done_before_and_the_next_run_finishes(
    zfs: Zfs, run: Callable[..., Any]
) -> None:
    before = deepcopy(zfs.local)
    zfs.broken = "set compression=zstd"
    failed = run(datasets=WANTED)
    assert failed.failed and "pool is busy" in failed.result["msg"] and "zfs create" in failed.result["msg"]
    zfs.broken = ""
    assert run(datasets=WANTED).result["changed"] and not run(datasets=WANTED).result["changed"]
    run(state="absent")
    assert {name: zfs.local[name] for name in before} == before


def test_a_property_that_does_not_stick_is_an_error(
    zfs: Zfs, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Zfs, "set", lambda _self, _words: None)
    failed = run(datasets=tree(("tank/old", {"atime": False})))
    assert failed.failed and "atime is on and not off" in failed.result["msg"]


def test_values_in_the_form_that_zfs_shows() -> None:
    shown = {"recordsize": "1M", "atime": False, "acltype": "posixacl", "quota": "none", "compression": "zstd-19"}
    assert {name: layout.canonical(name, value) for name, value in shown.items()} == {
        "recordsize": "1048576", "atime": "off", "acltype": "posix", "quota": "0", "compression": "zstd-19"
    }  # fmt: skip


def test_no_result_is_called_skipped_since_ansible_would_skip_the_task(zfs: Zfs, run: Callable[..., Any]) -> None:
    assert "skipped" not in run(datasets=tree(("gone/a", {}))).result


def test_sa_is_what_newer_zfs_calls_on() -> None:
    assert layout.same("xattr", "sa", "on")
    assert layout.same("xattr", "on", "sa")
    assert not layout.same("xattr", "sa", "dir")
    assert not layout.same("acltype", "posix", "off")
