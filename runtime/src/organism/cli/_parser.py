# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The grammar of ``maestroctl``. Each option has a name of its own in the namespace: none can overwrite another.

A job's command is what follows ``--``; it is split off before argparse sees the line, so its options stay its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from organism._version import VERSION
from organism.bus.messages import FINAL_STATES, State
from organism.bus.rpc_types import LIST_LIMIT
from organism.cli._output import EXIT_USAGE, Output

PROGRAM = "maestroctl"

EXAMPLES = """\
examples:
  maestroctl submit -- python3 train.py --epochs 3      run a command; prints the job's id
  maestroctl submit --gpu gpu0 --timeout 600 --wait -- ./bench
  maestroctl list                                       your unfinished jobs
  maestroctl watch job-01jd...                          its states, then its result
  maestroctl logs -f job-01jd...                        its output while it runs
  maestroctl top                                        GPUs, live

exit codes: 0 ok, 1 failed (or the job did not end well, or is not found), 2 usage, 3 bus or conductor unreachable,
130 interrupted (the job goes on)
"""

SUBMIT_EXAMPLES = """\
examples:
  maestroctl submit -- nvidia-smi -L
  maestroctl submit --retries 0 --timeout 30 --env SEED=7 --label run=a1 -- python3 train.py
  maestroctl submit --gpu gpu3 --priority 10 --wait -- ./render frame.blend
  maestroctl submit --shell 'make && ./bench > out.txt'  (where the site's policy allows shell jobs)
  maestroctl submit --python train.py --wait -- --lr 0.1 (the program travels with the job)
  maestroctl submit --type noop --wait                   (measures the way there and back)
  printf '%s\\n' '{"cmd": ["./a"]}' '{"cmd": ["./b"], "priority": 5}' | maestroctl submit --jsonl -

The id is printed once the job is on the bus's disk. Submitting again under the same --task-id is safe.
"""


FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
"""What shtab is to complete file names with."""


class Parser(argparse.ArgumentParser):
    """Says usage errors in JSON too when JSON is wanted."""

    wants_json = False

    def error(self, message: str) -> NoReturn:
        if Parser.wants_json:
            Output(as_json=True).json(ok=False, error={"code": "usage", "message": message})
            raise SystemExit(EXIT_USAGE)
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def positive(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text!r}")
    return value


def not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, not {text!r}") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be a finite number of seconds, not {text!r}")
    return value


def assignment(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"must look like KEY=VALUE, not {text!r}")
    return key, value


AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def age(text: str) -> float:
    """Seconds of a text such as 90s, 2h or 7d."""
    number, unit = text[:-1], text[-1:]
    if unit not in AGES or not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"must be a number with a unit (s, m, h, d, w), such as 2h, not {text!r}")
    return float(int(number) * AGES[unit])


def limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LIST_LIMIT:
        raise argparse.ArgumentTypeError(f"must be 1 to {LIST_LIMIT}, not {text!r}")
    return int(text)


def _common(*, top: bool) -> Parser:
    """The options that may stand before and after the operation."""

    def default(value: object) -> object:
        # after the operation they must not undo what stood before it
        return value if top else argparse.SUPPRESS

    common = Parser(add_help=False)
    group = common.add_argument_group("everywhere")
    group.add_argument(
        "--json", dest="as_json", action="store_true", default=default(False), help="one JSON object on stdout"
    )
    group.add_argument(
        "--context", dest="context", metavar="FILE", default=default(None), help="read this client.toml alone"
    )
    group.add_argument(
        "--shard",
        dest="shard",
        metavar="NAME",
        default=default(None),
        help="the share of the queue to work with, where a pool has several (default: as set up, else 0)",
    )
    group.add_argument(
        "--patience",
        dest="patience",
        metavar="S",
        type=not_negative,
        default=default(10.0),
        help="seconds to wait for a bus or conductor that is away (default 10)",
    )
    group.add_argument(
        "--verbose", dest="verbose", action="store_true", default=default(False), help="tell of the connection too"
    )
    return common


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Submit jobs to the GPU pool, watch them, and steer the pool.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(top=True)],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {VERSION}")
    operations = parser.add_subparsers(dest="operation", metavar="OPERATION", required=True, parser_class=Parser)

    def add(name: str, text: str, **extra: Any) -> Parser:
        added: Parser = operations.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[_common(top=False)],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **extra,
        )
        return added

    _add_submit(add("submit", "submit a job, or many; prints the id", epilog=SUBMIT_EXAMPLES))
    _add_task(add("status", "show a job as it is now"))
    _add_list(add("list", "list jobs, the newest first: the unfinished ones, or all"))
    watch = add("watch", "follow jobs through their states, then print their results")
    _add_tasks(watch)
    _add_wait_timeout(watch)
    wait = add("wait", "wait for jobs to end, then tell how")
    _add_tasks(wait)
    _add_wait_timeout(wait)
    _add_task(add("result", "print the result of a finished job"))
    tail = add("tail-state", "print a job's states as they come (with --json one JSON object a line)")
    _add_task(tail)
    _add_wait_timeout(tail)
    _add_logs(add("logs", "print a job's output"))
    _add_task(add("explain", "tell why a job waits, or why it runs where it does"))
    _add_history(add("history", "list finished jobs, the newest first, or what happened to one"))
    _add_tasks(add("cancel", "cancel jobs, waiting or running"))
    top = add("top", "show GPUs, queue and conductor, live")
    top.add_argument("--once", dest="once", action="store_true", help="print once and end (also where no terminal is)")
    top.add_argument(
        "--interval", dest="interval", metavar="S", type=positive, default=1.0, help="seconds between looks (default 1)"
    )
    for name, text in (
        ("drain", "give a GPU no new jobs (operators)"),
        ("undrain", "give a GPU jobs again (operators)"),
    ):
        add(name, text).add_argument("gpu_id", metavar="GPU")
    for name, text in (
        ("pause", "start no job of a queue (operators)"),
        ("resume", "start a queue's jobs again (operators)"),
    ):
        add(name, text).add_argument("queue", metavar="QUEUE", nargs="?", default="default", help="default: default")
    _add_dead(add("dead", "look at what could not be run, and run it again"))
    add("info", "show what this site allows and promises")
    completion = add("completion", "print the completion script of a shell")
    completion.add_argument("shell_name", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")
    _complete_files(parser)
    return parser


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Options that name files complete them."""
    for action in parser._actions:
        if action.metavar == "FILE":
            action.complete = FILES  # type: ignore[attr-defined]  # shtab's convention
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                _complete_files(inner)


def _add_task(parser: Parser) -> None:
    parser.add_argument("task_id", metavar="ID")


def _add_tasks(parser: Parser) -> None:
    parser.add_argument("task_ids", metavar="ID", nargs="+")


def _add_wait_timeout(parser: Parser) -> None:
    parser.add_argument(
        "--timeout",
        dest="wait_timeout",
        metavar="S",
        type=positive,
        help="give up after so many seconds; the job goes on",
    )


def _add_submit(parser: Parser) -> None:
    parser.usage = (
        f"{PROGRAM} submit [options] -- COMMAND [ARGUMENT ...]\n"
        f"       {PROGRAM} submit [options] --python FILE [-- ARGUMENT ...]"
    )
    what = parser.add_argument_group("what to run (one of these)")
    what.add_argument("--shell", dest="shell_text", metavar="TEXT", help="a script for /bin/sh")
    what.add_argument(
        "--python",
        dest="script",
        metavar="FILE",
        help="a Python program, sent along with the job; its arguments stand after --; - for stdin",
    )
    what.add_argument(
        "--cmd",
        dest="legacy_command",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="the rest of the line is the command (better: -- COMMAND)",
    )
    what.add_argument("--jsonl", dest="jsonl", metavar="FILE", help="one job a line as a JSON object; - for stdin")
    what.add_argument(
        "-f", "--file", dest="job_file", metavar="FILE", help="the jobs of a YAML file (docs/jobfiles.md); - for stdin"
    )
    what.add_argument(
        "--type", dest="job_type", metavar="TYPE", help="cmd, shell, python, noop, or a type of this site"
    )
    what.add_argument("--args", dest="job_args", metavar="JSON", help="input, a JSON object: in the file ORGANISM_ARGS")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--gpu", dest="gpu_id", metavar="ID", help="only on this GPU")
    how.add_argument("--min-vram", dest="min_vram_mb", metavar="MB", type=int, help="only on a GPU with so much memory")
    how.add_argument("--gpus", dest="gpus", metavar="N", type=int, help="N GPUs of one host, all of them or none")
    how.add_argument(
        "--gpu-model", dest="gpu_model", metavar="TEXT", help="only on GPUs whose model has this in its name"
    )
    how.add_argument(
        "--input",
        dest="inputs",
        metavar="PATH",
        action="append",
        help="it reads this of the GPU's cache: a GPU that has it is preferred; may be repeated",
    )
    how.add_argument("--cwd", dest="cwd", metavar="DIR", help="below the job's own directory")
    how.add_argument("--timeout", dest="job_timeout", metavar="S", type=positive, help="seconds until it is stopped")
    how.add_argument("--retries", dest="max_retries", metavar="N", type=int, help="runs after a failed one, at most")
    how.add_argument("--priority", dest="priority", metavar="N", type=int, help="-100 to 100, higher goes first")
    how.add_argument("--delay", dest="delay", metavar="S", type=not_negative, help="not before so many seconds")
    how.add_argument(
        "--after",
        dest="after",
        metavar="ID[:WHEN]",
        action="append",
        help="when this job has ended: ok (the default), failed or any; may be repeated",
    )
    how.add_argument(
        "--deadline", dest="deadline", metavar="S", type=positive, help="fails if it has not ended S seconds from now"
    )
    how.add_argument("--unique", dest="unique", metavar="KEY", help="only one unfinished job of yours with this key")
    how.add_argument(
        "--queue", dest="queue", metavar="NAME", help="a queue that operators can pause (default: default)"
    )
    how.add_argument("--array", dest="array", metavar="N", type=int, help="N such jobs, ORGANISM_ARRAY_INDEX 0 to N-1")
    how.add_argument(
        "--env", dest="environment", metavar="K=V", type=assignment, action="append", help="may be repeated"
    )
    how.add_argument("--label", dest="labels", metavar="K=V", type=assignment, action="append", help="may be repeated")
    how.add_argument("--task-id", dest="task_id", metavar="ID", help="instead of a generated one")
    then = parser.add_argument_group("and then")
    then.add_argument("--dry-run", dest="dry_run", action="store_true", help="check and show, submit nothing")
    then.add_argument("--wait", dest="wait", action="store_true", help="wait for the result; exit 0 only when it is ok")
    then.add_argument(
        "--wait-timeout", dest="wait_timeout", metavar="S", type=positive, help="wait no longer; the job goes on"
    )
    parser.set_defaults(command=None)


def _add_list(parser: Parser) -> None:
    parser.add_argument(
        "--state", dest="state", choices=get_args(State), metavar="STATE", help=", ".join(get_args(State))
    )
    parser.add_argument("--user", dest="list_user", metavar="USER", help="of this user (operators)")
    parser.add_argument("--all", dest="list_all", action="store_true", help="finished ones too")
    parser.add_argument("--limit", dest="limit", metavar="N", type=limit, default=100, help="at most so many (100)")


def _add_logs(parser: Parser) -> None:
    _add_task(parser)
    parser.add_argument("-f", "--follow", dest="follow", action="store_true", help="until the job has ended")
    parser.add_argument("--stderr", dest="stderr", action="store_true", help="stderr instead of stdout")


def _add_history(parser: Parser) -> None:
    parser.add_argument("history_id", metavar="ID", nargs="?", help="all that happened to this job")
    parser.add_argument("--state", dest="state", choices=FINAL_STATES, metavar="STATE", help=", ".join(FINAL_STATES))
    parser.add_argument("--user", dest="list_user", metavar="USER", help="of this user (operators)")
    parser.add_argument("--all", dest="list_all", action="store_true", help="of all users (operators)")
    parser.add_argument("--label", dest="label", metavar="K=V", help="with this label")
    parser.add_argument("--since", dest="since", metavar="AGE", type=age, help="ended at most so long ago: 90s, 2h, 7d")
    parser.add_argument("--limit", dest="limit", metavar="N", type=limit, default=100, help="at most so many (100)")


def _add_dead(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="dead_operation", metavar="list|replay", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="dead letters, the newest first", parents=[_common(top=False)])
    listing.add_argument("--limit", dest="limit", metavar="N", type=limit, default=100, help="at most so many (100)")
    replay = actions.add_parser("replay", help="submit it again as a new job", parents=[_common(top=False)])
    which = replay.add_mutually_exclusive_group(required=True)
    which.add_argument("task_id", metavar="ID", nargs="?", help="of the dead job")
    which.add_argument("--seq", dest="seq", metavar="N", type=int, help="of the letter, as `dead list` shows it")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The namespace of a command line; ends the program with 2 when it makes no sense."""
    words = list(argv)
    command: list[str] | None = None
    if "submit" in words and "--" in words and words.index("submit") < words.index("--"):
        split = words.index("--")
        words, command = words[:split], words[split + 1 :]
    Parser.wants_json = "--json" in words
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.operation == "submit":
        _check_submit(parser, arguments, command)
    return arguments


def _check_submit(parser: Parser, arguments: argparse.Namespace, command: list[str] | None) -> None:
    if command is not None and arguments.legacy_command is not None:
        parser.error("--cmd and -- COMMAND say the same thing: give one of them")
    arguments.argv = None
    if arguments.script is not None:
        arguments.argv, command = command or None, None
    arguments.command = command if command is not None else arguments.legacy_command
    given = [
        name
        for name, value in (
            ("-- COMMAND", arguments.command),
            ("--shell", arguments.shell_text),
            ("--python", arguments.script),
            ("--jsonl", arguments.jsonl),
            ("--file", arguments.job_file),
        )
        if value is not None
    ]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} exclude each other")
    if arguments.command == []:
        parser.error("the command is empty: write it after --, as in `maestroctl submit -- echo hello`")
    if arguments.jsonl is not None or arguments.job_file is not None:
        if arguments.array is not None:
            parser.error(f"--array and {'--jsonl' if arguments.jsonl is not None else '--file'} exclude each other")
        return
    kind = arguments.job_type or _kind(arguments)
    if kind == "cmd" and arguments.command is None and arguments.script is None:
        parser.error(
            "nothing to run: write `-- COMMAND [ARGUMENT ...]`, --python FILE, --shell TEXT, --jsonl FILE, or -f FILE"
        )
    if kind == "shell" and arguments.shell_text is None:
        parser.error("a shell job needs --shell TEXT")
    if kind == "python" and arguments.script is None:
        parser.error("a python job needs --python FILE")
    if kind != "cmd" and arguments.command is not None:
        parser.error(f"a command belongs to type cmd, not {kind}")
    if kind != "shell" and arguments.shell_text is not None:
        parser.error(f"--shell belongs to type shell, not {kind}")
    if kind != "python" and arguments.script is not None:
        parser.error(f"--python belongs to type python, not {kind}")
    arguments.job_type = kind


def _kind(arguments: argparse.Namespace) -> str:
    """The type that what is to be run stands for."""
    if arguments.script is not None:
        return "python"
    return "shell" if arguments.shell_text is not None else "cmd"
