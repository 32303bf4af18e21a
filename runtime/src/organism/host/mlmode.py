# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``mlmode``: one of two exclusive VMs runs, the one for training or the one for inference, or none.

    mlmode train | infer      start that VM; the other is stopped first, by the same hook as from the GUI
    mlmode stop               stop both; afterwards the mode is idle, and nothing starts out of it by itself
    mlmode status             mode, both VMs, memory
    mlmode check              the acceptance checks; changes nothing
    mlmode apply-profile      give the VMs the CPU and memory of the profile; says what waits for a cold start

Exit codes: 0, 1 refused or failed, 2 the call is wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from organism.core import _guard, _guard_profile, _guard_pve, _guard_report, _guard_run
from organism.core._difference import Difference
from organism.core._guard import RUNNING, Reason
from organism.core._guard_config import MODES, load
from organism.core._guard_run import QM, Guard
from organism.core._root import Root
from organism.host.guard import TROUBLE, accept, as_dicts, say, show

NAME = "mlmode"
_NOTICE_S = 60.0
"""How long a VM under high availability may take to begin to start: its manager looks each 10 s."""
_POLL_S = 0.5
_LONGEST_START_S = 1800.0
"""A guard against hanging: Proxmox VE gives a VM with devices four seconds a GiB."""
_ENTRY = "10-guard: "
"""What the dispatcher puts before the guard's lines."""


class Refused(Exception):
    """It cannot be done; the text says why, and the next step."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Which of the exclusive VMs runs: that for training, that for inference, or none.",
        epilog="exit codes: 0, 1 refused or failed, 2 usage",
        allow_abbrev=False,
    )
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("train", help="stop the VM for inference, start the one for training")
    verbs.add_parser("infer", help="stop the VM for training, start the one for inference")
    verbs.add_parser("stop", help="stop both")
    verbs.add_parser("status", help="mode, VMs and memory")
    check = verbs.add_parser("check", help="the acceptance checks; changes nothing")
    check.add_argument("--first", action="store_true", help="end at the first failure")
    profile = verbs.add_parser("apply-profile", help="give the VMs the CPU and memory of the profile")
    profile.add_argument("--check", action="store_true", help="say what would change, and change nothing")
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    try:
        root = Root() if options.root == "/" else _guard_pve.Tree(options.root)
        guard = Guard(root, load(root), _guard_run.say if options.json else say)
        if options.verb == "check":
            return accept(guard, first=options.first, as_json=options.json)
        if options.verb == "apply-profile":
            return _apply(guard, dry=options.check, as_json=options.json)
        if guard.config.mode_group is None:
            raise Refused("no modes are set: name the VMs in vm_guard_modes and run the role vm_guard")
        if options.verb == "status":
            return _status(guard, as_json=options.json)
        reasons = _stop(guard) if options.verb == "stop" else _switch(guard, options.verb)
        mode = _mode(guard)
        lines = [*(f"{reason.rule}: {reason}" for reason in reasons), f"mode: {mode}"]
        show({"ok": not reasons, "mode": mode, "reasons": as_dicts(reasons)}, lines, as_json=options.json)
        return 1 if reasons else 0
    except (*TROUBLE, Refused) as error:
        say(f"{NAME}: {error}", error=True)
        return 1


def _mode(guard: Guard) -> str:
    return _guard_report.mode_of(guard.state(), guard.config, _guard_pve.configs(guard.root))


def _target(guard: Guard, mode: str) -> int:
    name = guard.config.modes.get(mode)
    if name is None:
        raise Refused(f"mode {mode} has no VM: name it in vm_guard_modes")
    found = _guard_report.named(_guard_pve.configs(guard.root), name)
    if len(found) != 1:
        raise Refused(f"mode {mode}: {len(found)} VMs of this node are named {name}; see qm list")
    return found[0]


def _stop(guard: Guard) -> tuple[Reason, ...]:
    group = guard.config.mode_group
    return () if group is None else guard.stop_group(group.name)


def _switch(guard: Guard, mode: str) -> tuple[Reason, ...]:
    """Start the VM of a mode as the GUI would: its hook stops the other, under the lock that all starts take."""
    vmid = _target(guard, mode)
    state = guard.state()
    vm = state.vms[vmid]
    if vm.phase == RUNNING:
        rivals = {other for group in state.groups_of(vmid) for other in group.members} - {vmid}
        return guard.keep_only(vmid) if any(state.vms[other].active for other in rivals) else ()
    if not _guard_report.guarded(_guard_pve.configs(guard.root, [vmid])[vmid]):
        raise Refused(f"{vm.label} does not call the guard: run role vm_hook with it in vm_hook_vmids")
    decision = _guard.decide(state, _guard.Request(vmid, at=time.monotonic_ns()))
    if decision.refused:
        return decision.reasons
    started, said = guard.start_vm(vmid, 2 * guard.config.deadline + _LONGEST_START_S)
    for line in said:
        guard.say(line)
    if not started:
        own = [line.removeprefix(_ENTRY) for line in said if line.startswith(_ENTRY)]
        text = "; ".join(own or said) or "qm start gave no reason"
        return (Reason("start", f"{vm.label} did not start: {text}", f"See: organism-guard explain {vmid}"),)
    ends = time.monotonic() + (_NOTICE_S + guard.config.deadline if _guard_pve.is_ha(guard.root, vmid) else 0.0)
    while _guard_pve.machine(guard.root, vmid) is None:
        if time.monotonic() >= ends:
            text = f"{vm.label} does not run although its start was accepted"
            return (Reason("start", text, f"See its task log, and: organism-guard explain {vmid}"),)
        time.sleep(_POLL_S)  # its manager starts it, and tells nobody
    return ()


def _status(guard: Guard, *, as_json: bool) -> int:
    known, state = _guard_pve.configs(guard.root), guard.state()
    mode = _guard_report.mode_of(state, guard.config, known)
    vms = {
        word: [{"vmid": vmid, "name": name, "phase": state.vms[vmid].phase}
               for vmid in _guard_report.named(known, name) if vmid in state.vms]
        for word, name in sorted(guard.config.modes.items(), key=lambda item: MODES.index(item[0]))
    }  # fmt: skip
    sums = _guard_report.memory(state)
    lines = [f"mode: {mode}"]
    lines += [f"{word}: VM {each['vmid']} ({each['name']}) {each['phase']}" for word in vms for each in vms[word]]
    if sums is not None:
        lines.append(f"memory of running VMs: {sums['vms_mib']} MiB" +
                     (f" of {sums['limit_mib']}" if sums["limit_mib"] else ""))  # fmt: skip
    show({"ok": mode != _guard_report.CONFLICT, "mode": mode, "vms": vms, "memory": sums}, lines, as_json=as_json)
    return 1 if mode == _guard_report.CONFLICT else 0


def _apply(guard: Guard, *, dry: bool, as_json: bool) -> int:
    known = _guard_pve.configs(guard.root)
    found: dict[int, dict[str, str]] = {}
    for name, values in guard.config.profile.items():
        vmids = _guard_report.named(known, name)
        if len(vmids) != 1:
            raise Refused(f"profile of {name}: {len(vmids)} VMs of this node have that name; nothing was changed")
        found[vmids[0]] = _guard_profile.missing(known[vmids[0]], values)
    difference = Difference()
    cold = []
    for vmid, options in found.items():
        if not options:
            continue
        difference.merge(_guard_profile.difference(known[vmid], options))
        if _guard_pve.machine(guard.root, vmid) is not None:
            cold.append(vmid)
        if not dry:
            guard.run(_guard_profile.command(str(guard.root.path(QM)), vmid, options))
    lines = [("would change: " if dry else "") + difference.message]
    lines += [f"VM {vmid} runs: what cannot change while it does counts from its next cold start" for vmid in cold]
    document = {"changed": difference.changed, "vms": found, "cold_start": cold}
    show(document, lines, as_json=as_json)
    return 0
