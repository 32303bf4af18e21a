# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-gpucache-agent``: tells the bus of this host's caches and takes its requests.

The work itself is done by ``gpucache-ctl`` in a process of its own: a slow disk stops neither heartbeats nor the other
GPUs, and what is killed half way leaves the last generation whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from organism._version import VERSION
from organism.bus.connection import connect
from organism.bus.errors import BusError
from organism.core import _gpucache as gpucache
from organism.core import _ramlayer as ramlayer
from organism.core._bus import inbox_prefix, is_identifier
from organism.core._keyvalue import Settings, SettingsError
from organism.core._root import Root
from organism.gpucache import messages

log = logging.getLogger("organism.gpucache")

HEARTBEAT_SECONDS = 5.0
WORK_SECONDS = 900.0
"""A guard against a hung disk: after this long the work is ended and reported as failed."""
REPLY_SECONDS = 55.0
"""The server lets us answer a request for one minute (allow_responses); later, only the event tells."""
WAITING = 4
"""Requests for one GPU that may wait for their turn; more are refused at once."""


class Message(Protocol):
    """What the agent needs of a message."""

    @property
    def data(self) -> bytes: ...

    @property
    def reply(self) -> str: ...


class Bus(Protocol):
    """What the agent needs of the bus; organism.bus.connection.BusClient is one."""

    async def say(self, subject: str, payload: bytes) -> None: ...

    async def listen(self, subject: str, callback: Callable[[Any], Awaitable[None]]) -> object: ...


class Agent:
    """One host's agent on a connected bus."""

    def __init__(self, bus: Bus, settings: Settings, root: Root, *, host: str, config: str) -> None:
        self.bus = bus
        self.settings = settings
        self.root = root
        self.host = host
        self.config = config
        self.ids = list(gpucache.gpus(settings, root).ids)
        self._turn: dict[str, asyncio.Lock] = {}
        self._asked: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: list[str] = []
        self._status: list[dict[str, Any]] = []
        self._told: dict[str, str] = {}
        self._read_at: float | None = None
        self._reading: asyncio.Future[list[dict[str, Any]]] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``. Raises BusError when a subscription is refused."""
        for work in messages.WORK:
            await self.bus.listen(messages.request_subject(work), self._listener(work))
        await self._say(messages.UP, messages.Up(host=self.host, ts=time.time(), gpus=self.ids))
        log.info("serving %s", ", ".join(self.ids))
        try:
            while not stop.is_set():
                self._read_status()
                await self._say(messages.HEARTBEAT, self._beat())
                await self._tell_changes()
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await stop.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listener(self, work: str) -> Callable[[Message], Awaitable[None]]:
        async def heard(message: Message) -> None:
            # a task of its own: the client hands over the next message only when this has returned
            task = asyncio.create_task(self.serve(work, message))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

        return heard

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a request was not served", exc_info=task.exception())

    async def serve(self, work: str, message: Message) -> None:
        """Do what a request asks, answer it, and tell everyone how it ended."""
        began = time.monotonic()
        try:
            gpu = messages.read_request(message.data)
        except messages.BadRequest as problem:
            outcome = self._outcome(work, None, began, False, {}, str(problem))
            await self._say(messages.outcome_subject(work, False), outcome)
        else:
            if gpu == messages.EVERY:
                given = await asyncio.gather(*(self._one(work, each) for each in self.ids))
                bad = [each.gpu or "" for each in given if not each.ok]
                detail = {"gpus": [msgspec.to_builtins(each) for each in given]}
                outcome = self._outcome(
                    work, gpu, began, not bad, detail, f"{work} failed for {', '.join(bad)}" if bad else ""
                )
            elif gpu in self.ids:
                outcome = await self._one(work, gpu)
            else:
                return  # another host's
        if message.reply.startswith(inbox_prefix("")) and time.monotonic() - began < REPLY_SECONDS:
            await self._say(message.reply, outcome)

    async def _one(self, work: str, gpu: str) -> messages.Outcome:
        """Do it for one GPU and tell everyone how it ended."""
        began = time.monotonic()
        ok, detail = await self._in_turn(work, gpu)
        error = "" if ok else str(detail.get("error", "failed"))
        outcome = self._outcome(work, gpu, began, ok, detail, error)
        await self._say(messages.outcome_subject(work, ok), outcome)
        return outcome

    def _outcome(
        self, work: str, gpu: str | None, began: float, ok: bool, detail: dict[str, Any], error: str
    ) -> messages.Outcome:
        if not ok:
            log.warning("%s of %s: %s", work, gpu, error)
        return messages.Outcome(
            host=self.host, gpu=gpu, work=work, ok=ok, ts=time.time(), seconds=round(time.monotonic() - began, 3),
            error=error, detail=detail,
        )  # fmt: skip

    async def _in_turn(self, work: str, gpu: str) -> tuple[bool, dict[str, Any]]:
        if self._asked.get(gpu, 0) > WAITING:
            return False, {"error": f"{gpu} has {WAITING} requests waiting already; ask again later"}
        self._asked[gpu] = self._asked.get(gpu, 0) + 1
        label = f"{work} {gpu}"
        try:
            async with self._turn.setdefault(gpu, asyncio.Lock()):
                self._running.append(label)
                try:
                    return await self.work(work, gpu)
                finally:
                    self._running.remove(label)
        finally:
            self._asked[gpu] -= 1

    async def work(self, work: str, gpu: str) -> tuple[bool, dict[str, Any]]:
        """Run gpucache-ctl for one GPU; what it says of it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "organism.cli.gpucache_ctl", "--config", self.config, "--json", work, gpu,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(WORK_SECONDS):
                out, complaint = await process.communicate()
        except TimeoutError:
            return False, {"error": f"{work} of {gpu} did not end within {WORK_SECONDS:g} s and was ended"}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        try:
            answer = json.loads(out)
        except ValueError:
            return False, {"error": complaint.decode(errors="replace").strip()[-500:] or f"exit {process.returncode}"}
        detail = answer["gpus"][0] if answer.get("gpus") else answer
        return process.returncode == 0, detail

    def _beat(self) -> messages.Beat:
        age = None if self._read_at is None else round(time.time() - self._read_at, 1)
        return messages.Beat(
            host=self.host, ts=time.time(), gpus=self.ids, status=self._status, status_age_s=age, running=self._running
        )

    async def _tell_changes(self) -> None:
        """An event for each cache whose condition is another than it was; the first one is told when it is not well."""
        for status in self._status:
            kind, text = messages.condition(status)
            gpu = status["gpu"]
            if kind != self._told.get(gpu, "ok"):
                log.log(logging.INFO if kind == "ok" else logging.WARNING, "%s", text)
                event = messages.Event(host=self.host, gpu=gpu, ts=time.time(), kind=kind, text=text)
                await self._say(messages.EVENT, event)
            self._told[gpu] = kind

    def _read_status(self) -> None:
        """Collect what the last reading found and begin another, unless a hung disk still holds that one."""
        if self._reading is not None:
            if not self._reading.done():
                return
            problem = self._reading.exception()
            if problem is None:
                self._status, self._read_at = self._reading.result(), time.time()
            else:
                log.error("the caches' state cannot be read: %s", problem)
        self._reading = asyncio.get_running_loop().run_in_executor(None, self._collect)

    def _collect(self) -> list[dict[str, Any]]:
        try:
            self.ids = list(gpucache.gpus(self.settings, self.root).ids)
        except SettingsError as error:
            log.warning("%s; keeping to %s", error, ", ".join(self.ids))
        return [ramlayer.status(gpucache.layer(self.settings, gpu), self.root) for gpu in self.ids]

    async def _say(self, subject: str, payload: object) -> None:
        try:
            await self.bus.say(subject, messages.encode(payload))
        except BusError as error:
            log.warning("not told: %s", error)  # the bus is away for now; the next heartbeat tells the state again


def host_name(settings: Settings) -> str:
    """This host's name on the bus. Raises SettingsError when its host name cannot be one."""
    name = settings.text("NATS_NAME") or socket.gethostname().split(".")[0]
    if not is_identifier(name):
        raise SettingsError([f"host name {name!r} cannot be a name on the bus; set NATS_NAME"])
    return name


async def serve(config: str) -> int:
    """Exit code: 0 after SIGTERM, 1 when the bus refused or left us for good (the unit starts us again)."""
    root = Root()
    settings = gpucache.load(root, config)
    host = host_name(settings)
    stop, lost = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def closed() -> None:
        lost.set()
        stop.set()

    connecting = asyncio.create_task(
        connect(
            servers=settings.words("NATS_URL"),
            label=f"cache.{host}",
            nkey_file=settings.text("NATS_NKEY_FILE") or None,
            ca_file=settings.text("NATS_CA_FILE") or None,
            on_closed=closed,
        )
    )
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not connecting.done():
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        return 0
    stopping.cancel()
    bus = await connecting
    try:
        await Agent(bus, settings, root, host=host, config=config).run(stop)
    finally:
        await bus.close()
    return 1 if lost.is_set() else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="organism-gpucache-agent", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=gpucache.CONFIG, help="settings file (default: %(default)s)")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return asyncio.run(serve(arguments.config))
    except SettingsError as error:
        log.error("%s", "; ".join(error.problems))
        return 2
    except BusError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
