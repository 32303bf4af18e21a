# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The audit of what has rules of its own: kernel parameters, interrupts, network ports, ZFS, the threads of VMs.

Each asks the code that sets the thing up what it would change now, in check mode, and so knows the same rules.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from . import (
    _boot_loader,
    _host_audit_settings,
    _irq_apply,
    _nic_apply,
    _qemu_host,
    _qemu_records,
    _steer_config,
    _steer_pass,
    _vfio_audit,
    _zfs_arc,
    _zfs_arc_host,
    _zfs_layout,
    _zfs_layout_host,
)
from . import _boot_tokens as tokens
from . import _kernel_cmdline as kc
from ._difference import Difference
from ._earlier import EarlierState
from ._host_audit import BOOT, NOW, Host, Judge, Verdict
from ._netdev import NetdevError
from ._nic import NicError
from ._qemu import QemuError
from ._qemu_plan import PinRefusedError
from ._qmp import QmpError
from ._systemd import CommandError

STEER_BOOT = "/etc/systemd/system/organism-steer-boot.service"


def kernel_parameters(host: Host, earlier: EarlierState) -> Verdict:
    """In the running kernel, in the settings for the next boot, and in the boot loader's menu."""
    verdict = Verdict(earlier.capability)
    capability = earlier.capability.removeprefix(tokens.RECORD)
    wanted = tokens.others(host.root, "").get(capability, {})
    missing: list[str] | None
    try:
        loader = _boot_loader.detect(host.root, host.run)
        facts = tokens.gather(host.root, capability, loader)
        plan = tokens.make_plan(capability, wanted, facts)
        missing = [str(change) for change in plan.difference.changes]
        missing += tokens.overruled(wanted, tokens.coming(host.root, capability, facts, plan, host.run))
        if not missing:
            tokens.check_written(wanted, loader, host.root)
    except tokens.BootTokensError as error:
        missing = [str(error)]
    except (_boot_loader.BootLoaderError, CommandError, OSError) as error:
        verdict.skip(BOOT, "", str(error))
        missing = None
    if missing is not None:
        for found in missing:
            verdict.judge(BOOT, "", False, found)
        verdict.kept = 0 if missing else len(wanted)
    line = kc.parse(host.root.read_or_none("/proc/cmdline") or "")
    for group, words in wanted.items():
        lacking = [each.partition(": ")[2] for each in tokens.overruled({group: words}, [line])]
        if not lacking:
            verdict.held += 1
        elif missing:
            verdict.judge(NOW, group, False, lacking[0])
        else:
            verdict.skip(NOW, group, f"waits for a reboot: {lacking[0]}")
    return verdict


def _changes(verdict: Verdict, difference: Difference) -> None:
    """What would have to be changed: files count for the boot, the rest for now."""
    for change in difference.changes:
        check = BOOT if change.name.startswith("/") else NOW
        verdict.judge(check, change.name, False, f"is {change.before}, wanted {change.after}")


def _held_at_boot(host: Host, verdict: Verdict) -> None:
    there = host.root.exists(STEER_BOOT)
    verdict.judge(BOOT, "", there, f"{STEER_BOOT} is not there: nothing steers after a boot")


def interrupts(host: Host, earlier: EarlierState) -> Verdict:
    """Against the wish that the keeper holds. Vectors that the kernel keeps to itself are told, and never count."""
    verdict = Verdict(earlier.capability)
    try:
        sections = _steer_config.load(host.root)
        if "irq" not in sections:
            verdict.judge(BOOT, "", False, f"{_steer_config.PATH} has no section irq: nobody steers")
            return verdict
        outcome = _irq_apply.steer(host.root, _steer_pass.irq_wish(sections["irq"]), check=True, strict=False)
    except (ValueError, _irq_apply.SteeringError, OSError) as error:
        verdict.judge(NOW, "", False, str(error))
        return verdict
    _changes(verdict, outcome.difference)
    verdict.held = outcome.summary["ok"]
    states = {
        "pending": "have their mask, and move with their next interrupt",
        "managed": "are managed by the kernel and cannot be steered (isolcpus=managed_irq moves them)",
        "fixed": "are fixed by the kernel",
    }
    for state, meaning in states.items():
        if outcome.summary[state]:
            names = [row["owner"] for row in outcome.rows if row["state"] == state]
            verdict.skip(NOW, state, f"{outcome.summary[state]} {meaning}: {', '.join(sorted(set(names)))}")
    _held_at_boot(host, verdict)
    return verdict


def ports(host: Host, earlier: EarlierState) -> Verdict:
    """Against the wish of that name that the keeper holds."""
    verdict = Verdict(earlier.capability)
    name = earlier.capability.removeprefix(_nic_apply.CAPABILITY).lstrip("-") or _nic_apply.DEFAULT_NAME
    try:
        wishes = _steer_pass.nic_wishes(_steer_config.load(host.root).get("nic", {}))
        if name not in wishes or host.nics is None:
            verdict.judge(BOOT, "", False, f"{_steer_config.PATH} has no wish {name}: nobody steers")
            return verdict
        outcome = _nic_apply.steer(host.nics, {name: wishes[name]}, check=True, lenient=wishes)
    except (ValueError, NetdevError, NicError, CommandError, OSError) as error:
        verdict.judge(NOW, "", False, str(error))
        return verdict
    _changes(verdict, outcome.difference)
    verdict.held = len(outcome.settings) - len(outcome.difference.changes)
    for lacking in outcome.unsupported:
        verdict.skip(NOW, f"{lacking.port} {lacking.what}", lacking.reason)
    _held_at_boot(host, verdict)
    return verdict


def arc_limits(host: Host, earlier: EarlierState) -> Verdict:
    """The running module's limits, the modprobe file and the boot image."""
    verdict = Verdict(earlier.capability)
    kept = earlier.kept.get(_zfs_arc.MODPROBE)
    if kept is None or not isinstance(kept.set, str):
        verdict.skip(NOW, "", f"its record does not name {_zfs_arc.MODPROBE}")
        return verdict
    words = dict(word.split("=", 1) for word in kept.set.split() if word.startswith(_zfs_arc.LIMITS))
    try:
        live, rivals = _zfs_arc.live(host.root), _zfs_arc.rivals(host.root)
    except (_zfs_arc.ArcError, OSError) as error:
        verdict.judge(NOW, "", False, str(error))
        return verdict
    running = {} if live is None else {"zfs_arc_min": live.c_min, "zfs_arc_max": live.c_max}
    if live is None:
        verdict.skip(NOW, "", "the zfs module is not loaded; the limits count when it is")
    for name, found in running.items():
        if name in words:
            verdict.judge(NOW, name, found == int(words[name]), f"is {found} (arcstats), wanted {words[name]}")
    path = host.root.path(_zfs_arc.MODPROBE)
    text = path.read_text(encoding="utf-8") if path.exists() else None
    verdict.judge(BOOT, _zfs_arc.MODPROBE, text == kept.set, "is not as it was written" if text else "is not there")
    for rival in [*rivals, *(f"kernel parameter {word}" for word in _zfs_arc.cmdline_rivals(host.root))]:
        verdict.judge(BOOT, rival, False, "sets an ARC limit as well, and only one may")
    if _zfs_arc_host.IMAGE in earlier.kept:
        verdict.judge(BOOT, "boot image", False, "was not made anew after the last change")
    return verdict


def datasets(host: Host, earlier: EarlierState) -> Verdict:
    """Properties, mounts and pool properties, read by ``zfs get``; they are stored in the pools themselves."""
    verdict = Verdict(earlier.capability)
    wanted: dict[str, dict[str, str]] = {}
    pools: dict[str, dict[str, str]] = {}
    for key, kept in earlier.kept.items():
        kind, name, *rest = key.split(" ", 2)
        values = (pools if kind == "zpool" else wanted).setdefault(name, {})
        values |= {rest[0]: str(kept.set)} if rest else {}
    wish = _zfs_layout.Wanted(wanted, pools)
    try:
        facts = _zfs_layout_host.gather(host.root, wish, host.run)
    except (_zfs_layout.LayoutError, CommandError) as error:
        verdict.skip(NOW, "", str(error))
        return verdict
    for pool, why in sorted(facts.unusable.items()):
        verdict.skip(NOW, pool, why)
    wrong = _zfs_layout.unmet(wish, facts)
    for found in wrong:
        verdict.judge(NOW, "", False, found)
    usable = [name for name in [*wanted, *pools] if _zfs_layout.pool_of(name) not in facts.unusable]
    verdict.held = verdict.kept = 0 if wrong else len(usable)
    return verdict


def threads(host: Host, earlier: EarlierState) -> Verdict:
    """What pinning would change on the VMs that run, and the files that make it happen at the next start."""
    verdict = Verdict(earlier.capability)
    try:
        config = _qemu_records.load_config(host.root)
        if config is None or host.hands is None:
            verdict.judge(BOOT, "", False, f"there is no {_qemu_records.CONFIG}: no VM is pinned")
            return verdict
        hook = _qemu_host.ENTRY in earlier.kept
        outcome = _qemu_host.present(host.hands, config, hook=hook, dry=True)
    except (ValueError, PinRefusedError, QemuError, QmpError, CommandError, OSError) as error:
        verdict.judge(NOW, "", False, str(error))
        return verdict
    _changes(verdict, outcome.difference)
    verdict.kept = sum(1 for key in earlier.kept if key.startswith("/"))
    running = [result for result in outcome.results if result.pid is not None]
    verdict.held = len(running)
    if not running:
        verdict.skip(NOW, "", "none of its VMs runs")
    return verdict


JUDGES: dict[str, Judge] = {
    "": _host_audit_settings.judge,
    tokens.RECORD: kernel_parameters,
    _irq_apply.CAPABILITY: interrupts,
    _nic_apply.CAPABILITY: ports,
    _zfs_arc_host.CAPABILITY: arc_limits,
    _zfs_layout_host.CAPABILITY: datasets,
    _vfio_audit.CAPABILITY: _vfio_audit.cards,
}
"""By the beginning of a record's name."""


def judges() -> dict[str, Judge]:
    """All of them; ``qemu_pin`` begins the name of the record of its keeper, too, which is ordinary settings."""
    return {**JUDGES, "qemu_pin": threads, "qemu_pin_keeper": _host_audit_settings.judge}
