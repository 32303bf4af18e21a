# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ZFS datasets and their properties: what is there, what is wanted, and what to do. Nothing is destroyed.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._difference import Difference
from ._earlier import Kept

SURVEY = ("health", "ashift", "autotrim", "autoexpand", "listsnapshots")
"""Pool properties that each result shows."""

NEEDED = ("type", "mounted", "mountpoint", "canmount")
_OUT_OF_SERVICE = ("UNAVAIL", "FAULTED", "REMOVED", "SUSPENDED", "OFFLINE")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]*(/[A-Za-z0-9_][A-Za-z0-9_.:-]*)*")
_PROPERTY = re.compile(r"[a-z0-9_]+|[a-z0-9_.-]*:[a-z0-9:_.-]+|feature@[a-z0-9_]+")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"(\d+)([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_SIZES = frozenset({"recordsize", "quota", "refquota", "reservation", "refreservation", "special_small_blocks"})
_ON_OFF = frozenset({"atime", "relatime", "devices", "exec", "setuid", "readonly", "overlay", "autotrim", "autoexpand"})
_CHOICES: dict[str, str] = {
    **dict.fromkeys(_ON_OFF, "on|off"),
    "compression": r"on|off|lzjb|zle|lz4|gzip(-[1-9])?|zstd(-(1?\d))?|zstd-fast(-\d+)?",
    "sync": "standard|always|disabled",
    "logbias": "latency|throughput",
    "primarycache": "all|none|metadata",
    "secondarycache": "all|none|metadata",
    "canmount": "on|off|noauto",
    "xattr": "on|off|sa|dir",
    "acltype": "off|noacl|posix|posixacl|nfsv4",
    "snapdir": "hidden|visible|disabled",
    "redundant_metadata": "all|most|some|none",
    "mountpoint": r"none|legacy|/[^\t\n]*",
}
_ALIASES = {"acltype": {"posixacl": "posix", "noacl": "off"}, "quota": {"none": "0"}, "refquota": {"none": "0"},
            "reservation": {"none": "0"}, "refreservation": {"none": "0"}}  # fmt: skip


class LayoutError(Exception):
    """A wanted layout that must not or cannot be had; the text names the datasets and says why."""


@dataclass(frozen=True)
class Setting:
    """A property as ``zfs get -Hp`` shows it: ``source`` is local, default, received, temporary, - or inherited."""

    value: str
    source: str

    @property
    def local(self) -> bool:
        return self.source == "local"

    def as_kept(self) -> dict[str, str]:
        return {"value": self.value, "source": self.source.split(" ", 1)[0]}


Table = dict[str, dict[str, Setting]]
"""Settings by name (of a pool or a dataset) and property."""


@dataclass(frozen=True)
class Wanted:
    """``datasets``: properties by name, in canonical form. ``pools``: pool properties by pool."""

    datasets: Mapping[str, Mapping[str, str]]
    pools: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Facts:
    """``unusable``: why a pool cannot be used, by pool. ``busy``: why a mount point cannot be used, by path."""

    pools: Table
    datasets: Table
    unusable: Mapping[str, str]
    busy: Mapping[str, str]
    kept: Mapping[str, Kept]


@dataclass
class Plan:
    """Commands in order, each a list of words; ``record``: keys of the earlier state."""

    difference: Difference = field(default_factory=Difference)
    commands: list[list[str]] = field(default_factory=list)
    record: dict[str, Kept] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    kept_by_others: list[dict[str, str]] = field(default_factory=list)


def parse_table(text: str) -> Table:
    """The output of ``zfs get -Hp -o name,property,value,source`` and of the same by zpool."""
    table: Table = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) == 4:
            table.setdefault(fields[0], {})[fields[1]] = Setting(fields[2], fields[3])
    return table


def canonical(name: str, value: Any) -> str:
    """A value as ``zfs get -p`` shows it. Raises LayoutError for one that ZFS would refuse."""
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if not _PROPERTY.fullmatch(name):
        raise LayoutError(f"{name!r} is not the name of a property")
    if value is None or text == "":
        raise LayoutError(f"{name} has no value; leave the property out to have it inherited")
    text = _ALIASES.get(name, {}).get(text, text)
    if name in _SIZES:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise LayoutError(f"{name}={text} is no size; write bytes, or a number with K, M, G or T")
        return str(int(match[1]) * _UNITS[match[2].upper()])
    if name in _CHOICES and not re.fullmatch(_CHOICES[name], text):
        raise LayoutError(f"{name}={text} is not one of {_CHOICES[name].replace('|', ', ')}")
    if "\t" in text or "\n" in text:
        raise LayoutError(f"{name} has a tab or a line's end in its value")
    return text


def same(name: str, wanted: str, value: str) -> bool:
    """Does a shown value mean the wanted one? OpenZFS 2.3 shows xattr=sa as on, which means it there (earlier: dir)."""
    if name == "xattr" and {wanted, value} <= {"on", "sa"}:
        return True
    return canonical(name, value) == wanted if name in _ALIASES else value == wanted


def pool_of(dataset: str) -> str:
    return dataset.split("/", 1)[0]


def _checked(name: str, value: Any, where: str, problems: list[str]) -> str:
    try:
        checked = canonical(name, value)
    except LayoutError as error:
        problems.append(f"{where}: {error}")
        return ""
    if name == "recordsize" and checked and (int(checked) < 512 or int(checked) & (int(checked) - 1)):
        problems.append(f"{where}: recordsize={value} is not a power of two of at least 512")
    return checked


def declare(
    datasets: Sequence[Mapping[str, Any]], pools: Mapping[str, Mapping[str, Any]], unsafe: Iterable[str]
) -> Wanted:
    """A checked declaration. Raises LayoutError with all that is wrong.

    ``unsafe``: datasets that get ``sync=disabled``, with which a power cut loses what programs were told is on disk.
    """
    problems: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for entry in datasets:
        name = entry["name"]
        if not _NAME.fullmatch(name):
            problems.append(f"{name!r} is not a dataset's name")
        if name in found:
            problems.append(f"{name} is declared twice")
        values = {k: _checked(k, v, name, problems) for k, v in (entry.get("properties") or {}).items()}
        if values.get("sync") == "disabled":
            problems.append(
                f"{name}: sync=disabled loses acknowledged writes at a power cut; name the dataset in "
                "unsafe_sync_disabled_on if that is wanted"
            )
        found[name] = values
    for name in unsafe:
        if name in found:
            found[name]["sync"] = "disabled"
        else:
            problems.append(f"unsafe_sync_disabled_on names {name}, which is not declared")
    points: dict[str, str] = {}
    for name, values in found.items():
        point = values.get("mountpoint", "")
        if point.startswith("/") and point in points:
            problems.append(f"{name} and {points[point]} have one mount point, {point}")
        points[point] = name
    wanted_pools = {
        pool: {k: _checked(k, v, f"pool {pool}", problems) for k, v in (values or {}).items()}
        for pool, values in pools.items()
    }
    problems += [f"{pool!r} is not a pool's name" for pool in pools if not _NAME.fullmatch(pool) or "/" in pool]
    if problems:
        raise LayoutError("; ".join(problems))
    return Wanted(found, wanted_pools)


def unusable(pools: Table, named: Iterable[str], reason: str = "") -> dict[str, str]:
    """Why pools cannot be used: they are missing (``reason``: why none can be seen) or out of service."""
    found = {}
    for pool in named:
        if pool not in pools:
            found[pool] = reason or f"there is no pool {pool} here (zpool list shows those that are)"
        elif pools[pool]["health"].value in _OUT_OF_SERVICE:
            found[pool] = f"pool {pool} is {pools[pool]['health'].value} (zpool status {pool} says why)"
    return found


def _key(name: str, prop: str) -> str:
    return f"zfs {name} {prop}"


def _pool_key(name: str, prop: str) -> str:
    return f"zpool {name} {prop}"


def _made(name: str) -> str:
    return f"zfs {name}"


def make_plan(wanted: Wanted, facts: Facts) -> Plan:
    """What to do so that the datasets are as wanted, and so that earlier wishes that are gone are taken back.

    Raises LayoutError with all that is in the way.
    """
    plan, problems = Plan(), list[str]()
    for pool in dict.fromkeys([*wanted.pools, *map(pool_of, wanted.datasets)]):
        if pool in facts.unusable:
            plan.skipped.append({"name": pool, "reason": facts.unusable[pool]})
    for pool, values in wanted.pools.items():
        if pool not in facts.unusable:
            _plan_pool(pool, values, facts, plan, problems)
    usable = [name for name in wanted.datasets if pool_of(name) not in facts.unusable]
    for name in sorted(usable, key=lambda name: name.count("/")):
        if name in facts.datasets:
            _plan_existing(name, wanted.datasets[name], facts, plan, problems)
        else:
            _plan_new(name, wanted.datasets[name], usable, facts, plan, problems)
    if problems:
        raise LayoutError("; ".join(problems))
    for key, kept in sorted(facts.kept.items(), key=lambda item: (item[0].count("/"), item[0])):
        if key in plan.record:
            continue
        pool = pool_of(key.split(" ")[1])
        if pool in facts.unusable:
            plan.record[key] = kept  # the pool may come back
            missed = {"name": pool, "reason": facts.unusable[pool]}
            if missed not in plan.skipped:
                plan.skipped.append(missed)
        else:
            _plan_back(key, kept, facts, plan)
    return plan


def _plan_pool(pool: str, values: Mapping[str, str], facts: Facts, plan: Plan, problems: list[str]) -> None:
    for prop, value in values.items():
        now = facts.pools[pool].get(prop)
        if now is None or now.source == "-":
            problems.append(f"pool {pool}: {prop} cannot be set")
            continue
        plan.record[_pool_key(pool, prop)] = Kept(now.as_kept(), value)
        if now.value != value:
            plan.difference.add(f"pool {pool} {prop}", now.value, value)
            plan.commands.append(["zpool", "set", f"{prop}={value}", pool])


def _in_the_way(name: str, values: Mapping[str, str], facts: Facts) -> str | None:
    point = values.get("mountpoint", "")
    return f"{name}: {facts.busy[point]}" if point in facts.busy else None


def _plan_existing(name: str, values: Mapping[str, str], facts: Facts, plan: Plan, problems: list[str]) -> None:
    present = facts.datasets[name]
    if present["type"].value != "filesystem":
        problems.append(f"{name} is a {present['type'].value}, and a file system is wanted")
        return
    ours = _made(name) in facts.kept
    if ours:
        plan.record[_made(name)] = facts.kept[_made(name)]
    words = []
    for prop, value in values.items():
        now = present.get(prop)
        if (now is None or now.source == "-") and ":" not in prop:
            problems.append(f"{name}: {prop} cannot be set")
            continue
        shown = now or Setting("-", "-")
        if not ours:
            plan.record[_key(name, prop)] = Kept(shown.as_kept(), value)
        if same(prop, value, shown.value):
            continue
        plan.difference.add(f"{name} {prop}", shown.value, value)
        words.append(f"{prop}={value}")
    if words:
        moves = values.get("mountpoint", present["mountpoint"].value) != present["mountpoint"].value
        plan.commands += _moving(name, ["zfs", "set", *words, name], facts) if moves else [["zfs", "set", *words, name]]
    point = values.get("mountpoint", present["mountpoint"].value)
    can = values.get("canmount", present["canmount"].value)
    mount = present["mounted"].value == "no" and can == "on" and point.startswith("/")
    if (mount or point != present["mountpoint"].value) and (reason := _in_the_way(name, values, facts)):
        problems.append(reason)
    if mount:
        plan.difference.add(f"{name} mounted", "no", "yes")
        plan.commands.append(["zfs", "mount", name])


def _moving(name: str, command: list[str], facts: Facts) -> list[list[str]]:
    """A command that changes a dataset's mount point, between those that get out of its way what is mounted inside.

    ZFS itself moves datasets that inherit the mount point; one with a mount point of its own keeps it busy.
    """
    at = facts.datasets[name]["mountpoint"].value
    if facts.datasets[name]["mounted"].value != "yes" or not at.startswith("/"):
        return [command]
    inside = [
        other
        for other, values in facts.datasets.items()
        if values["mounted"].value == "yes"
        and values["mountpoint"].value.startswith(at.rstrip("/") + "/")
        and not values["mountpoint"].source.startswith(("inherited", "default"))
    ]
    inside.sort(key=lambda other: facts.datasets[other]["mountpoint"].value.count("/"))
    return [
        *(["zfs", "unmount", other] for other in reversed(inside)),
        command,
        *(["zfs", "mount", other] for other in inside),
    ]


def _plan_new(
    name: str, values: Mapping[str, str], usable: Sequence[str], facts: Facts, plan: Plan, problems: list[str]
) -> None:
    parent = name.rpartition("/")[0]
    if parent not in facts.datasets and parent not in usable:
        problems.append(f"{name}: its parent {parent or '(none)'} neither exists nor is declared")
        return
    model = facts.datasets[pool_of(name)]
    fixed = [prop for prop in values if ":" not in prop and (prop not in model or model[prop].source == "-")]
    if fixed:
        problems.append(f"{name}: {', '.join(fixed)} cannot be set")
    if reason := _in_the_way(name, values, facts):
        problems.append(reason)
    plan.record[_made(name)] = Kept(None, "created")
    plan.difference.add(name, None, dict(values))
    options = [word for prop, value in values.items() for word in ("-o", f"{prop}={value}")]
    plan.commands.append(["zfs", "create", *options, name])


def _plan_back(key: str, kept: Kept, facts: Facts, plan: Plan) -> None:
    """Take one earlier change back, where it still is as it was set."""
    kind, name, *rest = key.split(" ", 2)
    if not rest:
        if name in facts.datasets:
            plan.left.append(name)
        return
    prop, table = rest[0], facts.pools if kind == "zpool" else facts.datasets
    now = table.get(name, {}).get(prop)
    before = kept.before
    if now is None or same_kept(now, before):
        return
    title = f"pool {name} {prop}" if kind == "zpool" else f"{name} {prop}"
    if not (now.local and same(prop, kept.set, now.value)):
        plan.kept_by_others.append({"name": title, "reason": f"{now.value} was set by somebody else since"})
        return
    if kind == "zpool":
        plan.commands.append(["zpool", "set", f"{prop}={before['value']}", name])
    else:
        command = ["zfs", "set", f"{prop}={before['value']}", name]
        if before["source"] != "local":
            command = ["zfs", "inherit", *(["-S"] if before["source"] == "received" else []), prop, name]
        plan.commands += _moving(name, command, facts) if prop == "mountpoint" else [command]
    plan.difference.add(title, now.as_kept(), before)


def same_kept(now: Setting, before: Mapping[str, str]) -> bool:
    """Is a property as it was, where it comes from included?"""
    return now.value == before["value"] and (now.local == (before["source"] == "local"))


def unmet(wanted: Wanted, facts: Facts) -> list[str]:
    """What is not as wanted after the change, in sentences: mount points and mounts included."""
    found = []
    for name, values in wanted.datasets.items():
        if pool_of(name) in facts.unusable:
            continue
        present = facts.datasets.get(name)
        if present is None:
            found.append(f"{name} is not there")
            continue
        for prop, value in values.items():
            shown = present.get(prop, Setting("-", "-")).value
            if not same(prop, value, shown):
                found.append(f"{name}: {prop} is {shown} and not {value}")
        point = present["mountpoint"].value
        if point.startswith("/") and present["canmount"].value == "on" and present["mounted"].value != "yes":
            found.append(f"{name} is not mounted at {point}")
    for pool, values in wanted.pools.items():
        if pool not in facts.unusable:
            found += [
                f"pool {pool}: {prop} is {facts.pools[pool][prop].value} and not {value}"
                for prop, value in values.items()
                if facts.pools[pool][prop].value != value
            ]
    return found
