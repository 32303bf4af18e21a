# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator sees: one console, lines with elapsed time, a spinner where there is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

# rich itself leaves colour out when the output is no terminal or NO_COLOR is set; a log gets lines of a useful width.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 132)
_STARTED = time.monotonic()


def elapsed() -> str:
    """Seconds since the command started, as ``"  12.3s"``."""
    return f"{time.monotonic() - _STARTED:6.1f}s"


def say(message: str) -> None:
    """One line of progress, with the time since the start."""
    console.print(f"[dim]{elapsed()}[/]  {message}")


def chapter(title: str) -> None:
    """A heading between two parts of the story."""
    console.print()
    console.rule(f"[bold]{title}[/]", align="left")


@contextmanager
def step(doing: str, done: str) -> Iterator[None]:
    """Say what starts (with a spinner on a terminal) and, when it ended well, how long it took."""
    began = time.monotonic()
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        say(f"{doing} ...")
        yield
    say(f"[green]ok[/] {done} [dim]({time.monotonic() - began:.1f} s)[/]")
