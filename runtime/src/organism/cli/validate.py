# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-validate``: level 9, the pool from end to end. Ends with 0 only when nothing failed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from organism._version import VERSION
from organism.cli._checks import Report
from organism.cli._output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, Output
from organism.cli._parser import Parser, not_negative, positive
from organism.cli._validation import Validation
from organism.client import AsyncMaestro, MaestroError
from organism.core import _bus

PROGRAM = "organism-validate"

EXAMPLES = """\
examples:
  organism-validate                          every GPU that the conductor knows
  organism-validate --gpus gpu0,gpu1         these must be there
  organism-validate --json                   one JSON object with a record a check

exit codes: 0 nothing failed, 1 something failed, 2 usage, 130 interrupted
"""


def gpu_ids(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not _bus.is_identifier(name):
            raise argparse.ArgumentTypeError(f"{name!r} is no GPU id: it must match {_bus.IDENTIFIER.pattern}")
    if not names:
        raise argparse.ArgumentTypeError("must name at least one GPU")
    return list(dict.fromkeys(names))


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Check the pool from end to end: bus, conductor, every GPU, and that jobs run, fail, time out and "
        "can be cancelled. Submits small jobs with a high priority, and leaves none behind.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", metavar="ID,ID", type=gpu_ids, default=[], help="the GPUs that must be there")
    parser.add_argument(
        "--timeout", dest="job_limit", metavar="S", type=positive, default=20.0, help="seconds for a job (default 20)"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--context", metavar="FILE", help="read this client.toml alone")
    parser.add_argument("--shard", metavar="NAME", help="the share of the queue to prove, where a pool has several")
    parser.add_argument(
        "--patience",
        metavar="S",
        type=not_negative,
        default=10.0,
        help="seconds to wait for a bus or conductor that is away (default 10)",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    Parser.wants_json = "--json" in words
    arguments = build_parser().parse_args(words)
    logging.basicConfig(level=logging.CRITICAL, format="%(message)s", stream=sys.stderr)
    output = Output(arguments.as_json)
    report = Report(output)
    try:
        asyncio.run(_validate(arguments, report))
    except MaestroError as error:
        if error.code == "settings":
            output.fail(PROGRAM, error.code, str(error))
            return EXIT_USAGE
        with report.check("bus" if not report.checks else "validation") as found:
            found.failed(str(error), "see the message; the checks after this one were not made")
    except KeyboardInterrupt:
        output.fail(PROGRAM, "interrupted", "interrupted; `maestroctl list` shows whether a job is left")
        return EXIT_INTERRUPTED
    report.close()
    return EXIT_OK if report.ok else EXIT_FAILED


async def _validate(arguments: argparse.Namespace, report: Report) -> None:
    async with AsyncMaestro(context=arguments.context, shard=arguments.shard, patience=arguments.patience) as maestro:
        await Validation(maestro, report, limit=arguments.job_limit, gpus=arguments.gpus).run()


if __name__ == "__main__":
    sys.exit(main())
