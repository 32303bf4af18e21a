# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-bus watch``: restarts a nats-server that a full disk has stopped, once there is room again, and says so.

nats-server gives a stream up at its first failed write and stores nothing more in it until it is restarted, however
much space there is by then: publishers see no answer, its process lives on, and systemd sees no reason to act (measured
with 2.15.1; its /healthz then answers 503 with the write error). Nothing is acknowledged meanwhile, so nothing is lost
but time.

Asked to end in that state it may never do so (seen with 2.15.1: the signal was taken, the process lived on, and so did
the complaint of its /healthz). So it is killed, and systemd starts it anew: it has nothing left to write, and what it
had acknowledged is on the disk.

At its start nats-server tries its store with an empty directory ``_test_<number>``. Killed in that moment it leaves it
behind, and takes it for an account that it cannot find: /healthz then says that, and nothing else any more, not even a
write error. The watch removes it.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

log = logging.getLogger("organism-bus")

TEST_BYTES = 1024 * 1024
"""What must be writable and synced before the server is restarted: more than a first block of each of its streams."""
TEST_FILE = ".organism-write-test"
LOW_BYTES = 64 * 1024 * 1024
"""Less free space than this is told before it is too late."""
SPACING = 20.0
"""Seconds between two restarts: a server that reads large streams needs its time."""
REMIND = 60.0
"""Seconds between two lines about the same trouble."""
ANSWER_WITHIN = 3.0
RESTART = ("systemctl", "kill", "--signal=KILL", "nats-server.service")
"""Its unit has ``Restart=always``."""
RESTART_WITHIN = 120.0
_WRITE_TROUBLE = ("write error", "no space left", "insufficient storage", "jetstream disabled", "jetstream not enabled")

_LEFTOVER = re.compile(r"JetStream account '(_test_\d+)' could not be resolved")

Act = Literal["nothing", "say", "restart"]


@dataclass(frozen=True)
class Look:
    """What one look has found. ``health``: empty when all is well, None when there is no answer; else its words.

    ``disk``: why a test write failed, empty when it did not, None when none was made. ``free`` in bytes.
    """

    health: str | None
    free: int
    disk: str | None = None

    @property
    def stopped(self) -> bool:
        """The server has given up writing: it needs a restart and will not get well by itself."""
        return bool(self.health) and any(words in str(self.health).lower() for words in _WRITE_TROUBLE)


@dataclass
class Judge:
    """Decides from look to look. No I/O and no clock: ``now`` in seconds."""

    store: str
    restarted: float = float("-inf")
    _said: dict[str, float] = field(default_factory=dict)
    _stopped: bool = False

    def judge(self, look: Look, now: float) -> tuple[Act, str]:
        """What to do, and the sentence for it."""
        if not look.stopped:
            return self._well(look, now)
        self._stopped = True
        if look.disk:
            return self._once("full", now, (
                f"nats-server has stopped storing ({look.health}), and {self.store} takes no write yet: {look.disk};"
                f" {look.free // 2**20} MiB are free. No job is accepted until there is room; then it is restarted"
            ))  # fmt: skip
        if now - self.restarted < SPACING:
            return "nothing", ""
        self.restarted = now
        return "restart", (
            f"nats-server has stopped storing ({look.health}), and {self.store} has room again"
            f" ({look.free // 2**20} MiB free): it is restarted"
        )

    def _well(self, look: Look, now: float) -> tuple[Act, str]:
        if self._stopped and look.health == "":
            self._stopped = False
            self._said.clear()
            return "say", "nats-server stores again"
        if look.free < LOW_BYTES:
            return self._once("low", now, (
                f"only {look.free // 2**20} MiB are free where {self.store} lies: nats-server stops at the first write"
                f" that fails; free some space"
            ))  # fmt: skip
        return "nothing", ""

    def _once(self, what: str, now: float, text: str) -> tuple[Act, str]:
        if now - self._said.get(what, float("-inf")) < REMIND:
            return "nothing", ""
        self._said[what] = now
        return "say", text


def health(url: str) -> str | None:
    """Empty when the server is well, its own words when it is not, None when it does not answer."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port or 80, timeout=ANSWER_WITHIN)
    try:
        connection.request("GET", place.path or "/")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.OK:
        return ""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return f"{answer.status} {answer.reason}"


def test_write(store: Path) -> str:
    """Write and sync a file beside the streams and remove it; why that failed, or nothing."""
    place = store / TEST_FILE
    try:
        descriptor = os.open(place, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            left = memoryview(os.urandom(TEST_BYTES))  # a file system that compresses must not find it easy
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            place.unlink(missing_ok=True)
    except OSError as problem:
        return problem.strerror or str(problem)
    return ""


def look(store: Path, url: str) -> Look:
    """Ask the server; touch the disk only when it complains. Raises OSError when there is no store."""
    said = health(url)
    while said and remove_leftover(store, said):
        said = health(url)
    disk = test_write(store) if Look(said, 0).stopped else None
    found = os.statvfs(store)  # after the test: both speak of the same moment, or the later one is better
    return Look(said, found.f_bavail * found.f_frsize, disk)


def remove_leftover(store: Path, said: str) -> bool:
    """Whether the server complained of its own test directory and that was removed. Raises OSError when it stays."""
    found = _LEFTOVER.search(said)
    if found is None:
        return False
    place = store / "jetstream" / found[1]
    try:
        place.rmdir()
    except FileNotFoundError:
        return False  # the server has been quicker, or has its store elsewhere
    log.warning("%s is removed: nats-server was killed while it started, and took it for an account", place)
    return True


def watch(
    store: Path, url: str, restart: Sequence[str], *, every: float, stop: threading.Event,
    look: Callable[[Path, str], Look] = look,
) -> None:  # fmt: skip
    """Until ``stop``. A restart that fails is told and tried again."""
    judge = Judge(str(store))
    while not stop.wait(every):
        try:
            act, text = judge.judge(look(store, url), time.monotonic())
        except OSError as problem:
            log.warning("%s cannot be looked at: %s", store, problem.strerror or problem)
            continue
        if text:
            log.warning("%s", text)
        if act == "restart":
            _restart(restart)


def _restart(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=RESTART_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        log.error("nats-server could not be restarted: %s", problem)
        return
    if done.returncode != 0:
        log.error("nats-server could not be restarted: %s ended with %d: %s", words[0], done.returncode,
                  done.stderr.strip()[-300:])  # fmt: skip
