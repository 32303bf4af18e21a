# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-hook``: the one hookscript of every VM.

Proxmox VE calls ``organism-hook VMID PHASE``; what it prints goes into the log of the task. Exit code: 0, or that of
the first entry that failed (124: timed out, 126: refused), or 2 when the call or the settings are wrong. Before a start
any other code than 0 keeps the VM from starting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from organism.core import _hook
from organism.core._hook_run import run_plan
from organism.core._root import Root

_MEANING = {
    "pre-start": "a failure keeps the VM from starting, nothing after it runs",
    "post-start": "all entries run, failures are warnings",
    "pre-stop": "all entries run, failures are warnings; skipped when the guest powers itself off",
    "post-stop": "all entries run, failures are warnings; not called when a start has failed",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="organism-hook",
        description="The hookscript of every VM: runs /etc/organism/hook.d/PHASE/ and what was there before.",
    )
    parser.add_argument("vmid", nargs="?", help="id of the VM")
    parser.add_argument("phase", nargs="?", help=", ".join(_hook.PHASES))
    parser.add_argument("--list", action="store_true", help="show the entries of each phase and run nothing")
    parser.add_argument("--explain", action="store_true", help="like --list, with what a failure does and each limit")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    root = Root()
    try:
        if options.list or options.explain:
            return _show(root, options)
        vmid, phase = _hook.check_call([word for word in (options.vmid, options.phase) if word is not None])
        plan = _hook.plan(root, phase, vmid, _hook.settings(root), owner=os.geteuid())
    except _hook.HookError as error:
        _say(f"organism-hook: {error}", error=True)
        return 2
    report = run_plan(plan, root, os.environ, (lambda _line: None) if options.json else _say)
    if options.json:
        _say(json.dumps(report.as_dict(), indent=1))
    return report.code


def _show(root: Root, options: argparse.Namespace) -> int:
    vmid = None
    phases: Sequence[str] = _hook.PHASES
    if options.vmid is not None:
        vmid, _phase = _hook.check_call([options.vmid, options.phase or "pre-start"])
        phases = (options.phase,) if options.phase else phases
    limits = _hook.settings(root)
    plans = [_hook.plan(root, phase, vmid, limits, owner=os.geteuid()) for phase in phases]
    if options.json:
        _say(json.dumps({"vmid": vmid, "phases": {plan.phase: _as_dict(plan) for plan in plans}}, indent=1))
        return 0
    for plan in plans:
        _say(f"{plan.phase}: {_MEANING[plan.phase]}; at most {plan.total:g} s" if options.explain else plan.phase)
        for entry in plan.entries:
            state = f"REFUSED: {entry.refused}" if entry.refused else "runs"
            detail = f" ({entry.path}, at most {entry.timeout:g} s)" if options.explain else ""
            kind = ", the hookscript that the VM had before" if entry.foreign else ""
            _say(f"  {entry.name}: {state}{kind}{detail}")
        for name, reason in plan.ignored:
            _say(f"  {name}: ignored, {reason}")
        if not plan.entries:
            _say("  nothing")
    return 0


def _as_dict(plan: _hook.Plan) -> dict[str, Any]:
    return {
        "total_timeout_s": plan.total,
        "stops_at_failure": plan.stops_at_failure,
        "entries": [
            {
                "name": entry.name,
                "path": entry.path,
                "timeout_s": entry.timeout,
                "refused": entry.refused,
                "foreign": entry.foreign,
            }
            for entry in plan.entries
        ],
        "ignored": dict(plan.ignored),
    }


def _say(line: str, *, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(line + "\n")
    stream.flush()  # at once, in the order of events: the task's log is watched
