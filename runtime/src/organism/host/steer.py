# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-steer``: holds where interrupts and packets are handled, as ``/etc/organism/steer.json`` says.

It waits for what the kernel announces (links, devices, queues), lets a burst of events settle, looks, and sets what
differs; nothing is set that is right already. Without events it looks every ten minutes (``drift_check``).
``--once`` looks once and ends. Exit codes: 0 all is as wished, 1 something is not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence

from organism.core import _netlink, _steer_pass
from organism.core._nic import Nics
from organism.core._root import Root
from organism.core._sdnotify import notify, watchdog_interval

log = logging.getLogger("organism-steer")

SETTLE = 0.3
"""Seconds without a further event before a pass: a driver that restarts announces each of its queues."""
PATIENCE = 3.0
"""Seconds after which a pass begins although events keep coming."""
EVENTS_KEPT = 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="organism-steer", description="Holds interrupts and packet steering as /etc/organism/steer.json says."
    )
    parser.add_argument("--once", action="store_true", help="look once, set what differs, and end")
    parser.add_argument("--json", action="store_true", help="with --once: print the state as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(list(argv))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    root = Root()
    keeper = Keeper(root, Nics(root))
    if options.once:
        found = keeper.look("once", [])
        if options.json:
            sys.stdout.write(root.read(_steer_pass.STATE) + "\n")
        return 1 if found.problems else 0
    return keeper.run()


class Keeper:
    """The loop. ``tally`` lives as long as the process."""

    def __init__(self, root: Root, nics: Nics) -> None:
        self._root = root
        self._nics = nics
        self.tally = _steer_pass.Tally()
        self._told: list[str] = []

    def look(self, cause: str, events: list[str]) -> _steer_pass.Found:
        """One pass: hold, log what changed and what is wrong (once), report. Raises OSError when it cannot report."""
        found = _steer_pass.run(self._root, self._nics)
        now = time.time()
        self.tally.add(cause, found, now)
        why = f"{cause}: {', '.join(events[:3])}" if events else cause
        for change in found.changes:
            log.info("%s (%s)", change, why)
        for problem in found.problems:
            if problem not in self._told:
                log.error("%s", problem)
        if self._told and not found.problems:
            log.info("all is well again")
        self._told = found.problems
        state = _steer_pass.state_text(found, self.tally, cause, events[-EVENTS_KEPT:], now)
        _steer_pass.write_state(self._root, state)
        if cause != "once":  # metrics of somebody who does not stay would never change again
            _steer_pass.write_metrics(self._root, _steer_pass.metrics_text(found, self.tally, now))
        return found

    def run(self) -> int:
        """Until SIGTERM or SIGINT. SIGHUP looks at once."""
        wake, waker = socket.socketpair()
        with (
            wake,
            waker,
            _netlink.link_socket() as links,
            _netlink.uevent_socket() as devices,
            selectors.DefaultSelector() as selector,
        ):
            for end in (wake, waker):
                end.setblocking(False)
            signal.set_wakeup_fd(waker.fileno())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda _number, _frame: None)
            for channel in (wake, links, devices):
                selector.register(channel, selectors.EVENT_READ)
            # the sockets are open: whatever happens during the first pass is heard after it
            found = self.look("start", [])
            notify("READY=1", self._status(found))
            return self._wait(selector, wake, links, devices, found)

    def _wait(
        self,
        selector: selectors.BaseSelector,
        wake: socket.socket,
        links: socket.socket,
        devices: socket.socket,
        found: _steer_pass.Found,
    ) -> int:
        beat = watchdog_interval()
        events: list[str] = []
        first = last = 0.0
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            due = min(last + SETTLE, first + PATIENCE) if events else looked + found.drift_check
            if now >= due:
                found = self.look("event" if events else "drift", events)
                events, looked = [], time.monotonic()
                notify("WATCHDOG=1", self._status(found))
                continue
            for key, _mask in selector.select(due - now if beat is None else min(due - now, beat)):
                if key.fileobj is wake:
                    numbers = set(wake.recv(4096))
                    if numbers & {signal.SIGTERM, signal.SIGINT}:
                        notify("STOPPING=1")
                        _steer_pass.remove_reports(self._root)
                        return 0
                    heard = ["SIGHUP"]
                else:
                    heard = _netlink.drain(links if key.fileobj is links else devices, key.fileobj is links)
                if heard:
                    last = time.monotonic()
                    first = first if events else last
                    events += heard
            notify("WATCHDOG=1")

    @staticmethod
    def _status(found: _steer_pass.Found) -> str:
        if found.problems:
            return f"STATUS={len(found.problems)} problems: {found.problems[0]}"
        counts = json.dumps(found.interrupts) if found.interrupts else "no interrupts are ours"
        return f"STATUS=as wished; {counts}, {len(found.settings)} settings of ports"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
