# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The long chaos tier of the guard.

``./run chaos SUITE=guard [SEED=n] [COUNT=500] [KILLS=yes|no|both] [ONLY=n] [JOBS=3] [MINUTES=m] [FORKED=yes|no]``

Random sequences of starts, stops, backups, power-offs and crashes over six VMs and four GPUs of a simulated node, by
the API, by qm and by our commands at once. It ends 0 when nothing was broken, else 1 with the words that show it
again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from chaos.guard.storm import storm


def _arguments(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="./run chaos SUITE=guard", description=__doc__)
    made.add_argument("--seed", type=int, help="of all sequences")
    made.add_argument("--count", type=int, default=500, help="how many sequences (default: 500)")
    made.add_argument("--kills", choices=("yes", "no", "both"), default="both", help="kill hooks (default: both)")
    made.add_argument("--minutes", type=float, default=1e9, help="begin no sequence after so many minutes")
    made.add_argument("--only", type=int, help="only this sequence")
    made.add_argument("--jobs", type=int, default=3, help="nodes at once, since a sequence mostly waits (default: 3)")
    made.add_argument(
        "--forked", choices=("yes", "no"), default="yes", help="fork hooks instead of executing them (default: yes)"
    )
    return made.parse_args(words)


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
        started = time.monotonic()
        jobs = max(1, min(asked.jobs, len(numbers)))
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = [
                pool.submit(storm, seed, numbers[job::jobs], kills, forked=asked.forked == "yes", minutes=asked.minutes)
                for job in range(jobs)
            ]
            accounts = [part.result() for part in parts]
        done = sum((account.done for account in accounts), Counter[str]())
        for name, count in sorted(done.items()):
            print(f"  {count:>6} {name}")
        failures = [account.failure for account in accounts if account.failure is not None]
        for failure in failures:
            print(f"BROKEN {failure}\n  again: ./run chaos {again} ONLY={failure.split()[1].rstrip(':')}")
        broken += len(failures)
        played = sum(account.sequences for account in accounts)
        end = "nothing broke" if not failures else "FAILED"
        print(f"  {played} sequences in {time.monotonic() - started:.0f} s: {end}", flush=True)
    print(f"chaos SUITE=guard: {'FAILED' if broken else 'nothing broke'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
