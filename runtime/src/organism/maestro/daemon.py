# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-maestro``: the conductor as a service.

Exit codes: 0 stopped as asked (SIGTERM, SIGINT) or the check succeeded; 1 it failed; 2 usage, settings or policy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from organism import exposition
from organism._version import VERSION
from organism.bus.connection import BusClient, connect
from organism.bus.errors import ApiError, BusError, StreamReset, Unavailable
from organism.core import _bus, _limits, _maestro_settings, _policy
from organism.core._maestro_settings import Loaded, SettingsError
from organism.core._root import Root
from organism.maestro import exporter, sdnotify, telemetry
from organism.maestro.commit import Fenced
from organism.maestro.conductor import Conductor
from organism.maestro.site import Site
from organism.maestro.term import Term

log = logging.getLogger("organism.maestro")

STATUS_EVERY = 5.0
STOP_WITHIN = 15.0
"""Seconds that an orderly stop may take before the process gives up on it."""


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(style: str, level: str) -> None:
    """``text`` carries no time of its own where the journal adds one."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(_JsonLines())
    else:
        stamped = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
        handler.setFormatter(logging.Formatter(stamped + "%(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="organism-maestro", description="The conductor of the GPU pool.")
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument(
        "--config",
        default=os.environ.get(_maestro_settings.PATH_VARIABLE) or _maestro_settings.DEFAULT_PATH,
        help=f"settings file (default: ${_maestro_settings.PATH_VARIABLE} or {_maestro_settings.DEFAULT_PATH})",
    )
    parser.add_argument("--check-config", action="store_true", help="check settings and policy, and end")
    return parser.parse_args(argv)


def load(path: str) -> tuple[Loaded, _policy.Policy, _limits.Limits]:
    """Settings, policy and limits. Raises SettingsError, PolicyError, LimitsError or OSError."""
    loaded = _maestro_settings.parse(Path(path).read_text(encoding="utf-8"), path)
    policy = _policy.load(Root(), loaded.settings.text("POLICY_FILE"))
    return loaded, policy, _limits.load(Root(), loaded.settings.text("LIMITS_FILE"))


def sites_of(loaded: Loaded, policy: _policy.Policy, limits: _limits.Limits) -> list[Site]:
    """One for each shard, the first one's first."""
    settings = loaded.settings
    name = settings.text("NAME") or socket.gethostname().split(".", 1)[0]
    if not _bus.is_identifier(name):
        raise SettingsError([f"the host's name {name!r} is no component's name; set NAME"])
    return [Site(settings, policy, limits, name, shard, VERSION) for shard in settings.words("SHARD")]


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        loaded, policy, limits = load(options.config)
        sites = sites_of(loaded, policy, limits)
    except OSError as problem:
        print(f"organism-maestro: {problem.filename}: {problem.strerror}", file=sys.stderr)  # noqa: T201 - no log yet
        return 2
    except (SettingsError, _policy.PolicyError, _limits.LimitsError) as problem:
        for line in problem.problems:
            print(f"organism-maestro: {line}", file=sys.stderr)  # noqa: T201 - no log yet
        return 2
    settings = loaded.settings
    log_to_stderr(settings.text("LOG_FORMAT"), settings.text("LOG_LEVEL"))
    for notice in loaded.notices:
        log.warning("%s", notice)
    if options.check_config:
        files = (options.config, *(settings.text(key) for key in ("POLICY_FILE", "LIMITS_FILE")))
        log.info("%s are good", ", ".join(files))
        return 0
    return asyncio.run(serve(sites))


async def serve(sites: Sequence[Site]) -> int:
    """Conduct these shards until told to stop; returns the exit code."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings, name = sites[0].settings, sites[0].name
    closed = asyncio.Event()

    def on_closed() -> None:
        closed.set()
        stop.set()

    log.info("organism-maestro %s, conductor %s of shard %s", VERSION, name, ", ".join(site.shard for site in sites))
    connecting = asyncio.create_task(
        connect(
            servers=settings.words("NATS_URL"),
            label=_bus.Component("conductor", name).label,
            nkey_file=settings.text("NKEY_FILE") or None,
            ca_file=settings.text("CA_FILE") or None,
            on_closed=on_closed,
        )
    )
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not connecting.done():
        connecting.cancel()
        await asyncio.wait({connecting})
        return 0
    try:
        nc = await connecting
    except BusError as problem:
        log.error("%s", problem)
        return 1
    finally:
        stopping.cancel()
    status = _Status(sites)
    port = exporter.MetricsPort(settings.integer("METRICS_PORT"), status.metrics)
    await port.open()
    watchdog = asyncio.create_task(status.run(), name="status")
    try:
        code = await _conduct(nc, sites, stop, status)
    finally:
        sdnotify.notify("STOPPING=1")
        watchdog.cancel()
        await port.close()
        await nc.close()
    return 1 if closed.is_set() else code


async def _conduct(nc: BusClient, sites: Sequence[Site], stop: asyncio.Event, status: _Status) -> int:
    """All shards side by side, on one connection; when one of them cannot be conducted at all the process ends.

    A shard that is not the first is left to its own conductor for a while when nobody has it: it may just be starting.
    """
    sdnotify.notify("READY=1", "STATUS=standing by")
    leave = sites[0].settings.number("LEASE_TTL_SEC")

    async def one(number: int, site: Site) -> int:
        try:
            return await _terms(nc, site, stop, status, leave=leave if number else 0.0)
        except BusError as problem:
            log.error("shard %s: %s", site.shard, problem)
            return 1
        finally:
            stop.set()

    return max(await asyncio.gather(*(one(number, site) for number, site in enumerate(sites))))


async def _terms(nc: BusClient, site: Site, stop: asyncio.Event, status: _Status, *, leave: float = 0.0) -> int:
    owner = f"{site.name} ({socket.gethostname()}:{os.getpid()})"
    while not stop.is_set():
        status.conductors.pop(site.shard, None)
        term = Term(nc, site, owner=owner, on_lead=status.leads, leave=leave)
        running = asyncio.create_task(term.run(stop), name="term")
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        try:
            async with asyncio.timeout(STOP_WITHIN if stop.is_set() else None):
                why = await running
        except TimeoutError:
            log.error("it did not stop within %g s; what was not confirmed is found again by the next", STOP_WITHIN)
            return 1
        except Fenced as problem:
            why = str(problem)
        except BusError as problem:
            if nc.is_closed:
                return 1
            if not _passes(problem):
                raise
            log.warning("the term ended: %s", problem)
            await asyncio.sleep(1.0)  # the server is there, its streams are not yet: there is no event for it
            continue
        log.info("the term is over: %s", why)
    return 0


def _passes(problem: BusError) -> bool:
    """Whether another term may do: the server or its disk is not there yet, or is back without the last records."""
    return isinstance(problem, Unavailable | StreamReset) or (isinstance(problem, ApiError) and problem.code >= 500)


class _Status:
    """Tells the service manager that the event loop turns, and what it does."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.conductors: dict[str, Conductor] = {}
        """By shard; some may have ended."""

    def leads(self, conductor: Conductor) -> None:
        self.conductors[conductor.site.shard] = conductor

    async def run(self) -> None:
        interval = sdnotify.watchdog_interval()
        while True:
            lines = ["WATCHDOG=1"] if interval is not None else []
            sdnotify.notify(*lines, f"STATUS={self._text()}")
            await asyncio.sleep(min(interval or STATUS_EVERY, STATUS_EVERY))  # the rhythm is the purpose

    async def metrics(self) -> str:
        parts = [await exporter.families(self.conductors.get(site.shard), site) for site in self.sites]
        return exposition.render(exporter.together(parts))

    def _text(self) -> str:
        lines = []
        for shard, conductor in self.conductors.items():
            if not conductor.ended.is_set():
                found = telemetry.counts(conductor)
                lines.append(f"leading shard {shard}: {found['qsize']} waiting, {found['inflight']} in flight")
        return "; ".join(lines) or "standing by"


if __name__ == "__main__":
    sys.exit(main())
