# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The long chaos tier of the guard: ``./run chaos SUITE=guard [SEED=n] [COUNT=500] [KILLS=yes|no|both] [ONLY=n]``.

Random sequences of starts, stops, backups, power-offs and crashes over six VMs and four GPUs of a simulated node, by
the API, by qm and by our commands at once. It ends 0 when nothing was broken, else 1 with the words that show it
again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter

from chaos.guard.place import Place
from chaos.guard.storm import Broken, Storm


def _arguments(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="./run chaos SUITE=guard", description=__doc__)
    made.add_argument("--seed", type=int, help="of all sequences")
    made.add_argument("--count", type=int, default=500, help="how many sequences (default: 500)")
    made.add_argument("--kills", choices=("yes", "no", "both"), default="both", help="kill hooks (default: both)")
    made.add_argument("--only", type=int, help="only this sequence")
    return made.parse_args(words)


def storm(seed: int, numbers: range, kills: bool, done: Counter[str], *, loud: bool = True) -> str | None:
    """Play sequences; what broke first with its number, or None."""
    with Place() as place:
        for number in numbers:
            each = Storm(place, random.Random(f"{seed}:{number}"), kills)
            try:
                each.run()
            except Broken as error:
                return f"sequence {number}: {error}"
            finally:
                done.update(each.done)
            if loud and number % 10 == 9:
                print(f"  {number + 1} sequences, {done['samples']} looks, {done['kills']} kills", flush=True)
    return None


def main(words: list[str]) -> int:
    asked = _arguments(words)
    if os.geteuid() != 0:
        print("chaos: the simulated node's commands want root", file=sys.stderr)
        return 1
    seed = random.SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    numbers = range(asked.only, asked.only + 1) if asked.only is not None else range(asked.count)
    broken = 0
    for kills in {"yes": (True,), "no": (False,), "both": (False, True)}[asked.kills]:
        again = f"SUITE=guard SEED={seed} KILLS={'yes' if kills else 'no'}"
        print(f"chaos {again} COUNT={len(numbers)}", flush=True)
        started, done = time.monotonic(), Counter[str]()
        failure = storm(seed, numbers, kills, done)
        for name, count in sorted(done.items()):
            print(f"  {count:>6} {name}")
        if failure is not None:
            broken += 1
            print(f"BROKEN {failure}\n  again: ./run chaos {again} ONLY={failure.split()[1].rstrip(':')}")
        else:
            print(f"  {len(numbers)} sequences in {time.monotonic() - started:.0f} s: nothing broke", flush=True)
    print(f"chaos SUITE=guard: {'FAILED' if broken else 'nothing broke'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
