# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The processes of a pool, each of which starts again by itself, as under systemd, unless it is being held down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from chaos.jobs.trouble import Stuck

HANG = 60.0
"""Seconds after which a part that does not end is given up on."""


class Part:
    """``words`` are made anew at each start. ``inside`` puts them into the part's network."""

    def __init__(
        self, name: str, words: Callable[[], list[str]], log: Path, *, inside: list[str], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.words = words
        self.log = log
        self.inside = inside
        self.env = {**os.environ, **env}
        self.process: subprocess.Popen[bytes] | None = None
        self.held = True
        """Not to be started again by :meth:`watch`."""
        self.frozen = False
        self.over = False
        """It has done what it had to do (the submitter)."""
        self.starts = 0

    def start(self) -> None:
        """In a session of its own, killed with the suite."""
        self.held = False
        self.starts += 1
        words = [*self.inside, "setpriv", "--pdeathsig", "KILL", "--", *self.words()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def watch(self) -> int | None:
        """Start it again when it has ended by itself; its exit status then."""
        if self.held or self.over or self.process is None:
            return None
        status = self.process.poll()
        if status is not None:
            self.start()
        return status

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; it stays down until :meth:`start`."""
        self.held = True
        self.send(signal.SIGKILL)
        self.reap()

    def terminate(self) -> None:
        """SIGTERM and wait; it stays down until :meth:`start`."""
        self.held = True
        self.send(signal.SIGTERM)
        self.reap()

    def freeze(self) -> None:
        self.frozen = True
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.frozen = False
        self.send(signal.SIGCONT)

    def reap(self) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(HANG)
            raise Stuck(f"{self.name} did not end within {HANG:g} s; see {self.log}") from None


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def write_settings(path: Path, values: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
    return path


FAKETIME = tuple(f"/usr/lib/{kind}-linux-gnu/faketime/libfaketime.so.1" for kind in ("x86_64", "aarch64"))


class Clock:
    """A part's wall clock, which can be stepped while it runs; its monotonic clock goes on undisturbed.

    By libfaketime, which answers the C library's questions about the time: Python asks there. The static nats-server
    does not, so its clock is never stepped.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.step(0.0)

    @staticmethod
    def library() -> str | None:
        return next((path for path in FAKETIME if Path(path).exists()), None)

    def step(self, seconds: float) -> None:
        """From now on the wall clock is so many seconds ahead of the true one."""
        new = self.place.with_suffix(".new")
        new.write_text(f"{seconds:+.3f}\n")
        new.replace(self.place)

    def env(self) -> dict[str, str]:
        library = self.library()
        if library is None:
            return {}
        return {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self.place),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_CACHE_DURATION": "1",
            "NO_FAKE_STAT": "1",
        }


def wait_for(what: Callable[[], object], name: str, *, hang: float = HANG) -> None:
    """Until it is true. Raises Stuck."""
    deadline = time.monotonic() + hang
    while not what():
        if time.monotonic() > deadline:
            raise Stuck(f"{name}: not within {hang:g} s")
        time.sleep(0.02)  # whoever changes it tells nobody
