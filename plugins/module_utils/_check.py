# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A check's record: the one schema of ``organism-validate`` (does it work?) and ``organism-audit`` (is it in effect?).

A record is a JSON object with these keys, all always there:

=========  ============================================================================================
check      what was looked at, a dotted word that stays the same over versions (``gpu.job``)
subject    on which object (``gpu0``, ``ORG_WQ``); empty when there is only one
ok         true: PASS, false: FAIL, null: SKIP (could not or need not be looked at; ``detail`` says why)
seconds    how long it took
detail     what was found, one sentence
next       what to do about it; empty unless FAIL
=========  ============================================================================================

A report is ``{"ok": bool, "passed": n, "failed": n, "skipped": n, "checks": [record, ...]}``; ``ok`` means that
nothing failed and something passed.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    check: str
    subject: str
    ok: bool | None
    seconds: float
    detail: str
    next: str = ""

    @property
    def verdict(self) -> str:
        return "SKIP" if self.ok is None else "PASS" if self.ok else "FAIL"


def count(checks: Sequence[Check], ok: bool | None) -> int:
    return sum(1 for found in checks if found.ok is ok)


def passed(checks: Sequence[Check]) -> bool:
    """Nothing failed and something passed."""
    return count(checks, False) == 0 and count(checks, True) > 0


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """The whole report."""
    return {
        "ok": passed(checks),
        "passed": count(checks, True),
        "failed": count(checks, False),
        "skipped": count(checks, None),
        "checks": [{**asdict(found), "seconds": round(found.seconds, 3)} for found in checks],
    }
