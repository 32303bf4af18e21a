# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One sequence: things are asked of a node at once and in any order, while it is looked at what runs.

What must hold: at no sampled instant two running VMs of one group or on one GPU, or more memory than there is; every
request comes to its end; each refusal has a reason; afterwards no lease is left, and no lock held.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from chaos.guard.place import GROUPS, HANG_S, RESERVE, SHAPES, TOTAL, VMIDS, Place
from pvesim.service import Line

from organism.core import _guard_pve
from organism.core._guard_records import LOCK

OURS = re.compile(r"\b(superseded|group|gpu|memory|busy|stuck): \S.*\. \S")
"""A reason of the guard: rule, what is in the way, and the next step."""
PROXMOX = re.compile(
    r"already running|VM is locked|can't lock file|job errors|does not run|not running|got timeout|received interrupt"
)
KILLED = re.compile(r"was killed by|got signal|exit code 13[0-9]|ended with 13[0-9]|is asked|mode: ")


class Broken(Exception):
    """Something did not hold."""


@dataclass
class Storm:
    """``kills``: hooks and commands of the guard are killed at random moments, too."""

    place: Place
    random: Random
    kills: bool = False
    done: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Raises Broken."""
        self._begin()
        over = threading.Event()
        watchers = [threading.Thread(target=self._sample, args=(over,), daemon=True)]
        if self.kills:
            watchers.append(threading.Thread(target=self._kill, args=(over, Random(self.random.random())), daemon=True))
        for watcher in watchers:
            watcher.start()
        threads = []
        for name, act in [self._choose() for _count in range(self.random.randint(6, 12))]:
            threads.append(threading.Thread(target=self._act, args=(name, act), daemon=True))
            threads[-1].start()
            time.sleep(self.random.choice([0, 0, 0.05, 0.2, 0.6]))  # the rhythm of the sequence
        for thread in threads:
            thread.join(HANG_S)
        over.set()
        for watcher in watchers:
            watcher.join(HANG_S)
        if any(thread.is_alive() for thread in threads):
            self.broken.append("a request did not come to its end")
        self._rest()
        if self.broken:
            raise Broken("\n".join([*self.broken, "what was asked, in the order of the answers:", *self.told]))

    # ---- what happens ------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[str, Callable[[], tuple[bool, str]]]:
        place, random = self.place, self.random
        vmid = random.choice(VMIDS)
        way = random.random()
        if way < 0.22:
            return f"API start {vmid}", lambda: place.by_api(vmid, "start")
        if way < 0.44:
            return f"qm start {vmid}", lambda: place.by_qm("start", vmid)
        if way < 0.56:
            mode = random.choice(["train", "infer"])
            return f"mlmode {mode}", lambda: place.call([*place.mlmode, mode])
        if way < 0.60:
            return "mlmode stop", lambda: place.call([*place.mlmode, "stop"])
        if way < 0.68:
            return f"API shutdown {vmid}", lambda: place.by_api(vmid, "shutdown", timeout=5, forceStop=1)
        if way < 0.74:
            return f"qm stop {vmid}", lambda: place.by_qm("stop", vmid)
        if way < 0.82:
            mode = random.choice(["stop", "snapshot"])
            return f"backup {vmid} {mode}", lambda: place.backup(vmid, mode)
        if way < 0.88:
            return f"power off {vmid}", lambda: (bool(place.sim.control("guest-poweroff", vmid=vmid)), "not running")
        if way < 0.94:
            return f"crash {vmid}", lambda: (bool(place.sim.control("crash", vmid=vmid)), "not running")
        return "watchdog", lambda: place.call([*place.guard, "watch"])

    def _act(self, name: str, act: Callable[[], tuple[bool, str]]) -> None:
        try:
            good, text = act()
        except Exception as error:  # noqa: BLE001 - it belongs to the account, not to a thread's stderr
            self.broken.append(f"{name}: {error!r}")
            return
        self.told.append(f"  {name}: {'ok' if good else text.strip()[-700:]}")
        kind = name.partition(" ")[0] + (" start" if " start" in name else "")
        self.done[kind] += 1
        if good:
            return
        found = OURS.search(text)
        if found:
            self.done[f"refused: {found[1]}"] += 1
        elif "in use by VMID" in text or "reserved for use" in text or "could not find a free device" in text:
            self.done["refused: by Proxmox VE, for the device"] += 1
        elif PROXMOX.search(text):
            self.done["refused: by Proxmox VE"] += 1
        elif self.kills and KILLED.search(text):
            self.done["killed"] += 1
        else:
            self.broken.append(f"{name} failed without a reason:\n{text}")

    def _kill(self, over: threading.Event, random: Random) -> None:
        while not over.wait(random.choice([0.2, 1.0, 3.0])):
            victims = self.place.hooks()
            if victims:
                try:
                    os.kill(random.choice(victims), signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has just ended
                self.done["kills"] += 1

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def _sample(self, over: threading.Event) -> None:
        """Who runs together changes for the worse only by a start, and the node notes who runs at each. Between starts
        the processes are looked at from outside."""
        with self.place.watched() as line:
            while not over.wait(0.1) and not self.broken:
                self._look(line)

    def _look(self, line: Line) -> None:
        for each in line.ask("starts"):
            self.done["starts"] += 1
            cards = [card for devices in each.values() for card in devices]
            if len(set(cards)) != len(cards):
                self.broken.append(f"one GPU has two VMs: {each}")
            self._judge({int(vmid) for vmid in each})
        self.done["samples"] += 1
        self._judge({int(vmid) for vmid in line.ask("machines")})

    def _judge(self, running: set[int]) -> None:
        for name, members in GROUPS.items():
            if len(members & running) > 1:
                self.broken.append(f"of group {name} run {sorted(members & running)}")
        total = sum(SHAPES[vmid][1] for vmid in running)
        if total + RESERVE > TOTAL:
            self.broken.append(f"VMs with {total} MiB run: {sorted(running)}")
        fixed = [device for vmid in running for device in SHAPES[vmid][2] if not device.startswith("mapping")]
        if len(set(fixed)) != len(fixed):
            self.broken.append(f"a GPU has two VMs: {sorted(running)}")
        pool = len(running & {102, 104}) + len(running & {103})
        if pool > 2:
            self.broken.append(f"two GPUs have three VMs: {sorted(running)}")

    def _begin(self) -> None:
        """Nothing runs, and nothing of the sequence before is left."""
        for vmid in self.place.running():
            self.place.sim.control("crash", vmid=vmid)
        self._quiet()
        if self.place.leases():  # of a hook that was killed when its VM had ended
            self.place.call([*self.place.guard, "watch"])
        self.place.sim.control("starts")

    def _quiet(self) -> None:
        """No task runs and no lock is held."""
        root = _guard_pve.Tree(self.place.top)
        ends = time.monotonic() + HANG_S
        while True:
            held = [vmid for vmid in VMIDS if _guard_pve.lock_holder(root, _guard_pve.lock_path(vmid)) is not None]
            if not held and _guard_pve.lock_holder(root, LOCK) is None and not self.place.busy():
                return
            if time.monotonic() > ends:
                raise Broken(f"locks of {held} or the guard's are held for ever")
            time.sleep(0.05)  # a lock's end is told to nobody

    def _rest(self) -> None:
        self._quiet()
        with self.place.watched() as line:
            self._look(line)
        good, text = self.place.call([*self.place.guard, "watch"])
        if not good:
            self.broken.append(f"at rest the watchdog finds: {text}")
        running = set(self.place.running())
        if self.place.leases() != running:
            self.broken.append(f"leases of {sorted(self.place.leases())}, and {sorted(running)} run")


@dataclass
class Account:
    """What became of sequences. ``failure``: what broke first, with its number."""

    sequences: int = 0
    done: Counter[str] = field(default_factory=Counter)
    failure: str | None = None


def storm(seed: int, numbers: Iterable[int], kills: bool, *, forked: bool = False, minutes: float = 1e9) -> Account:
    """Play sequences on one node, up to the first that breaks; none is begun after so many minutes."""
    told, ends = Account(), time.monotonic() + 60 * minutes
    with Place(forked=forked) as place:
        for number in numbers:
            if time.monotonic() > ends:
                break
            each = Storm(place, Random(f"{seed}:{number}"), kills)
            try:
                each.run()
            except Broken as error:
                told.failure = f"sequence {number}: {error}"
                break
            finally:
                told.sequences += 1
                told.done.update(each.done)
            if told.sequences % 10 == 0:
                print(f"  {number}: {told.sequences} sequences, {told.done['starts']} starts", file=sys.stderr)
    return told
