# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-bus``: keys and streams of the bus. Exit codes: 0 fine, 1 it failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from organism._version import VERSION
from organism.bus import keys, topology, watch
from organism.bus.connection import BusClient, connect
from organism.bus.errors import BusError, Refused, Unreachable
from organism.bus.jetstream import JetStream
from organism.core import _bus, _bus_plan
from organism.core._difference import Difference

API_TIMEOUT = 20.0


def parser() -> argparse.ArgumentParser:
    """The command line; also read by the documentation and the shell completion."""
    top = argparse.ArgumentParser(prog="organism-bus", description="Keys and streams of the GPU pool's bus.")
    top.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    key = verbs.add_parser("key", help="make or show a component's key").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    create = key.add_parser("create", help="make a new seed (mode 0400) and print its public key")
    show = key.add_parser("show", help="print the public key of a seed")
    for one in (create, show):
        one.add_argument("path", metavar="FILE")
        _json(one)
        one.set_defaults(run=_key)

    declared = verbs.add_parser("topology", help="streams and buckets").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    for action, text in (
        ("plan", "show what differs from the declaration; changes nothing"),
        ("apply", "create and change what differs; never destroys a job"),
        ("absent", "remove the streams with all jobs and results"),
    ):
        one = declared.add_parser(action, help=text)
        one.add_argument("--replicas", type=int, choices=(1, 3, 5), default=1, help="copies of each stream (default 1)")
        one.add_argument(
            "--limits", type=_limits, default=_bus.Limits(), metavar="JSON", help='sizes and ages: {"queue_bytes": ...}'
        )
        if action == "absent":
            one.add_argument("--purge", action="store_true", help="yes, destroy all jobs and results")
            one.add_argument("--dry-run", action="store_true", help="only show what would be removed")
        _connection(one)
        one.set_defaults(run=_topology)

    for verb, text in (
        ("wait", "wait until JetStream answers"),
        ("info", "the server and what its store holds"),
        ("streams", "messages and bytes of each stream"),
    ):
        one = verbs.add_parser(verb, help=text)
        _connection(one)
        one.set_defaults(run=_online({"wait": _wait, "info": _info, "streams": _streams}[verb]))

    guard = verbs.add_parser("watch", help="restart a nats-server that a full disk stopped, once there is room")
    guard.add_argument("--store", default="/var/lib/nats", metavar="FOLDER", help="its store (default: %(default)s)")
    guard.add_argument(
        *("--health", "-u"),
        default="http://127.0.0.1:8222/healthz",
        metavar="URL",
        help="where it says how it is (default: %(default)s)",
    )
    guard.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default 5)")
    guard.add_argument(
        "--restart",
        nargs=argparse.REMAINDER,
        default=watch.RESTART,
        metavar="WORD",
        help=f"the command that ends it so that it is started anew, last (default: {' '.join(watch.RESTART)})",
    )
    guard.set_defaults(run=_watch)
    return top


def _json(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true", help="one JSON document on standard output")


def _connection(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        *("--server", "-s"),
        action="append",
        metavar="URL",
        help="bus server, may be repeated (default: ORGANISM_NATS_URL, else nats://127.0.0.1:4222)",
    )
    one.add_argument("--key", "-k", metavar="FILE", default=os.environ.get("ORGANISM_NKEY_FILE"), help="nkey seed")
    one.add_argument("--ca", metavar="FILE", default=os.environ.get("ORGANISM_CA_FILE"), help="CA of the servers")
    one.add_argument("--as", dest="label", default="admin.setup", metavar="KIND.NAME", help="whose key it is")
    one.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="give up after (default 30)")
    _json(one)


def _limits(text: str) -> _bus.Limits:
    try:
        return _bus.Limits(**{name: int(value) for name, value in json.loads(text).items()})
    except (ValueError, TypeError, AttributeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(_bus.Limits))
        raise argparse.ArgumentTypeError(f"{error}; a JSON object of integers, of: {known}") from None


def _watch(options: argparse.Namespace) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if not options.restart:
        raise BusError("--restart needs the words of a command")
    watch.watch(Path(options.store), options.health, options.restart, every=options.every, stop=stop)
    return 0


# ---- verbs -----------------------------------------------------------------------------------------------------------


def _key(options: argparse.Namespace) -> int:
    if options.action == "create":
        try:
            public = keys.create(options.path)
        except FileExistsError:
            raise BusError(f"{options.path} exists: remove it first if the component shall get another key") from None
    else:
        public = keys.public_key(options.path)
    print(json.dumps({"path": options.path, "public_key": public}) if options.json else public)
    return 0


def _online(verb: Callable[[argparse.Namespace, JetStream], Any]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        return asyncio.run(_with_connection(options, verb))

    return run


async def _connected(options: argparse.Namespace) -> BusClient:
    servers = options.server or os.environ.get("ORGANISM_NATS_URL", "nats://127.0.0.1:4222").split(",")
    return await connect(
        servers=servers,
        label=options.label,
        nkey_file=options.key,
        ca_file=options.ca,
        give_up_after=options.timeout,
    )


async def _with_connection(options: argparse.Namespace, verb: Callable[[argparse.Namespace, JetStream], Any]) -> int:
    nc = await _connected(options)
    try:
        return int(await verb(options, JetStream(nc, timeout=API_TIMEOUT)))
    finally:
        await nc.close()


async def _settled(js: JetStream, seconds: float) -> dict[str, Any]:
    """The account's information as soon as JetStream answers (a server reads its streams first, a cluster elects)."""
    last = ""
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    return await js.api("INFO", timeout=min(5.0, seconds))
                except Refused:
                    raise
                except BusError as problem:
                    last = str(problem)
                await asyncio.sleep(0.3)  # the server tells nobody when it has become ready
    except TimeoutError:
        raise Unreachable(f"the server answers, but JetStream does not within {seconds:g} s: {last}") from None


async def _wait(options: argparse.Namespace, js: JetStream) -> int:
    await _settled(js, options.timeout)
    _say(options, {"ready": True}, "JetStream answers")
    return 0


async def _info(options: argparse.Namespace, js: JetStream) -> int:
    info = await _settled(js, options.timeout)
    version = js.nc.connected_server_version
    url = js.nc.connected_url
    facts = {
        "server": url.netloc if url else "",
        "version": f"{version.major}.{version.minor}.{version.patch}",
        "streams": info["streams"],
        "consumers": info["consumers"],
        "store_bytes": info["storage"],
        "store_reserved_bytes": info.get("reserved_storage", 0),
    }
    _say(options, facts, "\n".join(f"{name:<22}{value}" for name, value in facts.items()))
    return 0


async def _streams(options: argparse.Namespace, js: JetStream) -> int:
    await _settled(js, options.timeout)
    rows = []
    for name in _bus.topology().streams:
        info = await js.info(name)
        state, config = info["state"], info["config"]
        rows.append(
            {
                "stream": name,
                "messages": state["messages"],
                "bytes": state["bytes"],
                "max_bytes": config["max_bytes"],
                "first_seq": state["first_seq"],
                "last_seq": state["last_seq"],
                "replicas": config["num_replicas"],
                "consumers": state["consumer_count"],
            }
        )
    lines = [f"{'stream':<20}{'messages':>10}{'MiB':>10}{'of MiB':>8}{'last seq':>12}{'consumers':>11}"]
    lines += [
        f"{row['stream']:<20}{row['messages']:>10}{row['bytes'] / _bus.MIB:>10.1f}{row['max_bytes'] // _bus.MIB:>8}"
        f"{row['last_seq']:>12}{row['consumers']:>11}"
        for row in rows
    ]
    _say(options, {"streams": rows}, "\n".join(lines))
    return 0


def _topology(options: argparse.Namespace) -> int:
    wanted = _bus.topology(replicas=options.replicas, limits=options.limits)
    dry = options.action == "plan" or (options.action == "absent" and options.dry_run)
    if options.action == "absent" and not options.purge and not dry:
        print("organism-bus: this destroys all jobs and results; say --purge if that is meant", file=sys.stderr)
        return 2

    async def verb(options: argparse.Namespace, js: JetStream) -> int:
        await _settled(js, options.timeout)
        current = await topology.read(js, wanted)
        plan = (_bus_plan.plan_absent if options.action == "absent" else _bus_plan.plan)(current, wanted)
        refused = bool(plan.refusals)
        if not dry and not refused:
            await topology.carry_out(js, plan)
        if dry or not refused:
            _say(options, report(plan), _told(plan))
        if refused and not dry:
            raise topology.TopologyRefused("; ".join(plan.refusals))
        return 0

    return asyncio.run(_with_connection(options, verb))


def report(plan: _bus_plan.Plan) -> dict[str, Any]:
    """What ``--json`` prints and the module ``bus_topology`` reads."""
    return {
        "changed": plan.difference.changed,
        "message": plan.difference.message,
        "changes": [dataclasses.asdict(change) for change in plan.difference.changes],
        "refusals": plan.refusals,
    }


def _told(plan: _bus_plan.Plan) -> str:
    lines = [str(change) for change in plan.difference.changes] or [Difference().message]
    lines += [f"refused: {text}" for text in plan.refusals]
    return "\n".join(lines)


def _say(options: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    print(json.dumps(document, sort_keys=True) if options.json else text)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``organism-bus``."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BusError as problem:
        text = str(problem)
    except OSError as problem:
        text = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    if getattr(options, "json", False):
        print(json.dumps({"error": text}))
    print(f"organism-bus: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
