# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Collects the checks of ``organism-validate``; ``organism.core._check`` has the schema of their records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from organism.cli._output import Output, clean
from organism.core import _check
from organism.core._check import Check


@dataclass
class Outcome:
    """What a check found; filled in by the block of :meth:`Report.check`."""

    ok: bool | None = None
    detail: str = ""
    next: str = ""

    def passed(self, detail: str) -> None:
        self.ok, self.detail, self.next = True, detail, ""

    def failed(self, detail: str, next: str) -> None:
        self.ok, self.detail, self.next = False, detail, next

    def skipped(self, detail: str) -> None:
        self.ok, self.detail, self.next = None, detail, ""


class Report:
    """Collects checks, and says each to people as it comes."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.checks: list[Check] = []

    @contextmanager
    def check(self, check: str, subject: str = "") -> Iterator[Outcome]:
        """Time one check; a block that says nothing is a FAIL, so that no check passes by being empty."""
        outcome = Outcome(ok=False, detail="the check came to no verdict", next="this is a defect: please report it")
        started = time.monotonic()
        yield outcome
        self.add(Check(check, subject, outcome.ok, time.monotonic() - started, outcome.detail, outcome.next))

    def skip(self, check: str, subject: str, why: str) -> None:
        self.add(Check(check, subject, None, 0.0, why))

    def add(self, found: Check) -> None:
        self.checks.append(found)
        output = self.output
        name = f"{found.check} {found.subject}".rstrip()
        output.say(f"{output.paint(found.verdict)}  {name:<28}  {found.seconds:6.2f} s  {clean(found.detail)}")
        if found.next:
            output.say(f"      next: {clean(found.next)}")

    def count(self, ok: bool | None) -> int:
        return _check.count(self.checks, ok)

    @property
    def ok(self) -> bool:
        return _check.passed(self.checks)

    def as_dict(self) -> dict[str, Any]:
        return _check.as_dict(self.checks)

    def close(self) -> None:
        """The sum: a line for people, the whole report for programs."""
        if self.output.as_json:
            self.output.json(**self.as_dict())
        else:
            verdict = self.output.paint("PASS" if self.ok else "FAIL")
            self.output.say(
                f"{verdict}  {self.count(True)} passed, {self.count(False)} failed, {self.count(None)} skipped"
            )
