# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Durability of jobs under fire: ``./run chaos SUITE=jobs [SEED=n] [MINUTES=m]``.

Real servers, conductors, workers and a submitter, each in its own network; faults drawn from the seed; then a checker
reads what happened. It ends 0 when every rule held, 1 otherwise. The history stays on disk; CHECK=folder judges an
earlier one again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from chaos.jobs import history as histories
from chaos.jobs.bus import REPO
from chaos.jobs.checker import check
from chaos.jobs.net import Network
from chaos.jobs.notebook import Notebook, read
from chaos.jobs.parts import Clock
from chaos.jobs.plan import Options, Plan, drawn
from chaos.jobs.run import conduct
from chaos.jobs.trouble import Stuck, Unavailable
from chaos.ram.alone import alone

SHOWN = 20
"""Violations that are printed; all are in the folder."""


def _arguments(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="./run chaos SUITE=jobs", description=__doc__)
    made.add_argument("--seed", type=int, help="draws pool, jobs and faults (default: any, printed)")
    made.add_argument("--minutes", type=float, default=10.0, help="how long faults and jobs come (default: 10)")
    made.add_argument("--jobs", type=int, help="how many (default: 200 a minute)")
    made.add_argument("--faults", type=int, help="how many (default: 12 a minute)")
    made.add_argument("--servers", type=int, choices=(1, 3), help="nats-servers (default: drawn)")
    made.add_argument(
        "--order", choices=("strict", "fair"), help="with or without aging and fair turns (default: drawn)"
    )
    made.add_argument("--without", default="", help="kinds of faults to leave out, with commas between them")
    made.add_argument("--keep", type=Path, help="where histories are kept (default: .cache/chaos)")
    made.add_argument("--check", type=Path, help="judge the history in this folder, and run nothing")
    return made.parse_args(words)


def _options(asked: argparse.Namespace) -> Options:
    seed = random.SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    chance = random.Random(f"pool {seed}")
    servers, order = chance.choice((1, 1, 3)), chance.choice(("strict", "fair"))
    without = [
        name for name, here in (("slow disk", shutil.which("strace")), ("clock step", Clock.library())) if not here
    ]
    without += _words(asked.without)
    return Options(
        seed=seed,
        minutes=asked.minutes,
        jobs=asked.jobs or max(20, int(asked.minutes * 200)),
        faults=asked.faults if asked.faults is not None else max(1, int(asked.minutes * 12)),
        servers=asked.servers or servers,
        strict=(asked.order or order) == "strict",
        without=tuple(without),
    )


def _words(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(words: list[str]) -> int:
    asked = _arguments(words)
    if asked.check:
        return judge(asked.check)
    if os.geteuid() != 0:
        print("chaos: networks and disks of its own need root; run it as root", file=sys.stderr)
        return 1
    options = _options(asked)
    folder = (asked.keep or REPO / ".cache" / "chaos") / f"jobs-{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    order = "strict" if options.strict else "fair"
    left_out = _words(asked.without)
    again = f"SEED={options.seed} MINUTES={options.minutes:g} JOBS={options.jobs} FAULTS={options.faults}"
    print(f"chaos SUITE=jobs {again} SERVERS={options.servers} ORDER={order}")
    print(f"  history: {folder}", flush=True)
    for kind in options.without:
        needs = {"slow disk": "strace is not installed", "clock step": "libfaketime is not installed"}
        print(f"  SKIPPED {kind}: {'left out' if kind in left_out else needs[kind]}")
    print(
        "  NOT DONE: steps of the server's own clock (a static program; it would need a machine of its own)", flush=True
    )
    plan = drawn(options)
    book = Notebook(folder / "history.jsonl")
    book.note("plan", options=asdict(options))
    try:
        alone()
        asyncio.run(conduct(folder, plan, Network(), book))
    except Unavailable as problem:
        print(f"chaos: this machine cannot: {problem}", file=sys.stderr)
        return 1
    except Stuck as problem:
        print(f"  STUCK: {problem}", flush=True)
        book.note("stuck", why=str(problem))
    finally:
        book.close()
    return judge(folder)


def judge(folder: Path) -> int:
    """Read the history in a folder and say what it proves."""
    lines = [*read(folder / "history.jsonl"), *read(folder / "submitter.jsonl")]
    options = next(line["options"] for line in lines if line["what"] == "plan")
    plan = drawn(Options(**{**options, "without": tuple(options["without"])}))
    history = histories.load(lines)
    violations = check(history, plan)
    _tell(history, plan)
    (folder / "violations").write_text("".join(f"{one}\n" for one in violations))
    for one in violations[:SHOWN]:
        print(f"VIOLATED {one}")
    if len(violations) > SHOWN:
        print(f"... and {len(violations) - SHOWN} more in {folder / 'violations'}")
    kept = "every promise was kept" if not violations else f"FAILED, {len(violations)} violations; history in {folder}"
    print(f"chaos SUITE=jobs: {kept}")
    return 1 if violations else 0


def _tell(history: histories.History, plan: Plan) -> None:
    states = Counter[str](result.state for _, result in history.results)
    steps = [event for _, result in history.results for event in result.history]
    retries = Counter(event.err or "" for event in steps if event.state == "retry")
    attempts = sum(result.attempts for _, result in history.results)
    seen = len({(order.task_id, order.attempt) for order in history.orders})
    terms = {order.term for order in history.orders}
    begun = sum(run.step == "begun" for run in history.runs)
    purged = sum(last - first + 1 for first, last in history.missed)
    print(f"  {len(history.accepted)} submissions acknowledged of {len(plan.jobs)}, {len(history.repeated)} repeated,"
          f" {len(history.contradicted)} contradicted: " + _counts(states))  # fmt: skip
    print(f"  {history.faults.total()} faults: {_counts(history.faults)}")
    print(f"  {attempts} attempts, {seen} of their orders seen, in {len(terms)} terms; {begun} processes begun;"
          f" {purged} of the queue's messages purged unread")  # fmt: skip
    print(f"  retries: {_counts(retries)}; cancellations: {_counts(Counter(history.cancels.values()))}")
    print(f"  {len(history.forged)} forged outcomes: {_counts(Counter(verdict for *_, verdict in history.forged))}")
    print(f"  {len(history.dead)} dead letters; servers restarted by the watch over their disk: {history.repairs};"
          f" ended by themselves: {_counts(history.ended)}")  # fmt: skip


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
