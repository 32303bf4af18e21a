# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does each card of a VM survive that VM's start and stop, again and again? The reset bug, found out before it counts.

A card is judged on the node, by its configuration space (all ones when it has fallen off the bus), its driver while the
VM runs, the width of its link, and what the kernel says of it; with a guest agent also by its presence inside.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import _iommu, _pve_find, _pve_guest, _pve_power
from ._iommu import DEVICES, VFIO, Function
from ._pve_client import Pve, PveError, PveRefused, PveTaskFailed, PveTimeout
from ._pve_find import Vm
from ._pve_power import Clock, Limits
from ._pve_strings import parse
from ._pve_vm_plan import addresses
from ._root import Root
from ._systemd import CommandError, Runner, run_command

CYCLES = 10
_GONE = b"\xff\xff"
_TROUBLE = re.compile(
    r"not ready \d+ms after|giving up|timed out|reset fail|failed to reset|config space inaccessible"
    r"|Refused to change power state|can't change power state|IO_PAGE_FAULT|Uncorrect",
    re.IGNORECASE,
)
"""What the kernel says of a card that does not come back (drivers/pci/pci.c, pcie/aer.c, iommu/amd)."""
_KERNEL_LOG = ["dmesg", "--kernel", "--notime"]


@dataclass(frozen=True)
class Wish:
    """``run``: seconds that the VM is left running in each cycle. ``agent``: wait for it and look inside."""

    cycles: int = CYCLES
    run: float = 30.0
    agent: bool = False
    agent_timeout: float = 300.0
    interrupt: bool = False
    go_on: bool = False
    """Go on with further cycles after one that failed."""
    limits: Limits = field(default_factory=Limits)


@dataclass
class Verdict:
    """One card. ``passed``: cycles without trouble; ``failed``: cycle (from 1) to what was wrong."""

    address: str
    id: str = ""
    model: str = ""
    reset: tuple[str, ...] = ()
    passed: int = 0
    failed: dict[int, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        failed = [{"cycle": cycle, "reasons": reasons} for cycle, reasons in sorted(self.failed.items())]
        return {
            "address": self.address, "id": self.id, "model": self.model, "reset": list(self.reset),
            "passed": self.passed, "failed": failed, "good": self.good,
        }  # fmt: skip


@dataclass
class Report:
    """``done``: cycles that were begun. ``troubles``: what belongs to no single card, by cycle."""

    vm: Vm
    cards: list[Verdict]
    wanted: int
    done: int = 0
    troubles: dict[int, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.troubles and all(card.good for card in self.cards)

    def lines(self) -> list[str]:
        """For people: a line each card, then what belongs to none."""
        made = []
        for card in self.cards:
            ways = ",".join(card.reset) or "none"
            made.append(
                f"{'ok  ' if card.good else 'FAIL'}  {card.address}  {card.passed} of {self.wanted}  reset {ways}"
            )
            made += [f"      cycle {cycle}: {'; '.join(reasons)}" for cycle, reasons in sorted(card.failed.items())]
        return made + [f"FAIL  cycle {cycle}: {text}" for cycle, text in sorted(self.troubles.items())]


@dataclass
class Node:
    """The node that the cards are in, as this process sees it: it has to run there."""

    root: Root
    run: Runner = run_command
    seen: int = 0

    def is_here(self, node: str) -> bool:
        """/etc/pve/local is a link to ``nodes/<this node>`` (pmxcfs)."""
        return self.root.link_name("/etc/pve/local") == node

    def mark(self) -> None:
        """From here on the kernel's words count."""
        self.seen = len(self._log())

    def said(self, address: str) -> list[str]:
        """Trouble that the kernel has told of a function since the mark, each sentence once."""
        new = self._log()[self.seen :]
        return list(dict.fromkeys(line.strip() for line in new if address in line and _TROUBLE.search(line)))

    def _log(self) -> list[str]:
        return self.run(_KERNEL_LOG).splitlines()

    def answers(self, address: str) -> bool:
        """Does its configuration space still hold a vendor?"""
        try:
            return self.root.path(f"{DEVICES}/{address}/config").read_bytes()[:2] not in (_GONE, b"")
        except OSError:
            return False

    def width(self, address: str) -> int | None:
        return self.root.read_int(f"{DEVICES}/{address}/current_link_width")


def cards_of(pve: Pve, vm: Vm, found: dict[str, Function]) -> list[str]:
    """The display functions that a VM has by its configuration. Raises PveRefused where that is not certain."""
    config = pve.get(f"{vm.path}/config", current=True)
    options = {name: parse("host", str(value)) for name, value in config.items() if str(name).startswith("hostpci")}
    known = _pve_find.mappings(pve, vm.node) if any(string.get("mapping") for string in options.values()) else {}
    slots: list[str] = []
    for name, string in sorted(options.items()):
        if host := string.get("host"):
            slots += addresses(host)
            continue
        mapping = known.get(string.get("mapping") or "")
        if mapping is None or len(mapping.paths) != 1:
            raise PveRefused(
                f"{vm}: {name} is mapping {string.get('mapping')}, which names {len(mapping.paths) if mapping else 0} "
                f"devices on {vm.node}: the probe needs to know which card it judges, so give it a mapping with one"
            )
        slots += mapping.paths[0]
    given = {_iommu.normal(slot) for slot in slots}
    cards = [f.address for f in found.values() if f.is_display and given & {f.address, f.slot}]
    if not cards:
        raise PveRefused(f"{vm} has no card on {vm.node} (hostpciN: {', '.join(sorted(given)) or 'none'})")
    return cards


def prepare(pve: Pve, vm: Vm, node: Node, wish: Wish) -> Report:
    """All that can be refused, before the VM is touched. Raises PveRefused."""
    if wish.cycles < 1:
        raise PveRefused(f"cycles must be 1 or more, not {wish.cycles}")
    if wish.run < 0:
        raise PveRefused(f"run_seconds must be 0 or more, not {wish.run:g}")
    if not node.is_here(vm.node):
        raise PveRefused(f"{vm} is on node {vm.node}, and cards are judged there: run this on that node")
    if vm.running and not wish.interrupt:
        raise PveRefused(f"{vm} runs, and the probe would stop it {wish.cycles} times: stop it first, or say interrupt")
    found = _iommu.functions(node.root)
    names = _iommu.models(node.root, found.values())
    cards = [found[address] for address in cards_of(pve, vm, found)]
    gone = [card.address for card in cards if not node.answers(card.address)]
    if gone:
        raise PveRefused(f"{', '.join(gone)} does not answer even now: power the host off and on, then probe again")
    verdicts = [Verdict(card.address, card.id, names.get(card.address, card.id), card.reset) for card in cards]
    return Report(vm, verdicts, wish.cycles)


def probe(pve: Pve, report: Report, node: Node, wish: Wish, clock: Clock | None = None) -> Report:
    """Run the cycles; the VM is left as it was found. Raises PveError when it cannot be stopped any more."""
    clock = clock or Clock()
    vm = report.vm
    if vm.running:
        _pve_power.converge(pve, vm, "stopped", wish.limits, check=False, clock=clock)
    widths = {card.address: node.width(card.address) for card in report.cards}
    for cycle in range(1, wish.cycles + 1):
        report.done = cycle
        if not _cycle(pve, report, node, wish, widths, clock) and not wish.go_on:
            break
    if vm.running and report.good:
        _pve_power.converge(pve, vm, "started", wish.limits, check=False, clock=clock)
    return report


def _cycle(pve: Pve, report: Report, node: Node, wish: Wish, widths: dict[str, int | None], clock: Clock) -> bool:
    """One start and stop; whether nothing was wrong."""
    vm, cycle = report.vm, report.done
    node.mark()
    wrong: dict[str, list[str]] = {card.address: [] for card in report.cards}
    trouble = ""
    try:
        _pve_power.converge(pve, vm, "started", wish.limits, check=False, clock=clock)
        if wish.agent:
            _pve_guest.wait_agent(pve, vm, clock.now() + wish.agent_timeout, clock)
        if wish.run:
            clock.sleep(wish.run)
        _while_running(node, wrong)
        if wish.agent:
            _inside(pve, vm, report.cards, wrong, clock, wish.agent_timeout)
    except (PveTaskFailed, PveTimeout) as error:
        named = [card.address for card in report.cards if card.address.removesuffix(".0") in str(error)]
        for address in named:
            wrong[address].append(f"the VM did not start: {error}")
        trouble = "" if named else str(error)
    _pve_power.converge(pve, vm, "stopped", wish.limits, check=False, clock=clock)
    for address, reasons in wrong.items():
        if not node.answers(address):
            reasons.append("does not answer after the stop (its configuration space is all ones)")
        elif widths[address] and node.width(address) != widths[address]:
            reasons.append(f"its link has {node.width(address)} lanes after the stop, {widths[address]} before")
        reasons += node.said(address)
    for card in report.cards:
        if wrong[card.address]:
            card.failed[cycle] = wrong[card.address]
        elif not trouble:
            card.passed += 1
    if trouble:
        report.troubles[cycle] = trouble
    return not trouble and not any(wrong.values())


def _while_running(node: Node, wrong: dict[str, list[str]]) -> None:
    now = _iommu.functions(node.root)
    for address, reasons in wrong.items():
        function = now.get(address)
        if function is None:
            reasons.append("is gone from the bus")
        elif function.driver != VFIO:
            reasons.append(f"has {function.driver or 'no driver'} while the VM runs, not vfio-pci")


def _inside(
    pve: Pve, vm: Vm, cards: Iterable[Verdict], wrong: dict[str, list[str]], clock: Clock, timeout: float
) -> None:
    """Are there as many of each kind inside as were given? By ``lspci -n`` in the guest."""
    pid = pve.post(f"{vm.path}/agent/exec", command=["lspci", "-n"])["pid"]
    end = clock.now() + timeout
    while not (status := pve.get(f"{vm.path}/agent/exec-status", pid=pid)).get("exited"):
        if clock.now() >= end:
            raise PveTimeout(f"{vm}: lspci does not end inside the guest; a card may hang there")
        clock.sleep(_pve_power.POLL)
    seen = Counter(
        words[2] for line in str(status.get("out-data") or "").splitlines() if len(words := line.split()) > 2
    )
    cards = list(cards)
    for ids, count in Counter(card.id for card in cards).items():
        if seen[ids] < count:
            for card in cards:
                if card.id == ids:
                    wrong[card.address].append(f"the guest sees {seen[ids]} of {count} cards {ids}")


ERRORS = (PveError, CommandError, OSError, ValueError)
"""What a probe may raise."""
