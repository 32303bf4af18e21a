# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-qemu-pin``: pins the threads of VMs, shows where they are, and watches that they stay there.

``/etc/organism/hook.d/post-start/50-pin`` calls ``pin`` at each start of a VM. ``watch`` looks for drift, slowly: it
finds what somebody has moved, a hot-plugged vCPU, or a VM that was started past the hook.

Exit codes: 0, 1 a VM cannot be pinned (``status``: is not pinned), 2 the call or the settings are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from organism.core import _cpu_plan, _qemu, _qemu_pin, _qemu_plan, _qemu_records, _qemu_report, _qmp, _topology
from organism.core._qemu_pin import Hands, Result
from organism.core._qemu_records import Config, Wish
from organism.core._systemd import CommandError

INTERVAL_S = 300.0

# what a VM's pinning may fail with; a fault of one VM does not keep the others from being looked at
TROUBLE = (
    _qemu.QemuError,
    _qmp.QmpError,
    _qemu_plan.PinRefusedError,
    _cpu_plan.CpuPlanError,
    _topology.TopologyError,
    CommandError,
    OSError,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="organism-qemu-pin", description="Pins the threads of VMs to CPUs.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    pin = verbs.add_parser("pin", help="pin a VM that runs")
    pin.add_argument("name", nargs="?", help="VMID, or a name of /etc/organism/qemu_pin.json")
    pin.add_argument("--pidfile", help="any QEMU: its -pidfile (with --qmp)")
    pin.add_argument("--qmp", help="any QEMU: the unix socket of its -qmp")
    pin.add_argument("--oversubscribe", type=float, metavar="RATIO", help="vCPUs to CPUs that it may share")
    pin.add_argument("--check", action="store_true", help="say what would change, and change nothing")
    pin.add_argument("--from-hook", action="store_true", help="a VM that is not in the settings is left alone")
    unpin = verbs.add_parser("unpin", help="give a VM's threads the masks of before")
    unpin.add_argument("name", help="VMID or name")
    unpin.add_argument("--check", action="store_true", help="say what would change, and change nothing")
    status = verbs.add_parser("status", help="show where the threads are; exit code 1 when one is elsewhere")
    watch = verbs.add_parser("watch", help="look for drift until told to stop, correct and report it")
    watch.add_argument("--interval", type=float, default=INTERVAL_S, metavar="SECONDS", help="default: %(default)g")
    watch.add_argument("--once", action="store_true", help="look once")
    for verb in (pin, unpin, status, watch):
        verb.add_argument("--json", action="store_true", help="JSON instead of text")
    return parser


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_args(list(argv))
    verbs = {"pin": _pin, "unpin": _unpin, "status": _status, "watch": _watch}
    hands = Hands()
    try:
        config = _qemu_records.load_config(hands.root)
        return verbs[options.verb](parser, options, hands, config)
    except TROUBLE as error:
        _say(f"organism-qemu-pin: {error}", error=True)
        return 1


def _pin(parser: argparse.ArgumentParser, options: argparse.Namespace, hands: Hands, config: Config | None) -> int:
    wish = _wish(parser, options, config)
    if wish is None:
        _say(f"VM {options.name} is not in {_qemu_records.CONFIG}: its threads are left alone")
        return 0
    settings = config or Config()
    zones = _qemu_records.zones(hands.root, settings.vcpu, settings.io)
    result = _qemu_pin.pin(hands, wish, zones, confine=settings.confine, dry=options.check)
    if options.json:
        _say(json.dumps({**result.as_dict(), "changed": result.difference.changed}, indent=1))
    else:
        _say(_told(result, dry=options.check))
    return 0


def _wish(parser: argparse.ArgumentParser, options: argparse.Namespace, config: Config | None) -> Wish | None:
    if bool(options.pidfile) != bool(options.qmp):
        parser.error("--pidfile and --qmp belong together")
    if options.oversubscribe is not None and options.oversubscribe < 1:
        parser.error("--oversubscribe is a ratio of vCPUs to CPUs, 1 or more")
    if options.pidfile:
        name = _qemu_records.check_name(options.name or os.path.basename(options.pidfile).removesuffix(".pid"))  # noqa: PTH119 - text, not a path of this system
        return Wish(_qemu.Target(name, options.pidfile, options.qmp), options.oversubscribe)
    if not options.name:
        parser.error("name a VM, or give --pidfile and --qmp")
    found = config.wish(options.name) if config is not None else None
    if found is None and options.from_hook:
        return None
    if found is None and options.name.isdigit():
        found = Wish(_qemu.pve(int(options.name)))
    if found is None:
        raise _qemu.QemuError(f"VM {options.name} is unknown: it is not in {_qemu_records.CONFIG} and no VMID")
    return Wish(found.target, options.oversubscribe or found.ratio)


def _told(result: Result, *, dry: bool) -> str:
    label = f"VM {result.name}"
    if result.pid is None:
        return f"{label}: {'; '.join(result.notes)}"
    pairs = " ".join(f"{index}:{cpu}" for index, cpu in result.vcpus.items())
    done = "would change" if dry else "set"
    count = len(result.difference.changes)
    return f"{label}: vCPU:CPU {pairs}; {done} {count}" if count else f"{label}: vCPU:CPU {pairs}; nothing to change"


def _unpin(_parser: argparse.ArgumentParser, options: argparse.Namespace, hands: Hands, _config: Config | None) -> int:
    released = _qemu_pin.release(hands, _qemu_records.check_name(options.name), dry=options.check)
    if options.json:
        document = {"name": released.name, "changed": released.difference.changed, "kept": dict(released.others)}
        _say(json.dumps(document, indent=1))
        return 0
    _say(f"VM {released.name}: {released.difference.message}")
    for label, cpus in released.others.items():
        _say(f"{label}: {cpus} was set by somebody else and stays")
    return 0


def survey(
    hands: Hands, config: Config, *, dry: bool, told: Callable[[Result], None] = lambda _result: None
) -> tuple[list[Result], dict[str, str]]:
    """Look at (and unless ``dry`` pin) all VMs of the settings: results, and the faults by VM."""
    results: list[Result] = []
    errors: dict[str, str] = {}
    zones = None
    for name in config.names(hands.root):
        wish = config.wish(name)
        if wish is None:
            continue
        try:
            zones = zones or _qemu_records.zones(hands.root, config.vcpu, config.io)
            results.append(_qemu_pin.pin(hands, wish, zones, confine=config.confine, dry=dry))
            told(results[-1])
        except TROUBLE as error:
            errors[name] = str(error)
    return results, errors


def _status(_parser: argparse.ArgumentParser, options: argparse.Namespace, hands: Hands, config: Config | None) -> int:
    results, errors = survey(hands, config or Config(every=True), dry=True)
    wrong = bool(errors) or any(result.difference for result in results)
    if options.json:
        document: dict[str, Any] = {
            "ok": not wrong,
            "vms": [result.as_dict() for result in results],
            "errors": errors,
        }
        _say(json.dumps(document, indent=1))
    else:
        for line in _qemu_report.table(results, errors):
            _say(line)
    return int(wrong)


def _watch(parser: argparse.ArgumentParser, options: argparse.Namespace, hands: Hands, config: Config | None) -> int:
    if options.interval < 1:
        parser.error("--interval is 1 second or more")
    stop, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)
    tally = _qemu_report.Tally()
    while True:
        code = look_once(hands, config or Config(), tally, as_json=options.json)
        if options.once:
            return code
        ready, _, _ = select.select([stop], [], [], options.interval)
        if ready and set(os.read(stop, 64)) - {signal.SIGHUP}:
            return 0
        try:
            config = _qemu_records.load_config(hands.root)  # also what SIGHUP asks for
        except TROUBLE as error:
            _log(4, str(error))


def look_once(hands: Hands, config: Config, tally: _qemu_report.Tally, *, as_json: bool = False) -> int:
    """One check: correct what differs, and tell of it in the journal, the metrics and the events."""
    results, errors = survey(hands, config, dry=False)
    tally.count(results, errors)
    for result in results:
        moved = _qemu_report.drifted(result)
        if moved:
            text = f"VM {result.name}: {len(moved)} threads had drifted and were put back: {', '.join(moved)}"
            _log(4, text)
            _qemu_report.spool_event(hands.root, "pin.drift", result.name, text, moved)
        elif result.difference and not result.known:
            text = f"VM {result.name} had not been pinned at its start, and is now"
            _log(5, text)
            _qemu_report.spool_event(hands.root, "pin.late", result.name, text)
    for name, error in errors.items():
        _log(3, error)
        _qemu_report.spool_event(hands.root, "pin.failed", name, error)
    _qemu_report.write_metrics(hands.root, _qemu_report.metrics(results, errors, tally, time.time()))
    if as_json:
        _say(json.dumps({"vms": [result.as_dict() for result in results], "errors": errors}, indent=1))
    return int(bool(errors))


def _log(level: int, text: str) -> None:
    """A line for the journal: with its level where systemd reads it (sd-daemon(3)), on stderr in any case."""
    prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "organism-qemu-pin: "
    _say(prefix + text, error=True)


def _say(line: str, *, error: bool = False) -> None:
    stream = sys.stderr if error else sys.stdout
    stream.write(line + "\n")
    stream.flush()
