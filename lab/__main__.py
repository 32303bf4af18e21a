# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Command line of the lab. Exit codes: 0 done, 1 it failed, 2 the request makes no sense, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys

from rich.markup import escape
from rich.table import Table

from . import demo, host, lifecycle, play
from .config import require_state, settings
from .errors import LabError, UsageError
from .lifecycle import Wish
from .show import console


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description="Throw-away systemd containers for the roles, and the demo that runs in them.",
        epilog="Environment: ORGANISM_CACHE (default .cache), ORGANISM_LAB_NAME (orglab0), ORGANISM_LAB_SUBNET.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    def sizes(one: argparse.ArgumentParser) -> None:
        one.add_argument("--bus", type=int, metavar="N", help="bus nodes: 1, 3 or 5 (default 1)")
        one.add_argument("--pool", type=int, metavar="N", help="GPU-pool nodes: 1 to 9 (default 1)")
        one.add_argument("--gpus", type=int, metavar="N", help="simulated GPUs a pool node: 1 to 16 (default 4)")
        one.add_argument(
            "--subnet", metavar="NET", help="IPv4 network of the lab (default: the first free of a few in 10/8)"
        )

    sizes(verb("up", "build and boot the containers; repeatable (needs root, asks sudo)"))
    sizes(verb("demo", "the whole story: boot, site.yml, jobs, one worker killed, the accounts, the pool"))
    verb("down", "stop the containers, keep their trees (needs root, asks sudo)")
    verb("clean", "remove the lab and prove that nothing is left (needs root, asks sudo)")
    verb("status", "the nodes and whether they run").add_argument("--json", action="store_true", help="for machines")
    enter = verb("ssh", "a root shell, or one command, on a node")
    enter.add_argument("node", help="name of the node, e.g. pool1")
    enter.add_argument("command", nargs=argparse.REMAINDER, help="command to run instead of a shell")
    verb("play", "ansible-playbook on the lab, with its arguments; playbooks/site.yml where they name none")
    return parser


def _wish(options: argparse.Namespace) -> Wish:
    return Wish(bus=options.bus, pool=options.pool, gpus=options.gpus, subnet=options.subnet)


def _show_status(as_json: bool) -> int:
    where = settings()
    records = lifecycle.status(where)
    if as_json:
        sys.stdout.write(json.dumps({"ok": bool(records), "lab": where.name, "nodes": records}) + "\n")
        return 0 if records else 1
    require_state(where)
    table = Table("node", "state", "address", "groups", "GPUs", title=f"lab {where.name}", title_justify="left")
    for record in records:
        groups = " ".join(map(str, record["groups"])) if isinstance(record["groups"], list) else ""
        table.add_row(*(str(record[key]) for key in ("name", "state", "address")), groups, str(record["gpus"]))
    console.print(table)
    return 0


def _dispatch(options: argparse.Namespace, rest: list[str]) -> int:
    where = settings()
    match options.verb:
        case "up":
            host.become_root("to boot containers")
            lifecycle.up(where, _wish(options))
        case "down":
            host.become_root("to stop containers")
            lifecycle.down(where)
        case "clean":
            host.become_root("to stop containers and to unmount")
            lifecycle.clean(where)
        case "status":
            return _show_status(options.json)
        case "ssh":
            return lifecycle.enter(where, require_state(where).node(options.node), options.command)
        case "play":
            return play.playbook(where, rest)
        case "demo":
            return demo.tell(where, _wish(options))
    return 0


def main() -> int:
    options, rest = _parser().parse_known_args()
    if options.verb == "play":
        rest = sys.argv[sys.argv.index("play") + 1 :]  # everything is ansible-playbook's own
    elif rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _dispatch(options, rest)
    except LabError as error:
        console.print(f"[bold red]{options.verb} failed:[/] {escape(str(error))}")
        if error.hint:
            console.print(f"next step: {escape(error.hint)}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
