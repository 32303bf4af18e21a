# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Steers the interrupts of a host as a plan says, reads back where they run, and takes it back.

Used by the module ``irq_affinity`` and by the keeper ``organism-steer``. Whoever writes holds the lock of
``_steer_config``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import _cpu_list
from ._atomic import write_atomic
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._irq import DEFAULT_MASK, PROC, Interrupts, observe
from ._irq_plan import IrqPlan, IrqWish, plan
from ._root import Root

CAPABILITY = "irq_affinity"


REFUSED = "/run/organism/irq-refused.json"
"""What a kernel that does not show it beforehand (before 6.12) has refused to move since it booted."""


class SteeringError(Exception):
    """The kernel refused a mask for another reason than managing the vector itself; the text names all of them."""


@dataclass
class Outcome:
    """``rows``: one a vector, as they are now. ``kept``: what somebody else has set since, by key."""

    difference: Difference
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


def present_masks(found: Interrupts) -> dict[str, str]:
    """The masks of now as CPU lists, by key."""
    masks = {vector.key: _cpu_list.render(vector.affinity) for vector in found.vectors}
    if found.default is not None:
        masks[DEFAULT_MASK] = _cpu_list.render(found.default)
    return masks


def steer(root: Root, wish: IrqWish, *, check: bool = False, strict: bool = True) -> Outcome:
    """Move what differs; what an earlier wish moved and this one does not goes back.

    ``strict=False``: wishes for devices that are not there are passed over.

    Raises IrqPlanError before anything has changed, SteeringError or OSError.
    """
    found = _with_refusals(observe(root), _known_refusals(root))
    planned = plan(found, wish, strict=strict)
    earlier = EarlierState(CAPABILITY, root)
    masks = present_masks(found)
    wanted = planned.wanted()
    back, kept = _left_behind(earlier, masks, wanted)
    changes = {key: mask for key, mask in {**wanted, **back}.items() if masks.get(key) != mask}
    if check:
        return _outcome(planned, changes, masks, kept)
    # Before the write: a run that is cut short can still be taken back. What is right already is not ours to restore.
    earlier.remember({key: Kept(masks[key], wanted[key]) for key in changes if key in wanted})
    refused = _write(root, found, changes)
    # A refusal tells an older kernel's managed vector from one that can be steered: it was never changed.
    never_ours = [key for key in refused if earlier.kept.get(key, Kept(0, 0)).before == masks.get(key)]
    earlier.forget([*back, *never_ours])
    if refused:
        refused |= _known_refusals(root)
        root.path(REFUSED).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        write_atomic(root.path(REFUSED), json.dumps(sorted(refused)) + "\n", durable=False)
    after = plan(_with_refusals(observe(root), refused | _known_refusals(root)), wish, strict=strict)
    wrong = [row for row in (steering.row() for steering in after.steerings) if row["state"] == "wrong"]
    if wrong:
        raise SteeringError(
            "; ".join(
                f"{PROC}/{w['irq']} ({w['name']}): {w['wanted']} written, {w['affinity']} read back" for w in wrong
            )
        )
    return _outcome(after, {key: mask for key, mask in changes.items() if key not in refused}, masks, kept)


def restore(root: Root, *, check: bool = False) -> Outcome:
    """The masks of before. Vectors that are gone need nothing. Raises SteeringError, OSError."""
    found = observe(root)
    earlier = EarlierState(CAPABILITY, root)
    masks = present_masks(found)
    back, kept = _left_behind(earlier, masks, {})
    if not check:
        refused = _write(root, found, back)
        if refused:
            raise SteeringError(f"the kernel no longer lets these be moved: {', '.join(sorted(refused))}")
        now = present_masks(observe(root))
        wrong = [key for key, mask in back.items() if now.get(key, mask) != mask]
        if wrong:
            raise SteeringError("; ".join(f"{key}: {back[key]} written, {now[key]} read back" for key in wrong))
        earlier.forget()
    difference = Difference()
    for key, mask in back.items():
        difference.add(_label(key), masks[key], mask)
    return Outcome(difference, kept=kept)


def _left_behind(
    earlier: EarlierState, masks: Mapping[str, str], wanted: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """What goes back, and what somebody else holds; keys of vectors that are not there now are neither."""
    back, others = earlier.to_restore(masks)
    return (
        {key: mask for key, mask in back.items() if key not in wanted and key in masks},
        {key: mask for key, mask in others.items() if key not in wanted and key in masks},
    )


def _known_refusals(root: Root) -> set[str]:
    try:
        known = json.loads(root.read_or_none(REFUSED) or "[]")
    except ValueError:
        return set()  # it only spares a write, which finds it out again
    return {str(key) for key in known} if isinstance(known, list) else set()


def _write(root: Root, found: Interrupts, changes: Mapping[str, str]) -> set[str]:
    """Write masks; returns the keys that the kernel keeps to itself. Raises SteeringError after trying all."""
    numbers = {vector.key: vector.irq for vector in found.vectors}
    refused: set[str] = set()
    failed: list[str] = []
    for key, cpus in changes.items():
        path = DEFAULT_MASK if key == DEFAULT_MASK else f"{PROC}/{numbers[key]}/smp_affinity_list"
        text = _cpu_list.mask(_cpu_list.parse(cpus)) if key == DEFAULT_MASK else cpus
        try:
            root.path(path).write_text(text + "\n", encoding="ascii")
        except FileNotFoundError:
            continue  # the device went meanwhile, and its vectors with it
        except OSError as error:
            # kernel/irq/proc.c: EPERM, before Linux 6.12 EIO, for what irq_can_set_affinity_usr() denies
            if error.errno in (errno.EPERM, errno.EIO):
                refused.add(key)
            else:
                failed.append(f"{path} ({key}): {cpus}: {error.strerror}{_hint(error)}")
    if failed:
        raise SteeringError("; ".join(failed))
    return refused


def _hint(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return " (the CPU has no interrupt vector left: widen the I/O zone or lower the number of queues)"
    return ""


def _with_refusals(found: Interrupts, refused: Iterable[str]) -> Interrupts:
    keys = set(refused)
    vectors = tuple(replace(v, locked=True) if v.key in keys else v for v in found.vectors)
    return replace(found, vectors=vectors)


def _label(key: str) -> str:
    return "new interrupts (default_smp_affinity)" if key == DEFAULT_MASK else f"CPUs of {key}"


def _outcome(planned: IrqPlan, changes: Mapping[str, str], masks: Mapping[str, str], kept: dict[str, Any]) -> Outcome:
    difference = Difference()
    for key, mask in changes.items():
        difference.add(_label(key), masks.get(key), mask)
    return Outcome(difference, [steering.row() for steering in planned.steerings], planned.summary(), kept)
