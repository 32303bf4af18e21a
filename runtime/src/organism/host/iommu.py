# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-iommu``: can this host give its cards to virtual machines, and what shares a group? Changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys

from organism.core import _iommu_preflight as preflight
from organism.core._preflight import Record, table
from organism.core._root import Root

COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def _coloured(record: Record, line: str) -> str:
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\x1b[{COLOURS[record.status]}m{line[:4]}\x1b[0m{line[4:]}"
    return line


def _text(report: preflight.Report, *, groups: bool) -> str:
    lines = [_coloured(record, line) for record, line in zip(report.records, table(report.records), strict=True)]
    lines += ["", *preflight.card_lines(report.cards)]
    lines += [f"  {card.address}: {reason}" for card in report.cards for reason in card.reasons]
    if any(card.beside for card in report.cards):
        lines += ["", preflight.ACS_EXPLAINED]
    if groups:
        lines += ["", "group and members", *preflight.group_lines(report.groups)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """0: cards can be given away, 1: something of the host stands against it, 2: usage."""
    parser = argparse.ArgumentParser(
        prog="organism-iommu",
        description="Say whether this host can give its cards to virtual machines: firmware, kernel, IOMMU groups, and "
        "what each card shares its group with. Changes nothing.",
        epilog="exit codes: 0 cards can be given away, 1 something stands against it, 2 usage",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, as the module iommu_preflight has it"
    )
    parser.add_argument("--groups", action="store_true", help="list all groups with their members, too")
    parser.add_argument("--root", metavar="DIR", default="/", help="look at the tree in DIR instead of this machine")
    options = parser.parse_args(argv)
    report = preflight.report(Root(options.root))
    sys.stdout.write(json.dumps(report.as_dict()) + "\n" if options.json else _text(report, groups=options.groups))
    return 0 if report.ready else 1


if __name__ == "__main__":
    raise SystemExit(main())
