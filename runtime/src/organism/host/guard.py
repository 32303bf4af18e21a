# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-guard``: keeps the peace between VMs: exclusive groups, one running VM a GPU, and the memory budget.

``hook`` is what ``/etc/organism/hook.d/pre-start/10-guard`` calls: other exit codes than 0 keep the VM from starting,
and what is printed goes into the log of the task.

Exit codes: 0, 1 refused or not as it should be, 2 the call is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from organism.core import _check, _guard, _guard_profile, _guard_pve, _guard_records, _guard_report, _systemd
from organism.core._check import Check
from organism.core._guard import Reason
from organism.core._guard_config import GuardConfigError, load
from organism.core._guard_run import Guard
from organism.core._memory_budget import BudgetError
from organism.core._root import Root

NAME = "organism-guard"
TROUBLE = (GuardConfigError, BudgetError, _systemd.CommandError, OSError)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Exclusive groups of VMs, one running VM a GPU, and the memory budget, at every start of a VM.",
        epilog="exit codes: 0, 1 refused or not as it should be, 2 usage",
        allow_abbrev=False,
    )
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("status", help="what runs, with which devices and groups, and the memory")
    verbs.add_parser("leases", help="which VM may have which devices, and since when")
    explain = verbs.add_parser("explain", help="may this VM start now, and if not, why not; changes nothing")
    explain.add_argument("vmid", help="VMID, or name")
    check = verbs.add_parser("check", help="the acceptance checks: plan, profile, hook; changes nothing")
    check.add_argument("--first", action="store_true", help="end at the first failure")
    verbs.add_parser("watch", help="one look of the watchdog: put leases right, end what must not be")
    hook = verbs.add_parser("hook", help="for the hook of a VM: may it start?")
    hook.add_argument("vmid", type=int, help="VMID")
    hook.add_argument("phase", choices=("pre-start", "post-stop"))
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    verbs = {
        "status": _status,
        "leases": _leases,
        "explain": _explain,
        "check": _checked,
        "watch": _watch,
        "hook": _hook,
    }
    try:
        root = Root() if options.root == "/" else _guard_pve.Tree(options.root)
        return verbs[options.verb](Guard(root, load(root), say), options)
    except TROUBLE as error:
        say(f"{NAME}: {error}", error=True)
        return 1


def _status(guard: Guard, options: argparse.Namespace) -> int:
    busy = guard.lock.holder() if _guard_pve.lock_holder(guard.root, _guard_records.LOCK) is not None else None
    document = _guard_report.status(guard.state(), _guard_pve.configs(guard.root), busy)
    show(document, _guard_report.status_lines(document), as_json=options.json)
    return 0 if document["ok"] else 1


def _leases(guard: Guard, options: argparse.Namespace) -> int:
    state = guard.state()
    valid = [
        lease
        for vmid, lease in sorted(guard.records.leases().items())
        if vmid in state.vms and state.vms[vmid].active  # others are removed with the next look
    ]
    lines = [
        f"VM {lease.vmid} ({lease.vm}): {', '.join(lease.keys) or 'no device'}; {state.vms[lease.vmid].phase}, "
        f"generation {lease.generation}, since {lease.acquired}"
        for lease in valid
    ]
    show({"leases": [lease.as_dict() for lease in valid]}, lines or ["no VM has a lease"], as_json=options.json)
    return 0


def _explain(guard: Guard, options: argparse.Namespace) -> int:
    found = _guard_report.named(_guard_pve.configs(guard.root), options.vmid)
    if len(found) != 1:
        say(f"{NAME}: {len(found)} VMs of this node are {options.vmid!r}; see qm list", error=True)
        return 1
    state = guard.state()
    decision = _guard.decide(state, _guard.Request(found[0], at=time.monotonic_ns()))
    lines = _guard_report.explain_lines(state, decision)
    show(_guard_report.explained(state, decision), lines, as_json=options.json)
    return 1 if decision.refused else 0


def _checked(guard: Guard, options: argparse.Namespace) -> int:
    return accept(guard, first=options.first, as_json=options.json)


def accept(guard: Guard, *, first: bool, as_json: bool) -> int:
    """All acceptance checks, or up to the first failure; also ``mlmode check``."""
    found: list[Check] = []
    known = _guard_pve.configs(guard.root)
    for check in _guard_profile.checks(guard.root, guard.state(), guard.config, known, lambda unit: _runs(guard, unit)):
        found.append(check)
        if not as_json:
            say(f"{check.verdict}  {f'{check.check} {check.subject}'.rstrip()}: {check.detail}")
            if check.next:
                say(f"      next: {check.next}")
        if first and check.ok is False:
            break
    good = _check.passed(found)
    if as_json:
        say(json.dumps(_check.as_dict(found), indent=1))
    else:
        say(f"{'PASS' if good else 'FAIL'}  {sum(1 for check in found if check.ok)} of {len(found)} checks passed")
    return 0 if good else 1


def _runs(guard: Guard, unit: str) -> bool | None:
    if not _systemd.booted(guard.root):
        return None
    return _systemd.Systemctl(guard.run).state(unit).running


def _watch(guard: Guard, options: argparse.Namespace) -> int:
    reasons = guard.watch()
    show({"ok": not reasons, "reasons": as_dicts(reasons)}, map(str, reasons), as_json=options.json)
    return 1 if reasons else 0


def _hook(guard: Guard, options: argparse.Namespace) -> int:
    if options.phase == "post-stop":
        guard.after_stop(options.vmid)
        return 0
    _die_with_parent()
    reasons = guard.before_start(options.vmid, migrated_from=os.environ.get("PVE_MIGRATED_FROM", ""))
    lines = [f"{reason.rule}: {reason}" for reason in reasons]
    show({"ok": not reasons, "reasons": as_dicts(reasons)}, lines, as_json=options.json)
    return 1 if reasons else 0


def _die_with_parent() -> None:
    """When the dispatcher ends, so do we: a start that is given up must stop nobody any more (prctl(2))."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended just before
        raise SystemExit(1)


def as_dicts(reasons: Iterable[Reason]) -> list[dict[str, str]]:
    return [{"rule": reason.rule, "text": reason.text, "next": reason.next} for reason in reasons]


def show(document: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """One document, or its lines."""
    if as_json:
        say(json.dumps(document, indent=1))
    else:
        for line in lines:
            say(line)


def say(line: str, *, error: bool = False) -> None:
    """At once, in the order of events: the task's log is watched."""
    stream = sys.stderr if error else sys.stdout
    stream.write(line + "\n")
    stream.flush()
