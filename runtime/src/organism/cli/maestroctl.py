# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``maestroctl``: the users' and operators' command line. docs/maestroctl.md tells of each operation."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence

from organism.cli import _insight, _jobs, _pool
from organism.cli._output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Output, exit_code
from organism.cli._parser import PROGRAM, build_parser, parse
from organism.client import AsyncMaestro, JobFileError, MaestroError

Operation = Callable[[AsyncMaestro, argparse.Namespace, Output], Awaitable[int]]

OPERATIONS: dict[str, Operation] = {
    "submit": _jobs.submit,
    "status": _jobs.status,
    "list": _jobs.listing,
    "watch": _jobs.watch,
    "wait": _jobs.wait,
    "result": _jobs.result,
    "tail-state": _jobs.tail_state,
    "logs": _jobs.logs,
    "cancel": _jobs.cancel,
    "explain": _insight.explain,
    "history": _insight.history,
    "top": _pool.top,
    "drain": _pool.drain,
    "undrain": _pool.drain,
    "pause": _pool.pause,
    "resume": _pool.pause,
    "dead": _pool.dead,
    "info": _pool.info,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; see ``maestroctl --help`` for their meaning."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    output = Output(arguments.as_json)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.CRITICAL, format="%(message)s", stream=sys.stderr
    )
    if arguments.operation == "completion":
        return _completion(arguments.shell_name, output)
    try:
        if arguments.operation == "submit" and arguments.dry_run:
            return _jobs.dry_run(arguments, output)
        return asyncio.run(_connected(arguments, output))
    except JobFileError as error:
        output.fail_each(error.code, error.problems)
        return exit_code(error)
    except MaestroError as error:
        output.fail(PROGRAM, error.code, str(error))
        return exit_code(error)
    except KeyboardInterrupt:
        if arguments.operation == "top":
            return EXIT_OK  # that is how one leaves it
        output.fail(PROGRAM, "interrupted", _interrupted(arguments))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has seen enough; keep the interpreter from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


async def _connected(arguments: argparse.Namespace, output: Output) -> int:
    listen = arguments.operation != "submit" or arguments.wait
    async with AsyncMaestro(
        context=arguments.context, shard=arguments.shard, patience=arguments.patience, listen=listen
    ) as maestro:
        return await OPERATIONS[arguments.operation](maestro, arguments, output)


def _interrupted(arguments: argparse.Namespace) -> str:
    """What Ctrl-C leaves behind: submissions have happened, and a job does not depend on who watches it."""
    ids = list(getattr(arguments, "task_ids", None) or [])
    single = getattr(arguments, "task_id", None)
    if single:
        ids.append(single)
    if arguments.operation in ("submit", "watch", "wait", "logs", "tail-state") and ids:
        name = ids[0] if len(ids) == 1 else f"{ids[0]} (and {len(ids) - 1} more)"
        return (
            f"interrupted; {name} goes on once accepted. Look with `{PROGRAM} status {ids[0]}`,"
            f" stop it with `{PROGRAM} cancel {ids[0]}`"
        )
    return "interrupted"


def _completion(shell: str, output: Output) -> int:
    try:
        import shtab
    except ImportError:
        output.fail(
            PROGRAM, "missing", "shell completion needs the package shtab (`pip install 'organism[completion]'`)"
        )
        return EXIT_FAILED
    script = shtab.complete(build_parser(), shell=shell)
    if output.as_json:
        output.json(ok=True, script=script)
    else:
        output.write(script + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
