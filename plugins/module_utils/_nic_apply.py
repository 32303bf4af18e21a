# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings the physical ports to what all wishes together say, reads back, and takes one wish back.

A wish has a name, and a record of earlier state by that name: packet steering and the driver's settings can come and go
by themselves. All wishes are applied together, since a change of channels brings queues that the other wish steers.
Used by the module ``nic_steering`` and by the keeper ``organism-steer``; whoever writes holds the lock of
``_steer_config``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _netdev
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._nic import NicError, Nics, NotSupported
from ._nic_plan import NicPlan, NicWish, Port, Unsupported, Value, check_wish, full_key, order, plan, split_key

CAPABILITY = "nic_steering"
DEFAULT_NAME = "nic"


@dataclass
class Outcome:
    """``settings``: one a value that is ours. ``kept``: what somebody else has set since, by key."""

    difference: Difference
    ports: dict[str, Port] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)
    unsupported: list[Unsupported] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)


def record(nics: Nics, name: str) -> EarlierState:
    """What ports were like before the wish of this name."""
    return EarlierState(CAPABILITY if name == DEFAULT_NAME else f"{CAPABILITY}-{name}", nics.root)


def steer(nics: Nics, wishes: Mapping[str, NicWish], *, check: bool = False, lenient: Collection[str] = ()) -> Outcome:
    """Set what differs; what an earlier wish set and none wants now goes back.

    ``lenient``: names of wishes whose interfaces may be missing, which is told as unsupported then.

    Raises NetdevError or NicPlanError before anything has changed, NicError, OSError or CommandError.
    """
    for wish in wishes.values():
        check_wish(wish, nics.online())
    missing: list[Unsupported] = []
    resolved = {name: _resolve(nics, wish, name not in lenient, missing) for name, wish in wishes.items()}
    records = {name: record(nics, name) for name in wishes}
    tc = any(wish.qdisc for wish in wishes.values()) or _has_qdisc(records.values())
    before = _observe(nics, {port for names in resolved.values() for port in names}, records.values(), tc)
    planned = _plan(nics, before, resolved, wishes)
    values = _values(before)
    kept: dict[str, Any] = {}
    back: dict[str, tuple[str, Value]] = {}
    for name, earlier in records.items():
        mine, others = _left_behind(earlier, values, planned.wanted)
        back |= {key: (name, value) for key, value in mine.items()}
        kept |= others
    goals = {**planned.wanted, **{key: value for key, (_name, value) in back.items()}}
    changes = {key: value for key, value in goals.items() if values.get(key) != value}
    if not check and changes:
        planned = _apply(nics, wishes, resolved, records, before, planned, back, tc)
        for name, earlier in records.items():
            earlier.forget([key for key, (owner, _value) in back.items() if owner == name])
    refused = {full_key(entry.port, entry.what) for entry in planned.unsupported}
    difference = Difference()
    for key in sorted(changes, key=order):
        if key not in refused and (key in planned.wanted or key in back):
            difference.add(key, values.get(key), changes[key])
    after = before if check or not changes else _observe(nics, before, [], tc)
    outcome = Outcome(difference, after, unsupported=[*missing, *planned.unsupported], kept=kept)
    outcome.settings = _rows(planned, values, _values(after), refused, check=check)
    wrong = [row for row in outcome.settings if not row["ok"]]
    if wrong and not check:
        raise NicError(
            "; ".join(f"{r['port']}: {r['setting']} = {r['wanted']!r} set, {r['after']!r} read back" for r in wrong)
        )
    return outcome


def restore(nics: Nics, name: str, others: Mapping[str, NicWish], *, check: bool = False) -> Outcome:
    """Take the wish of this name back, where no other wish holds the same. Raises as ``steer`` does."""
    earlier = record(nics, name)
    resolved = {other: _resolve(nics, wish, False, []) for other, wish in others.items()}
    tc = _has_qdisc([earlier]) or any(wish.qdisc for wish in others.values())
    before = _observe(nics, {port for names in resolved.values() for port in names}, [earlier], tc)
    held = _plan(nics, before, resolved, others).wanted
    values = _values(before)
    back, kept = _left_behind(earlier, values, held)
    difference = Difference()
    for key in sorted(back, key=order):
        difference.add(key, values.get(key), back[key])
    if not check:
        channels = [key for key in back if split_key(key)[1].startswith("channels/")]
        refused = _set_all(nics, {key: back[key] for key in channels})
        now = _values(_observe(nics, before, [], tc) if channels else before)
        rest = {key: value for key, value in back.items() if key not in channels}
        # queues that the channels took with them need nothing
        refused += _set_all(nics, {key: value for key, value in rest.items() if key in now and now[key] != value})
        now = _values(_observe(nics, before, [], tc))
        wrong = [
            f"{key}: {back[key]!r} set, {now[key]!r} read back" for key in back if now.get(key, back[key]) != back[key]
        ]
        if refused or wrong:
            raise NicError("; ".join([*(f"{entry.port}: {entry.reason}" for entry in refused), *wrong]))
        earlier.forget()
    return Outcome(difference, before, kept=kept)


def _resolve(nics: Nics, wish: NicWish, strict: bool, missing: list[Unsupported]) -> list[str]:
    found: set[str] = set()
    for interface in wish.interfaces:
        try:
            found.update(_netdev.ports(nics.root, [interface]))
        except _netdev.NetdevError as error:
            if strict:
                raise
            missing.append(Unsupported(interface, "interface", str(error)))
    return sorted(found)


def _apply(
    nics: Nics,
    wishes: Mapping[str, NicWish],
    resolved: Mapping[str, list[str]],
    records: Mapping[str, EarlierState],
    before: Mapping[str, Port],
    planned: NicPlan,
    back: Mapping[str, tuple[str, Value]],
    tc: bool,
) -> NicPlan:
    """Channels, then a new look at the queues, then the rest; returns the plan with what was refused added."""
    first = _values(before)
    goals = {**planned.wanted, **{key: value for key, (_name, value) in back.items()}}
    channels = {key: value for key, value in goals.items() if split_key(key)[1].startswith("channels/")}
    channels = {key: value for key, value in channels.items() if first.get(key) != value}
    refused: list[Unsupported] = []
    if channels:
        _remember(records, planned, channels, first)
        refused += _set_all(nics, channels)
        now = _observe(nics, before, [], tc)
        planned = _plan(nics, now, resolved, wishes)
        _remember_lost(records, planned, first, _values(now))
    else:
        now = dict(before)
    values = _values(now)
    goals = {**planned.wanted, **{key: value for key, (_name, value) in back.items()}}
    rest = {key: value for key, value in goals.items() if values.get(key) != value and key not in channels}
    rest = {key: value for key, value in rest.items() if key not in back or key in values}
    _remember(records, planned, rest, {**values, **first})
    refused += _set_all(nics, rest)
    for entry in refused:
        key = full_key(entry.port, entry.what)
        planned.wanted.pop(key, None)
        owner = planned.owner.pop(key, None)
        if owner is not None:
            records[owner].forget([key])
    planned.unsupported += refused
    return planned


def _set_all(nics: Nics, values: Mapping[str, Value]) -> list[Unsupported]:
    """Set all that can be set, in order; returns what is not supported. Raises NicError naming all other failures."""
    refused, failed = [], []
    for key in sorted(values, key=lambda key: order(key, values[key])):
        port, what = split_key(key)
        try:
            nics.set(port, what, values[key])
        except NotSupported as error:
            refused.append(Unsupported(port, what, f"refused by driver or kernel: {error}"))
        except NicError as error:
            failed.append(str(error))
    if failed:
        raise NicError("; ".join(failed))
    return refused


def _remember(
    records: Mapping[str, EarlierState], planned: NicPlan, changes: Mapping[str, Value], values: Mapping[str, Value]
) -> None:
    for name, earlier in records.items():
        mine = {key: value for key, value in changes.items() if planned.owner.get(key) == name}
        earlier.remember({key: Kept(values.get(key), value) for key, value in mine.items()})


def _remember_lost(
    records: Mapping[str, EarlierState], planned: NicPlan, first: Mapping[str, Value], now: Mapping[str, Value]
) -> None:
    """What queues had that fewer channels took away: it returns with them. The channels' owner keeps it."""
    for key, owner in planned.owner.items():
        port, what = split_key(key)
        if what.startswith("channels/"):
            lost = {
                other: value
                for other, value in first.items()
                if other not in now and value not in ("", 0) and split_key(other)[0] == port
            }
            records[owner].remember({other: Kept(value, None) for other, value in lost.items()})


def _observe(nics: Nics, names: Iterable[str], records: Iterable[EarlierState], tc: bool) -> dict[str, Port]:
    """Ports by name, those of records included if they are still there."""
    recorded = {split_key(key)[0] for earlier in records for key in earlier.kept}
    wanted = {*names, *(name for name in recorded if _netdev.exists(nics.root, name))}
    return {name: nics.observe(name, tc=tc) for name in sorted(wanted)}


def _plan(
    nics: Nics, ports: Mapping[str, Port], resolved: Mapping[str, list[str]], wishes: Mapping[str, NicWish]
) -> NicPlan:
    by_wish = {name: {port: ports[port] for port in names} for name, names in resolved.items()}
    return plan(by_wish, wishes, nics.isolated())


def _values(ports: Mapping[str, Port]) -> dict[str, Value]:
    return {full_key(name, key): value for name, port in ports.items() for key, value in port.values.items()}


def _has_qdisc(records: Iterable[EarlierState]) -> bool:
    return any(key.endswith("/qdisc") for earlier in records for key in earlier.kept)


def _left_behind(
    earlier: EarlierState, values: Mapping[str, Value], wanted: Mapping[str, Value]
) -> tuple[dict[str, Value], dict[str, Any]]:
    """What goes back, and what somebody else holds. A queue or port that is gone has nothing to restore; one that our
    own change of channels took away (set to None) comes back with the channels."""
    back, others = earlier.to_restore(values)
    return (
        {key: value for key, value in back.items() if key not in wanted and value is not None},
        {key: value for key, value in others.items() if key not in wanted and key in values},
    )


def _rows(
    planned: NicPlan, before: Mapping[str, Value], after: Mapping[str, Value], refused: set[str], *, check: bool
) -> list[dict[str, Any]]:
    rows = []
    for key in sorted(planned.wanted, key=order):
        port, what = split_key(key)
        wanted, now = planned.wanted[key], after.get(key)
        if key not in refused:
            rows.append(
                {
                    "port": port,
                    "setting": what,
                    "before": before.get(key),
                    "wanted": wanted,
                    "after": wanted if check else now,
                    "ok": check or now == wanted,
                }
            )
    return rows
