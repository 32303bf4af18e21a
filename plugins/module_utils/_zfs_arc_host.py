# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ARC limits on a host: the modprobe file with one owner, the running module, the boot image, and all of it back.

The record of earlier state is ``zfs_arc``: files by path (texts), ``live`` (``c_min``, ``c_max`` and the parameters'
texts), and ``boot image`` while it has not been made anew after a change.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _zfs_arc as arc
from ._atomic import write_atomic
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._root import Root
from ._systemd import CommandError, Runner, run_command

CAPABILITY = "zfs_arc"
LIVE = "live"
IMAGE = "boot image"
IMAGE_COMMAND = ("update-initramfs", "-u", "-k", "all")


@dataclass(frozen=True)
class Facts:
    """``files``: texts of our file and of those that set a limit or that were taken over (None: not there)."""

    files: Mapping[str, str | None]
    rivals: tuple[str, ...]
    cmdline: tuple[str, ...]
    ram: int
    live: arc.Live | None
    kept: Mapping[str, Kept]


@dataclass
class Plan:
    """``files``: texts after the change. ``limits``: for the running module (None: it stays as it is)."""

    difference: Difference = field(default_factory=Difference)
    files: dict[str, str | None] = field(default_factory=dict)
    limits: arc.Limits | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    record: dict[str, Kept] = field(default_factory=dict)
    image: bool = False
    kept_by_others: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(root: Root) -> Facts:
    """Raises ArcError, EarlierStateError."""
    kept = EarlierState(CAPABILITY, root).kept
    rivals = arc.rivals(root)
    files: dict[str, str | None] = dict(rivals)
    for path in [arc.MODPROBE, *(key for key in kept if key.startswith("/"))]:
        place = root.path(path)
        files[path] = place.read_text(encoding="utf-8") if place.exists() else None
    return Facts(files, tuple(rivals), tuple(arc.cmdline_rivals(root)), arc.memory(root), arc.live(root), kept)


def plan_present(limits: arc.Limits, facts: Facts, take_over: list[str]) -> Plan:
    """Raises ArcError for limits that ZFS would ignore, and for a second owner."""
    reason = arc.refusal(limits, facts.ram, facts.live)
    if reason:
        raise arc.ArcError(reason)
    if facts.cmdline:
        raise arc.ArcError(
            f"the kernel's command line has {' '.join(facts.cmdline)}, which wins over all files; remove it there first"
        )
    strange = [path for path in facts.rivals if path not in take_over]
    if strange:
        raise arc.ArcError(
            f"{', '.join(strange)} sets an ARC limit as well, and only one file can; remove it there, or name the file "
            "in take_over to have it commented out and restored with state=absent"
        )
    packaged = [path for path in facts.rivals if not path.startswith("/etc/")]
    if packaged:
        raise arc.ArcError(f"{', '.join(packaged)} belongs to a package; put a changed copy into /etc/modprobe.d first")
    plan = Plan()
    plan.files[arc.MODPROBE] = arc.render(limits)
    for path in facts.rivals:
        plan.files[path] = arc.without_limits(facts.files[path] or "")
    for path, kept in facts.kept.items():  # taken over by an earlier run
        if path.startswith("/") and path not in plan.files:
            plan.record[path] = kept
    for path, after in plan.files.items():
        plan.record[path] = Kept(facts.files[path], after)
        plan.difference.add(path, facts.files[path], after)
    _plan_live(limits, facts, plan)
    _plan_image(facts, plan)
    return plan


def _plan_live(limits: arc.Limits, facts: Facts, plan: Plan) -> None:
    now = facts.live
    if now is None:
        plan.notes.append("the zfs module is not loaded; the limits count when it is")
        if LIVE in facts.kept:
            plan.record[LIVE] = facts.kept[LIVE]
        return
    for name, value in arc.steps(limits, now):
        plan.difference.add(f"{name} (running)", now.c_max if name == "zfs_arc_max" else now.c_min, value)
    plan.limits = limits
    known = LIVE in facts.kept or arc.MODPROBE not in facts.kept  # else the module was loaded with our limits
    if known:
        before = {"c_min": now.c_min, "c_max": now.c_max, **now.parameters}
        low = limits.minimum if limits.minimum is not None else now.c_min
        plan.record[LIVE] = Kept(before, {"c_min": low, "c_max": limits.maximum})


def _plan_image(facts: Facts, plan: Plan) -> None:
    files = any(change.name.startswith("/") for change in plan.difference.changes)
    plan.image = files or IMAGE in facts.kept


def plan_absent(facts: Facts) -> Plan:
    """What was there before, where it still is as this capability has left it."""
    plan = Plan()
    for path, kept in facts.kept.items():
        if not path.startswith("/"):
            continue
        now = facts.files.get(path)
        if now == kept.set:
            plan.files[path] = kept.before
        elif now is not None and now != kept.before:
            if path != arc.MODPROBE:
                plan.files[path] = arc.with_limits_again(now)
            plan.kept_by_others.append({"name": path, "reason": "changed by somebody else since it was written"})
        plan.difference.add(path, now, plan.files.get(path, now))
    live = facts.kept.get(LIVE)
    now_live = facts.live
    if now_live is not None and live is not None:
        found = {"c_min": now_live.c_min, "c_max": now_live.c_max}
        before = {name: live.before[name] for name in found}
        if found == live.set:
            plan.limits = arc.Limits(before["c_min"], before["c_max"])
            plan.parameters = {name: live.before[name] for name in arc.LIMITS}
            for name, value in found.items():
                plan.difference.add(f"{name} (running)", value, before[name])
        elif found != before:
            reason = f"c_max is {found['c_max']} and c_min {found['c_min']}, set by somebody else since"
            plan.kept_by_others.append({"name": "running zfs module", "reason": reason})
    elif now_live is not None and facts.kept:
        plan.notes.append(
            "the running zfs module was loaded with these limits, and what it would have chosen is not known: it keeps "
            "them until it is loaded again (a reboot)"
        )
    _plan_image(facts, plan)
    return plan


def image_needed(root: Root, policy: str, run: Runner = run_command) -> bool:
    """Must the boot image be made anew for a change in modprobe.d to count? ``policy``: auto, always or never.

    With auto: when the root file system is on ZFS, or the running kernel's image carries zfs. Raises CommandError.
    """
    if policy != "auto":
        return policy == "always"
    mounts = [line.split() for line in (root.read_or_none("/proc/self/mounts") or "").splitlines()]
    if any(len(fields) > 2 and fields[1:3] == ["/", "zfs"] for fields in mounts):
        return True
    words = (root.read_or_none("/proc/cmdline") or "").split()
    if "boot=zfs" in words or any(word.startswith("root=ZFS=") for word in words):
        return True
    image = f"/boot/initrd.img-{root.read_or_none('/proc/sys/kernel/osrelease')}"
    if not root.exists(image) or not root.exists("/usr/bin/lsinitramfs"):
        return False
    listing = run(["lsinitramfs", str(root.path(image))])
    return any(name.rpartition("/")[2].startswith("zfs.ko") for name in listing.splitlines())


def check_writable(root: Root, facts: Facts, plan: Plan) -> None:
    """Raises ArcError when something cannot be written, before anything is."""
    targets = [root.path(path) for path, text in plan.files.items() if text != facts.files.get(path)]
    targets += [target.parent for target in targets]
    if plan.limits is not None and facts.live is not None and arc.steps(plan.limits, facts.live):
        targets += [root.path(f"{arc.PARAMETERS}/{name}") for name, _value in arc.steps(plan.limits, facts.live)]
    for target in targets:
        if target.exists() and not os.access(target, os.W_OK):
            raise arc.ArcError(f"{target} is read-only; nothing was changed")


def write_parameter(root: Root, name: str, text: str) -> None:
    """Raises OSError; that it does not says nothing of whether ZFS takes the value."""
    root.path(f"{arc.PARAMETERS}/{name}").write_text(text, encoding="ascii")


def set_live(root: Root, limits: arc.Limits, parameters: Mapping[str, str]) -> None:
    """Write what is needed in the right order and read back what counts. Raises ArcError, OSError."""
    now = arc.live(root)
    if now is None:
        return
    texts = [(name, str(value)) for name, value in arc.steps(limits, now)]
    for name, text in [*texts, *parameters.items()]:
        if (name, text) in texts or root.read_or_none(f"{arc.PARAMETERS}/{name}") != text:
            write_parameter(root, name, text)
    after = arc.live(root)
    reason = arc.untaken(limits, after) if after is not None else "the zfs module went away"
    if reason:
        raise arc.ArcError(f"{reason}; the kernel's log says why (dmesg)")


def _put(root: Root, path: str, text: str | None) -> None:
    target = root.path(path)
    if text is None:
        target.unlink(missing_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text, mode=target.stat().st_mode & 0o7777 if target.exists() else 0o644)


def apply(root: Root, facts: Facts, plan: Plan, image: list[str] | None, run: Runner = run_command) -> None:
    """Record, write, set, make the boot image (``image``: the command, None: not needed).

    Raises ArcError with files and limits as they were before this run.
    """
    state = EarlierState(CAPABILITY, root)
    earlier = dict(state.kept)
    if plan.difference:
        due = {IMAGE: Kept(None, "due")} if plan.image and image else {}
        state.remember({**plan.record, **due})
        try:
            for path, text in plan.files.items():
                if text != facts.files.get(path):
                    _put(root, path, text)
            if plan.limits is not None:
                set_live(root, plan.limits, plan.parameters)
            if due and image:
                run(image)
        except (OSError, CommandError, arc.ArcError) as error:
            _undo(root, facts, plan)
            state.forget([key for key in state.kept if key not in earlier])
            state.remember(earlier)
            raise arc.ArcError(f"{error}. Files and limits are again as they were") from error
    stale = [key for key in state.kept if key not in plan.record]
    if stale:
        state.forget(stale)
    state.remember(plan.record)


def _undo(root: Root, facts: Facts, plan: Plan) -> None:
    for path in plan.files:
        if facts.files.get(path) != plan.files[path]:
            _put(root, path, facts.files.get(path))
    if facts.live is not None and plan.limits is not None:
        set_live(root, arc.Limits(facts.live.c_min, facts.live.c_max), facts.live.parameters)


def as_result(now: arc.Live | None) -> dict[str, Any] | None:
    """The running module for a module's result."""
    if now is None:
        return None
    return {"c_min": now.c_min, "c_max": now.c_max, "size": now.size, **now.parameters}
