# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One scenario: a layer with a committed sync, changes, and a second sync that is cut before a given system call.

Whatever is cut: the next start restores a whole generation, the committed one or the one that was being made, and the
sync after it works. With ``RAM`` lost only the disk counts; a killed sync alone is followed by another one as well.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.ram.disks import CUTS, Disk
from chaos.ram.stepper import run_until

from organism.core import _ramlayer as ramlayer
from organism.core._ramlayer import Layer
from service.ramlayer.trees import OPERATIONS, ROOT, differences, make_layer, unmount_all, view

NAMES = ("x", "a", "a/x", "a/y", "a/new", "b", "b/c", "b/c/x", "b/c/n", "b/z", "d", "d/x", "n", "n/x", "n/m", "m")
KILL = "kill"
HOW = (KILL, *CUTS)


class Broken(Exception):
    """What must never happen has happened; the text says what, and how to see it again."""


@dataclass
class Stage:
    """A layer on a disk, and what was committed at which sync."""

    top: Path
    disk: Disk
    layer: Layer
    committed: dict[str, Any]
    coming: dict[str, Any]


def prepare(top: Path, disk: Disk, seed: int) -> Stage:
    """A layer below ``top``, often with so many syncs that there is a spare generation, then changes not synced yet."""
    chance = random.Random(seed)
    layer = make_layer(top, size_mb=32, keep=2, disk=disk.place / f"s{seed}")
    ramlayer.mount(layer, ROOT)
    for _sync in range(chance.choice((1, 3, 4))):
        _change(layer, chance, 5)
        ramlayer.sync(layer, ROOT)
    committed = view(layer)
    _change(layer, chance, 6)
    (layer.merged / "always").write_bytes(chance.randbytes(200_000))
    return Stage(top, disk, layer, committed, view(layer))


def _change(layer: Layer, chance: random.Random, count: int) -> None:
    for _step in range(count):
        operation = chance.choice(OPERATIONS)
        operation(layer.merged, chance.choice(NAMES), chance.choice(NAMES), chance.randrange(9999))


def length(top: Path, disk: Disk, seed: int) -> int:
    """How many system calls the second sync makes."""
    stage = prepare(top, disk, seed)
    try:
        return run_until(lambda: ramlayer.sync(stage.layer, ROOT))
    finally:
        _clear(stage)


def cut(top: Path, disk: Disk, seed: int, call: int, how: str) -> None:
    """Cut the second sync before its ``call``-th system call. Raises Broken."""
    stage = prepare(top, disk, seed)
    try:
        run_until(lambda: ramlayer.sync(stage.layer, ROOT), call)
        if how == KILL and call % 2:
            # RAM is still there: the next sync goes on from whatever was left behind
            ramlayer.sync(stage.layer, ROOT)
            _expect(stage, "after the next sync", only_coming=True)
            return
        unmount_all(stage.top)
        if how != KILL:
            disk.cut_power(CUTS[how])
        _expect(stage, "after the cut", only_coming=False)
        (stage.layer.merged / "later").write_text("later", encoding="utf-8")
        ramlayer.sync(stage.layer, ROOT)
        stage.coming = view(stage.layer)
        _expect(stage, "after a sync that followed the restore", only_coming=True)
    except Exception as error:
        raise Broken(f"seed {seed}, {how} before system call {call}: {error}") from error
    finally:
        _clear(stage)


def _expect(stage: Stage, when: str, *, only_coming: bool) -> None:
    unmount_all(stage.top)
    told = ramlayer.mount(stage.layer, ROOT)
    if "damaged" in told or "restored" not in told:
        raise Broken(f"{when}: {told}")
    found = view(stage.layer)
    if found != stage.coming and (only_coming or found != stage.committed):
        raise Broken(f"{when} neither generation came back whole: {differences(found, stage.coming)[:4]}")
    number = int(told.split("generation ")[1].split(" ")[0])
    fault = stage.layer.store.damage(number, deep=True)
    if fault:
        raise Broken(f"{when}: generation {number}: {fault}")


def _clear(stage: Stage) -> None:
    unmount_all(stage.top)
    for folder in (stage.layer.base.parent, stage.layer.notes):
        if folder.exists():
            shutil.rmtree(folder)
