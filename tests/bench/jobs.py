# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast jobs go: ``./run bench jobs [--quick] [--only speed,disk,queue,crowd,takeover,shards] [--json]``.

A real nats-server (``sync_interval: always``, keys and permissions), a real conductor and twelve real workers with
simulated GPUs, side by side with Dramatiq, taskiq, arq and Celery on Redis, round by round; the medians count.
A no-op starts no process, here and there. On a machine that others use too, compare the rows of one run and the
processor time a job; nothing here is a test. What each part measures, and what was found: docs/speed.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import jobs_peers, jobs_queue, jobs_shards, jobs_speed, jobs_takeover
from bench.jobs_table import Goal, table

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("ORGANISM_CACHE") or HERE.parents[1] / ".cache")
PARTS = ("speed", "disk", "queue", "crowd", "takeover", "shards")


@dataclass(frozen=True)
class Sizes:
    """How much is measured: jobs of a bulk, single ones, rounds, seconds of load, and jobs waiting."""

    jobs: int = 3000
    singles: int = 300
    rounds: int = 3
    seconds: float = 5.0
    waiting: tuple[int, ...] = (1_000, 10_000, 100_000)
    crowd: int = 200


QUICK = Sizes(jobs=300, singles=30, rounds=1, seconds=1.0, waiting=(500, 1_000), crowd=24)


def _arguments(words: list[str]) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="./run bench jobs", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a look that everything works, in less than two minutes")
    made.add_argument(
        "--only", default=",".join(PARTS), help=f"parts with commas between them (default: {','.join(PARTS)})"
    )
    made.add_argument("--peers", default=",".join(peer.name for peer in jobs_peers.PEERS),
                      help="with commas between them; empty: none")  # fmt: skip
    made.add_argument("--jobs", type=int, help="of a bulk")
    made.add_argument("--singles", type=int, help="jobs one at a time")
    made.add_argument("--rounds", type=int, help="of which the medians count")
    made.add_argument("--waiting", help="lengths of the queue, with commas (default: 1000,10000,100000)")
    made.add_argument("--million", action="store_true", help="also with 1,000,000 jobs waiting (half an hour, 4 GB)")
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    made.add_argument("--store-baseline", action="store_true", help="keep the result as tests/bench/baseline/jobs.json")
    asked = made.parse_args(words)
    asked.only = [part for part in asked.only.split(",") if part]
    asked.peers = [name for name in asked.peers.split(",") if name]
    for name, known in (("only", PARTS), ("peers", [peer.name for peer in jobs_peers.PEERS])):
        unknown = [part for part in getattr(asked, name) if part not in known]
        if unknown:
            made.error(f"--{name}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return asked


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def sizes_of(asked: argparse.Namespace) -> Sizes:
    sizes = QUICK if asked.quick else Sizes()
    changed = {name: getattr(asked, name) for name in ("jobs", "singles", "rounds") if getattr(asked, name)}
    if asked.waiting:
        changed["waiting"] = tuple(int(word) for word in asked.waiting.split(","))
    if asked.million:
        changed["waiting"] = (*changed.get("waiting", sizes.waiting), 1_000_000)
    return Sizes(**{**vars(sizes), **changed})


def machine() -> dict[str, Any]:
    """What the figures belong to; ``share`` is how much of a processor a busy loop got, ``loop_ms`` what it took."""
    began, used, total = time.monotonic(), time.process_time(), 0
    for number in range(1_000_000):
        total += number
    spent, used = time.monotonic() - began, time.process_time() - used
    return {
        "cpu": _processor(), "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
        "load": os.getloadavg()[0], "share": used / spent, "loop_ms": 1e3 * used, "fsync_ms": _fsync(),
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _fsync() -> float:
    """Median of a small synced write, in milliseconds."""
    spent = []
    with tempfile.NamedTemporaryFile(prefix="jobs-bench-", buffering=0) as file:
        for _ in range(101):
            began = time.monotonic()
            file.write(b"x" * 300)
            os.fsync(file.fileno())
            spent.append(time.monotonic() - began)
    return 1e3 * sorted(spent)[50]


async def run(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes = sizes_of(asked)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "sizes": vars(sizes),
        "quick": asked.quick, "left_out": {}, "tables": {}, "notes": {},
    }  # fmt: skip
    peers = [peer for peer in jobs_peers.PEERS if peer.name in asked.peers]
    if peers and (why := jobs_peers.missing()):
        say(f"no peers: {why}")
        result["left_out"]["peers"] = why
        peers = []
    works: dict[str, Callable[[], Awaitable[None]]] = {
        "speed": lambda: jobs_speed.speed(result, sizes, folder, CACHE, peers, say),
        "disk": lambda: jobs_speed.slow_disk(result, sizes, folder, CACHE, peers, say),
        "queue": lambda: jobs_queue.waiting(result, sizes, folder, say),
        "crowd": lambda: jobs_queue.crowd(result, sizes, folder, say),
        "takeover": lambda: jobs_takeover.takeover(result, sizes, folder, say),
        "shards": lambda: jobs_shards.shards(result, sizes, folder, say),
    }
    for part in asked.only:
        if part == "disk" and shutil.which("strace") is None:
            result["left_out"]["disk"] = "no strace to slow down fsyncs with: `apt-get install strace`"
            say(f"no {part}: {result['left_out']['disk']}")
            continue
        await works[part]()
    result["machine"]["load_after"] = os.getloadavg()[0]
    result["goals"] = {goal.name: goal.as_json() for goal in goals(result)}
    return result


def goals(result: dict[str, Any]) -> list[Goal]:
    """Those of the parts that ran."""
    tables = result["tables"]
    speed = tables.get("speed", {}).get("maestro", {})
    disk = tables.get("disk", {}).get("maestro", {})
    return [
        Goal("no-op jobs/s in batches", speed.get("rate"), 3500),
        Goal("p99 of submit-to-result of singles at idle, ms", speed.get("p99"), 4, most=True),
        Goal("no-op jobs/s in batches with 1 ms more for each fsync", disk.get("rate"), 2000),
        Goal("fsyncs a job in batches", disk.get("syncs"), 0.2, most=True),
        Goal("fsyncs a job at idle", disk.get("syncs_idle"), 3, most=True),
    ]


def show(result: dict[str, Any]) -> None:
    where = result["machine"]
    print(f"{result['date']}  {where['cpu']}, {where['cores']} cores, load {where['load']:.1f} before and "
          f"{where['load_after']:.1f} after, Linux {where['kernel']}, Python {where['python']}")  # fmt: skip
    print(f"a busy loop got {100 * where['share']:.0f} % of a processor; a small synced write took "
          f"{where['fsync_ms']:.2f} ms" + ("; QUICK: only a look" if result["quick"] else ""))  # fmt: skip
    columns = {"speed": jobs_speed.COLUMNS, "disk": jobs_speed.DISK_COLUMNS, "queue": jobs_queue.COLUMNS,
               "crowd": jobs_queue.CROWD_COLUMNS, "takeover": jobs_takeover.COLUMNS,
               "shards": jobs_shards.COLUMNS}  # fmt: skip
    for name, rows in result["tables"].items():
        print("\n" + table(rows, columns[name], name))
        for note in result["notes"].get(name, []):
            print(f"  {note}")
    for what, why in result["left_out"].items():
        print(f"left out: {what}: {why}")
    print()
    before = _baseline()
    for goal in goals(result):
        if goal.value is None:
            continue
        earlier = before.get("goals", {}).get(goal.name, {}).get("value")
        print(
            f"  {goal.told()}" + (f" (baseline of {before['date'][:10]}: {earlier:.2f})" if earlier is not None else "")
        )


def _baseline() -> dict[str, Any]:
    path = HERE / "baseline" / "jobs.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep(result: dict[str, Any], *, store: bool) -> None:
    results = CACHE / "bench"
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    path = results / f"jobs-{result['date'].replace(':', '')}.json"
    path.write_text(text)
    say(f"kept in {path}")
    if store:
        (HERE / "baseline").mkdir(exist_ok=True)
        (HERE / "baseline" / "jobs.json").write_text(text)


def main(words: list[str]) -> int:
    asked = _arguments(words)
    folder = Path(tempfile.mkdtemp(prefix="jobs-bench-"))
    try:
        result = asyncio.run(run(asked, folder))
    finally:
        shutil.rmtree(folder)
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    keep(result, store=asked.store_baseline)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
