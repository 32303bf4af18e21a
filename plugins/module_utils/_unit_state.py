# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Units as a host setting: enabled, disabled or masked; running or not; and the systemctl calls from one to another.

A unit's value is ``{"enabled": <UnitFileState>, "active": bool}``, so that the record of earlier state can hold it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ._root import Root
from ._systemd import Runner, UnitState, parse_show

Value = dict[str, Any]

_PROPERTIES = "Id,LoadState,ActiveState,SubState,UnitFileState,MainPID,NeedDaemonReload,Result"
# UnitFileState of units that ``systemctl enable`` and ``disable`` have nothing to do with (systemctl(1), is-enabled)
FIXED = ("static", "indirect", "generated", "transient", "alias", "linked", "linked-runtime")
MASKED = ("masked", "masked-runtime")


@dataclass(frozen=True)
class UnitWish:
    """``enabled``: enabled, disabled, masked, or None to leave it. ``active``: None leaves it.

    ``optional``: a host without the unit is fine. ``expected``: the unit is not there yet, but will be once the files
    of the same call are (or the package of an earlier task, in check mode). ``restart_on``: files whose change makes a
    running unit start again.
    """

    name: str
    enabled: str | None = None
    active: bool | None = None
    optional: bool = False
    expected: bool = False
    restart_on: tuple[str, ...] = ()


def show(names: Iterable[str], run: Runner) -> dict[str, UnitState]:
    """The states by the names that were asked for (an alias answers with another unit's name). Raises CommandError."""
    names = list(names)
    if not names:
        return {}
    found = parse_show(run(["systemctl", "show", f"--property={_PROPERTIES}", "--", *names]))
    return dict(zip(names, found, strict=True))


def value(state: UnitState) -> Value:
    return {"enabled": state.unit_file, "active": state.running}


def problem(wish: UnitWish, state: UnitState) -> str | None:
    """Why a unit cannot be had as wanted, or None."""
    if state.load == "not-found":
        return None if wish.expected else "does not exist on this host"
    if state.load in ("bad-setting", "error"):
        return f"cannot be loaded ({state.load}): see systemctl status {wish.name}"
    if state.name != wish.name:
        return f"is another name of {state.name}: name that one"
    if wish.enabled == "disabled" and state.unit_file in FIXED:
        return f"is {state.unit_file} and cannot be disabled; masked keeps it from starting"
    if wish.active and wish.enabled == "masked":
        return "cannot be masked and running"
    if wish.active and wish.enabled is None and state.unit_file in MASKED:
        return "is masked, so it cannot be started; say enabled: true to unmask it"
    return None


def unmaskable(wish: UnitWish, state: UnitState, root: Root) -> str | None:
    """Why systemd would refuse to mask a unit: a mask is a link at the very place where an own unit's file lies."""
    place = f"/etc/systemd/system/{wish.name}"
    if (
        wish.enabled != "masked"
        or state.unit_file in MASKED
        or not (root.path(place).is_symlink() or root.exists(place))
    ):
        return None
    return (
        f"cannot be masked, as {place} is its own file: disable it, or move that file to /usr/local/lib/systemd/system"
    )


def between(now: Value, before: Value, aim: Value) -> bool:
    """Is it on the way from one to the other, as a run that was cut short leaves it?"""
    return now != before and all(now[aspect] in (before[aspect], aim[aspect]) for aspect in now)


def booted_since(now: Value, left: Value) -> bool:
    """Was it left enabled and not running, and does it run now? A boot makes that of it: it is still ours."""
    return bool(left["enabled"] == "enabled" and not left["active"] and now == {**left, "active": True})


def wanted(wish: UnitWish, state: UnitState) -> Value:
    """The value that a unit shall have; what is not asked for stays as it is."""
    enabled = wish.enabled or state.unit_file
    if wish.enabled == "enabled" and state.unit_file in FIXED:
        enabled = state.unit_file
    return {"enabled": enabled, "active": state.running if wish.active is None else wish.active}


def reached(now: Value, aim: Value) -> bool:
    """Is it as it shall be? A unit that came with files of the same run may turn out to need no enabling."""
    enabled = now["enabled"] == aim["enabled"] or (
        now["enabled"] in FIXED and aim["enabled"] in ("", "enabled", *FIXED)
    )
    return enabled and now["active"] == aim["active"]


@dataclass
class Calls:
    """systemctl calls, each for several units: ``first`` before files and values are changed, ``last`` after them."""

    first: list[tuple[str, ...]] = field(default_factory=list)
    last: list[tuple[str, ...]] = field(default_factory=list)


def calls(now: Mapping[str, Value], aims: Mapping[str, Value]) -> Calls:
    """What is switched off goes first, so that it undoes nothing meanwhile; what is switched on comes last."""
    verbs: dict[str, list[str]] = {}

    def add(verb: str, name: str) -> None:
        verbs.setdefault(verb, []).append(name)

    for name, aim in sorted(aims.items()):
        before, enabled = now[name], aim["enabled"]
        masked = before["enabled"] in MASKED
        if before["active"] and not aim["active"]:
            add("stop", name)
        if enabled != before["enabled"]:
            if masked:
                add("unmask", name)
            # a unit that did not exist (its file is ours and goes next) must not leave links to it behind
            gone = enabled == "" and before["enabled"] in ("enabled", "enabled-runtime")
            if (enabled == "disabled" or gone) and not masked:
                add("disable first", name)
            elif enabled in ("masked", "masked-runtime"):
                add("mask" if enabled == "masked" else "mask --runtime", name)
            elif enabled in ("enabled", "disabled", "enabled-runtime"):
                add({"enabled": "enable", "disabled": "disable"}.get(enabled, "enable --runtime"), name)
        if aim["active"] and not before["active"]:
            add("start", name)
    off = ("stop", "disable first", "mask", "mask --runtime")
    on = ("unmask", "enable", "enable --runtime", "disable", "start")
    return Calls(
        first=[(*verb.replace(" first", "").split(), *verbs[verb]) for verb in off if verb in verbs],
        last=[(*verb.split(), *verbs[verb]) for verb in on if verb in verbs],
    )
