# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-audit``: is what was set up on this host in force, now and after a boot? Changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys

from organism.core import _check, _host_audit
from organism.core._check import Check
from organism.core._host_audit_parts import judges
from organism.core._root import Root

COLOURS = {"PASS": "32", "FAIL": "31", "SKIP": "33"}


def _lines(found: Check) -> str:
    verdict = found.verdict
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        verdict = f"\x1b[{COLOURS[verdict]}m{verdict}\x1b[0m"
    line = f"{verdict}  {f'{found.check} {found.subject}'.rstrip():<36}  {found.detail}\n"
    return line + (f"      next: {found.next}\n" if found.next else "")


def main(argv: list[str] | None = None) -> int:
    """0: nothing failed, 1: something failed or could not be read, 2: usage."""
    parser = argparse.ArgumentParser(
        prog="organism-audit",
        description="Say what of this host's tuning is in force now and will be after a boot, and what is missing. "
        "Looks at what the levels have recorded, and changes nothing. Needs root.",
        epilog="exit codes: 0 nothing failed, 1 something failed, 2 usage",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, keys as of organism-validate")
    parser.add_argument("--root", metavar="DIR", default="/", help="look at the tree in DIR instead of this machine")
    options = parser.parse_args(argv)
    try:
        checks = _host_audit.audit(_host_audit.Host(Root(options.root)), judges())
    except _host_audit.AuditError as error:
        sys.stderr.write(f"organism-audit: {error}\n")
        return 1
    good = _check.passed(checks)
    if options.json:
        sys.stdout.write(json.dumps(_check.as_dict(checks)) + "\n")
    else:
        sys.stdout.write("".join(_lines(found) for found in checks))
        sys.stdout.write(f"{'PASS' if good else 'FAIL'}  {_host_audit.summary(checks)}\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
