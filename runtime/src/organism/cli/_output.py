# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the command lines print: tables and colour for people, one JSON object for programs, progress on stderr."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TextIO

import msgspec

from organism.client import (
    BusUnreachableError,
    ConductorUnreachableError,
    InvalidJobError,
    MaestroError,
    PayloadTooLargeError,
    RequestError,
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

COLOURS = {
    "done": "32",
    "failed": "31",
    "dead": "31",
    "cancelled": "33",
    "retry": "33",
    "running": "36",
    "scheduled": "36",
    "idle": "32",
    "busy": "36",
    "hot": "33",
    "stale": "33",
    "drained": "35",
    "PASS": "32",
    "FAIL": "31",
    "SKIP": "33",
}
TELL_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal to rewrite one on."""


def exit_code(error: MaestroError) -> int:
    """2 when the caller has to write something else, 3 when nobody was there, 1 otherwise."""
    if isinstance(error, BusUnreachableError | ConductorUnreachableError):
        return EXIT_UNREACHABLE
    if isinstance(error, InvalidJobError) and not isinstance(error, PayloadTooLargeError):
        return EXIT_USAGE
    if error.code == "settings" or (isinstance(error, RequestError) and error.code == "bad_request"):
        return EXIT_USAGE
    return EXIT_FAILED


def plain(value: Any) -> Any:
    """Structs as dictionaries with all their fields, whether default or not: programs get stable keys."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def clean(text: str) -> str:
    """Text of somebody's job fit for a table: control characters could rewrite the operator's terminal."""
    return "".join(" " if char in "\t\r\n" else char if unicodedata.category(char)[0] != "C" else "?" for char in text)


def colour_wanted(stream: TextIO) -> bool:
    """Only on a terminal that can, and not against https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Output:
    """Where one command's answer goes. With ``as_json`` stdout gets exactly one JSON object."""

    def __init__(self, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.colour = not as_json and colour_wanted(self.stdout)

    def json(self, **fields: Any) -> None:
        print(json.dumps(plain(fields), ensure_ascii=False), file=self.stdout, flush=True)

    def answer(self, *, ok: bool = True, lines: Iterable[str] = (), **fields: Any) -> None:
        """The whole answer: ``fields`` for programs, ``lines`` for people."""
        if self.as_json:
            self.json(ok=ok, **fields)
            return
        for line in lines:
            self.say(line)

    def say(self, line: str) -> None:
        if not self.as_json:
            print(line, file=self.stdout, flush=True)

    def write(self, text: str) -> None:
        """A piece of a job's own output, as it is."""
        if not self.as_json:
            self.stdout.write(text)
            self.stdout.flush()

    def note(self, line: str) -> None:
        """For people who look at the terminal; programs and pipes do not get it."""
        print(line, file=self.stderr, flush=True)

    def hint(self, line: str) -> None:
        """A word of help, only when a person is there to read it."""
        if not self.as_json and self.stdout.isatty():
            self.note(line)

    def fail(self, program: str, code: str, message: str) -> None:
        if self.as_json:
            self.json(ok=False, error={"code": code, "message": message})
        else:
            self.note(f"{program}: {clean(message)}")

    def fail_each(self, code: str, problems: Sequence[str]) -> None:
        """Several things are wrong, each with its own place in front."""
        if self.as_json:
            self.json(ok=False, error={"code": code, "message": "; ".join(problems), "problems": list(problems)})
        for problem in problems if not self.as_json else ():
            self.note(clean(problem))

    def paint(self, word: str, text: str | None = None) -> str:
        shown = word if text is None else text
        return f"\x1b[{COLOURS[word]}m{shown}\x1b[0m" if self.colour and word in COLOURS else shown

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
        """Aligned columns, two blanks apart; a cell that is a word of state gets its colour."""
        cells = [[clean("" if cell is None else str(cell)) or "-" for cell in row] for row in rows]
        widths = [max(len(row[column]) for row in [list(heads), *cells]) for column in range(len(heads))]
        lines = ["  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip()]
        for row in cells:
            padded = [self.paint(cell, cell.ljust(width)) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        return lines

    @asynccontextmanager
    async def progress(self, text: Callable[[], str]) -> AsyncIterator[None]:
        """Tells on stderr what is waited for, while the context lasts: rewritten on a terminal, else now and then."""
        live = self.stderr.isatty() and not self.as_json
        started = time.monotonic()

        async def tell() -> None:
            while True:
                await asyncio.sleep(1.0 if live else TELL_EVERY)
                line = f"{clean(text())} ({time.monotonic() - started:.0f} s)"
                if live:
                    width = os.get_terminal_size(self.stderr.fileno()).columns or 80
                    print(f"\r\x1b[K{line[: width - 1]}", end="", file=self.stderr, flush=True)
                elif not self.as_json:
                    self.note(line)

        task = asyncio.create_task(tell())
        try:
            yield
        finally:
            task.cancel()
            if live:
                print("\r\x1b[K", end="", file=self.stderr, flush=True)


def stamp(text: str | None) -> str:
    """A UTC time of the bus, shortened for a column."""
    return text[:19].replace("T", " ") if text else ""


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
