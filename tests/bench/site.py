# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run of levels 1 to 4 costs that has nothing to do: ``./run bench site [--repeat N]``.

The rig (rig/README.md) is brought to levels 0 to 4, then site.yml is played again: ``changed`` must be 0. Beside each
run, in the same minute, some calls of Ansible's own ``ping`` are timed: what the way to the host alone costs, whatever
is asked. The ratio of the two is what can be compared between machines. Tasks are those that went to the host: not what
was skipped, nor what the controller does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from rig.driver import REPO, Rig  # noqa: E402 - the repository has to be importable first
from tests.rig import levels  # noqa: E402 - as above

PINGS = 10
BUDGET = 25  # tasks a level: tests/gates/test_level_budget.py holds it


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run bench site", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the median counts (default 3)")
    parser.add_argument(
        "--store-baseline", action="store_true", help="keep the result as tests/bench/baseline/site.json"
    )
    parser.add_argument(
        "--rig", metavar="NAME", help="a rig that is up already, and stays so (default: one of its own)"
    )
    asked = parser.parse_args(argv)
    if asked.rig:
        result = measure(Rig(asked.rig), asked.repeat)
    else:
        with Rig("bench") as rig:
            result = measure(rig, asked.repeat)
    _show(result)
    over = {level: count for level, count in result["tasks"].items() if count > BUDGET}
    _keep(result, store=asked.store_baseline and not over)
    if over:
        print(f"over the budget of {BUDGET} tasks a level: {over}", file=sys.stderr)
    return 1 if over else 0


def measure(rig: Rig, repeat: int) -> dict[str, Any]:
    words = ("--tags", f"level0,{levels.LEVELS}")
    levels.make_pools(rig)
    _say("levels 0 to 4, so that there is nothing left to do (minutes)")
    start = time.monotonic()
    levels.play(rig, "site.yml", *words)
    first = time.monotonic() - start
    seconds, pings = [], []
    tasks: dict[str, int] = {}
    for number in range(1, repeat + 1):
        _say(f"run {number} of {repeat} without a change")
        pings.append(_ping(rig))
        start = time.monotonic()
        ran = levels.play(rig, "site.yml", "--tags", levels.LEVELS)
        seconds.append(time.monotonic() - start)
        if ran.changes:
            raise SystemExit(f"a run after a run changed something: {sorted(ran.changes)}")
        tasks = _by_level(ran.tasks)
    total = statistics.median(seconds)
    ping = statistics.median(pings)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "kernel": platform.release(),
                    "python": platform.python_version(), "accelerator": "kvm" if _kvm(rig) else "tcg"},
        "run_before_seconds": first,
        "no_change_seconds": total,
        "tasks": tasks,
        "ping_seconds": ping,
        "goals": {
            "no change: seconds a task / one ping's": total / sum(tasks.values()) / ping,
            f"most tasks of a level (budget {BUDGET})": max(tasks.values()),
        },
    }  # fmt: skip


def _by_level(plays: dict[str, int]) -> dict[str, int]:
    """Tasks that went to the host, of all plays of a level; levels that had none are left out."""
    found: dict[str, int] = {}
    for name, count in plays.items():
        if name.startswith("Level ") and count:
            level = name.partition(",")[0]
            found[level] = found.get(level, 0) + count
    return found


def _ping(rig: Rig) -> float:
    """Seconds of one task that does nothing on the rig, of a play of several."""
    task = {"name": "Ask", "ansible.builtin.ping": {}}
    play = [{"name": "Pings", "hosts": "pve", "become": True, "gather_facts": False, "tasks": [task] * PINGS}]
    with tempfile.TemporaryDirectory(prefix="organism-bench-") as folder:
        file = Path(folder) / "ping.yml"
        file.write_text(yaml.safe_dump(play), encoding="utf-8")
        start = time.monotonic()
        done = rig.play(file)
        if done.returncode != 0:
            raise SystemExit(f"ping failed: {done.stdout}{done.stderr}")
        return (time.monotonic() - start) / PINGS


def _kvm(rig: Rig) -> bool:
    said: dict[str, Any] = rig.qmp("query-kvm")
    return bool(said.get("enabled"))


def _say(text: str) -> None:
    print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def _show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{result['date']}  {machine['cores']} cores, load {machine['load']:.1f}, rig by {machine['accelerator']}")
    for name, count in result["tasks"].items():
        print(f"  {name:<28}{count:>4} tasks")
    print(f"the run before {result['run_before_seconds']:.0f} s, without a change {result['no_change_seconds']:.0f} s, "
          f"one ping {result['ping_seconds']:.2f} s")  # fmt: skip
    baseline = HERE / "baseline/site.json"
    before = json.loads(baseline.read_text())["goals"] if baseline.exists() else {}
    for name, value in result["goals"].items():
        told = f" (baseline {before[name]:.2f})" if name in before else ""
        print(f"  {name}: {value:.2f}{told}")


def _keep(result: dict[str, Any], *, store: bool) -> None:
    results = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache") / "bench"
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    path = results / f"site-{result['date'].replace(':', '')}.json"
    path.write_text(text, encoding="utf-8")
    print(f"kept in {path}")
    if store:
        (HERE / "baseline").mkdir(exist_ok=True)
        (HERE / "baseline/site.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.TimeoutExpired as error:
        sys.exit(f"{error}; the rig is too slow or hangs: ./run rig serial --name bench shows what it says")
