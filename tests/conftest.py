# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One session, its tiers in order (unit, gates, service, lab, rig), and an account of each at the end.

Also makes this checkout importable as the collection it is, whatever its folder is called.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").absolute()
TIERS = ("unit", "gates", "service", "lab", "rig")
TIER_HELP = {
    "unit": "library and modules on recorded trees; no root, no network",
    "gates": "checkers, documentation, packaging",
    "service": "real nats-server, overlay mounts, processes; root",
    "lab": "the roles on real systemd, in containers; root",
    "rig": "the levels on a real kernel, in a virtual machine",
}


def _link_collection() -> Path:
    """`CACHE/collections/ansible_collections/organism/proxmox` -> this checkout; returns the folder for sys.path."""
    top = CACHE / "collections"
    link = top / "ansible_collections" / "organism" / "proxmox"
    if not (link.is_symlink() and link.readlink() == REPO):
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".proxmox.{os.getpid()}")
        new.symlink_to(REPO)
        new.replace(link)
    return top


# Ahead of site-packages: an empty namespace package of ours, which includes the bundle's collections there.
sys.path.insert(0, str(_link_collection()))


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # started in the background of a script: the programs under test would inherit that nobody may interrupt them
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes more than a few seconds (left out by ./run lint)")
    config.addinivalue_line(
        "markers", "whole: boots and reboots the rig (left out by ./run test, run by ./run rig-test)"
    )
    config.addinivalue_line("markers", "fast: of the rig tier, what ./run test runs (by itself: rig-test -m fast)")
    config.pluginmanager.register(Account(), "organism-account")


@dataclass
class Tier:
    """What became of one tier's tests, and how long they took, set-up and tear-down included."""

    selected: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    skips: list[tuple[str, str]] = field(default_factory=list)


def tier_of(nodeid: str) -> str:
    """The tier that a test belongs to: the name of its folder under tests/."""
    parts = nodeid.split("::", 1)[0].split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


def _rank(name: str) -> int:
    return TIERS.index(name) if name in TIERS else len(TIERS)


class Account:
    """Orders the tiers, announces each, and sums up at the end."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}
        self.current = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: _rank(tier_of(item.nodeid)))  # stable: the order within a tier stays

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._tier(tier_of(item.nodeid)).selected += 1

    def _tier(self, name: str) -> Tier:
        return self.tiers.setdefault(name, Tier())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        name = tier_of(item.nodeid)
        if name != self.current:
            self.current = name
            reporter = item.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.ensure_newline()
                told = f"tier {name}: {self._tier(name).selected} tests"
                reporter.write_line(f"{told} - {TIER_HELP[name]}" if name in TIER_HELP else told, bold=True)
                reporter.currentfspath = None  # so that the next file's name is printed on a line of its own
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self._tier(name).seconds += time.monotonic() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tier = self._tier(tier_of(report.nodeid))
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
            tier.outcomes["error" if report.failed and report.when != "call" else report.outcome] += 1
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            tier.skips.append((report.nodeid, reason.removeprefix("Skipped: ")))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
        # The outermost wrapper: what other plugins say (failures, the short summary) is out when this continues,
        # so that nothing but pytest's closing line comes after it.
        yield
        terminalreporter.section("tiers")
        terminalreporter.write_line(
            f"{'tier':<9}{'tests':>7}{'passed':>8}{'failed':>8}{'errors':>8}{'skipped':>9}{'seconds':>9}"
        )
        for name in sorted(self.tiers, key=_rank):
            tier = self.tiers[name]
            counts = "".join(
                f"{tier.outcomes[outcome]:>{width}}"
                for outcome, width in (("passed", 8), ("failed", 8), ("error", 8), ("skipped", 9))
            )
            terminalreporter.write_line(f"{name:<9}{tier.selected:>7}{counts}{tier.seconds:>9.1f}")
        absent = [name for name in TIERS if name not in self.tiers]
        if absent:
            terminalreporter.write_line(f"not chosen in this run: {', '.join(absent)}")
        skips = [skip for name in sorted(self.tiers, key=_rank) for skip in self.tiers[name].skips]
        terminalreporter.section(f"SKIPPED: {len(skips)}")
        if not skips:
            terminalreporter.write_line("nothing was skipped")
        reasons: dict[str, list[str]] = {}
        for nodeid, reason in skips:
            reasons.setdefault(reason, []).append(nodeid)
        for reason, nodeids in reasons.items():
            more = f" and {len(nodeids) - 1} more" if len(nodeids) > 1 else ""
            terminalreporter.write_line(f"SKIPPED {nodeids[0]}{more}: {reason}")
