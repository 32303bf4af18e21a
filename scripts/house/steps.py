# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbered steps with elapsed seconds; details go to a log, whose tail is shown when a step fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 25
QUIET_TICK = 20.0  # seconds between signs of life when the output is not a terminal


class StepFailed(Exception):
    """A step's command ended non-zero; its text is what the operator needs to see."""


class Steps:
    """Prints to stderr, so that stdout stays the verb's own."""

    def __init__(self, total: int, log: Path) -> None:
        self.total = total
        self.number = 0
        self.log = log
        self.tty = sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, title: str) -> None:
        self.number += 1
        self.title = f"[{self.number}/{self.total}] {title}"
        self.started = time.monotonic()
        self.say(self.title + " ...")

    def done(self, note: str = "") -> None:
        self._clear()
        seconds = time.monotonic() - self.started
        self.say(f"      done in {seconds:.0f} s{'; ' + note if note else ''}")

    def run(self, command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path | None = None) -> None:
        """Run `command` with its output in the log; raise StepFailed with the log's tail unless it ends 0."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in command]
        with self.log.open("ab") as sink:
            sink.write(f"\n$ {' '.join(words)}\n".encode())
            sink.flush()
            start = sink.tell()
            with subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd
            ) as process:
                self._wait(process)
        if process.returncode != 0:
            text = self.log.read_bytes()[start:].decode(errors="replace").splitlines()
            tail = "\n".join("      | " + line for line in text[-TAIL_LINES:])
            raise StepFailed(
                f"{self.title}: failed (exit {process.returncode}): {' '.join(words)}\n{tail}\n"
                f"      whole log: {self.log}"
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            while True:
                try:
                    process.wait(timeout=1.0 if self.tty else QUIET_TICK)
                except subprocess.TimeoutExpired:
                    self._tick()
                else:
                    return
        except KeyboardInterrupt:
            # the terminal sent the same signal to the child; what it leaves behind is rebuilt by the next run
            process.terminate()
            process.wait()
            raise

    def _tick(self) -> None:
        seconds = time.monotonic() - self.started
        if self.tty:
            print(f"\r      {seconds:.0f} s", end="", file=sys.stderr, flush=True)
        else:
            self.say(f"      still at it, {seconds:.0f} s")

    def _clear(self) -> None:
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
