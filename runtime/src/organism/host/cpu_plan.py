# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-cpu-plan``: shows the CPU plan that this host uses, or the one that it would get."""

from __future__ import annotations

import argparse
import json
import sys

from organism.core import _cpu_plan, _cpu_zones, _topology
from organism.core._root import Root


def main(argv: list[str] | None = None) -> int:
    """0: there is a plan, 1: there is none or it cannot be read, 2: usage."""
    parser = argparse.ArgumentParser(
        prog="organism-cpu-plan",
        description="Show which CPUs keep the house (HOST), run virtual CPUs (VCPU), and take interrupts (IO).",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, keys as in /etc/organism/cpu_plan.json")
    parser.add_argument(
        "--compute", action="store_true", help="the plan that the defaults give on this machine, whatever is stored"
    )
    parser.add_argument("--root", metavar="DIR", default="/", help="read the tree in DIR instead of this machine")
    options = parser.parse_args(argv)
    root = Root(options.root)
    try:
        plan = _cpu_zones.plan(_topology.read(root)) if options.compute else _cpu_plan.load(root)
    except ValueError as error:  # TopologyError, PlanRefused, CpuPlanError
        sys.stderr.write(f"organism-cpu-plan: {error}\n")
        return 1
    if plan is None:
        said = f"there is no {_cpu_plan.PATH}; run level 1, or look at --compute"
        sys.stderr.write(f"organism-cpu-plan: {said}\n")
        return 1
    sys.stdout.write(json.dumps(plan.as_dict(), indent=1) + "\n" if options.json else plan.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
