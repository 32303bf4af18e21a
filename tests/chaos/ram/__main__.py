# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The long crash tier of the RAM layers: ``./run chaos SUITE=ram [SEED=n] [MINUTES=m]``.

Each round makes one tree and cuts its sync before every single system call that changes anything, by SIGKILL and by the
two kinds of power cut, on ext4 and on XFS in turn. It ends 0 when each restore gave a whole generation, 1 otherwise;
what failed is told with the words that show it again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from chaos.ram.alone import alone
from chaos.ram.cuts import HOW, Broken, cut, length
from chaos.ram.disks import SIZE, Disk, Unavailable


def _arguments(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="./run chaos SUITE=ram", description=__doc__)
    made.add_argument("--seed", type=int, help="the first tree's number; each round takes the next")
    made.add_argument("--minutes", type=float, default=10.0, help="begin no new cut after so long (default: 10)")
    made.add_argument("--call", type=int, help="only the cut before this system call")
    made.add_argument("--how", choices=HOW, help="only this kind of cut")
    made.add_argument("--disk", choices=sorted(SIZE), help="only this file system")
    return made.parse_args(words)


def main(words: list[str]) -> int:
    asked = _arguments(words)
    if os.geteuid() != 0:
        print("chaos: mounting needs root; run it as root", file=sys.stderr)
        return 1
    alone()
    first = random.SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    ends = time.monotonic() + asked.minutes * 60
    done: Counter[str] = Counter()
    broken: list[str] = []
    print(f"chaos SUITE=ram SEED={first} MINUTES={asked.minutes:g}", flush=True)
    kinds = [asked.disk] if asked.disk else ["ext4", "xfs"]
    with tempfile.TemporaryDirectory(prefix="ram-chaos-") as folder:
        disks = _disks(Path(folder), kinds)
        if not disks:
            return 1
        try:
            seed = first
            while time.monotonic() < ends and not broken:
                disk = disks[(seed - first) % len(disks)]
                complete = _round(Path(folder) / "machine", disk, seed, asked, ends, done, broken)
                print(f"  seed {seed} on {disk.kind}: {'each call' if complete else 'part of the calls'}, "
                      f"{done.total()} cuts so far, {len(broken)} broken", flush=True)  # fmt: skip
                seed += 1
                if asked.call is not None:
                    break
        finally:
            for disk in disks:
                disk.remove()
    print(f"{done.total()} cuts on {seed - first} trees: " + ", ".join(f"{n} {how}" for how, n in sorted(done.items())))
    for text in broken:
        print(f"BROKEN {text}")
    print("chaos SUITE=ram: every restore gave a whole generation" if not broken else "chaos SUITE=ram: FAILED")
    return 1 if broken or not done else 0


def _disks(folder: Path, kinds: list[str]) -> list[Disk]:
    made = []
    for kind in kinds:
        try:
            made.append(Disk(folder, kind))
        except Unavailable as error:
            print(f"  SKIPPED {kind}: {error}", file=sys.stderr)
    return made


def _round(
    folder: Path, disk: Disk, seed: int, asked: argparse.Namespace, ends: float, done: Counter[str], broken: list[str]
) -> bool:
    """All cuts of one tree, in an order of chance; False when time ran out."""
    calls = [asked.call] if asked.call is not None else range(1, length(folder, disk, seed) + 1)
    cuts = [(call, how) for call in calls for how in HOW if asked.how in (None, how)]
    random.Random(seed).shuffle(cuts)
    for call, how in cuts:
        if time.monotonic() >= ends and done.total():
            return False
        try:
            cut(folder, disk, seed, call, how)
        except Broken as error:
            broken.append(
                f"{error}\n  again: ./run chaos SUITE=ram SEED={seed} CALL={call} HOW={how!r} DISK={disk.kind}"
            )
            return False
        done[how] += 1
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
