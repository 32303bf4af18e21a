# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One way to connect: TLS, nkey, own inbox, a version check, endless reconnection, and errors that say what to do.

nats-py alone retries a wrong key for ever, falls back to plain text when a server offers no TLS, and lets a request
that is not permitted run into its time-out. This file mends the three and nothing else of it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from organism.bus import keys
from organism.bus.errors import BusError, Refused, TooOld, Unavailable, Unreachable, Untrusted
from organism.core import _bus

log = logging.getLogger(__name__)

Callback: TypeAlias = Callable[[], Awaitable[None] | None]

LOG_EVERY = 5.0
"""Seconds between two lines about a server that does not answer."""

REFUSED_FOR = 20.0
"""Seconds of refusals after which a lost connection is given up for good: the key was revoked. Less than that may be
a cluster whose servers get their new list of keys one after the other."""

CLOSE_WITHIN = 3.0

_NO_RESPONDERS = "503"
_AUTHORIZATION = ("authorization violation", "user authentication", "account authentication")
_NO_TLS = "nats: server offers no TLS"


class BusClient(Client):
    """A NATS client that knows when it is connected, and that tells a refused request from a slow one."""

    def __init__(self) -> None:
        super().__init__()
        self._unheard: set[str] = set()
        """Subjects, in small letters, that this key may not listen to."""
        self._heard: set[str] = set()
        """Those that must be heard: the connection ends when they no longer may."""
        self.reconnections = 0
        """Grows with each reconnection, so that a reader can tell that its long poll died with the old one."""
        self._up = asyncio.Event()
        self._wants_tls = False
        self._leaving = False
        self._listeners: set[Callable[[], None]] = set()
        self._waiting: dict[str, tuple[str, asyncio.Future[Msg]]] = {}
        self._mux_prefix = ""
        self._refused_since: float | None = None
        self._ending: asyncio.Task[None] | None = None

    # ---- state -------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the connection; ``on_closed`` is not told, since this is no accident."""
        self._leaving = True
        if not self.is_connected:
            # nats-py would write what is pending into the transport that has gone (a TypeError with Python 3.13)
            self._pending = []
            self._pending_data_size = 0
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await super().close()
        except TimeoutError:
            # asyncio's streams of Python 3.11 wait for ever for the end of a TLS handshake that failed
            log.debug("bus: the connection did not close within %g s, left as it is", CLOSE_WITHIN)

    @contextmanager
    def on_reconnect(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` after each reconnection while the context lasts."""
        self._listeners.add(callback)
        try:
            yield
        finally:
            self._listeners.discard(callback)

    async def wait_connected(self, timeout: float) -> None:
        """Raises Unavailable when there is no connection within ``timeout`` seconds."""
        if self.is_connected and self._up.is_set():
            return
        if self.is_closed:
            raise Unavailable("the connection to the bus is closed")
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"no connection to the bus for {timeout:g} s") from None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # checked before CONNECT is sent: a man in the middle must not talk us down to plain text
        if initial_connection and self._wants_tls and not info.get("tls_required"):
            raise nats.errors.Error(_NO_TLS)
        await super()._process_info(info, initial_connection)

    @property
    def inbox(self) -> str:
        """The prefix of the reply subjects that this component's key may listen to."""
        return str(bytes(self._inbox_prefix).decode())

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def ask(
        self, subject: str, payload: bytes = b"", *, timeout: float, headers: dict[str, str] | None = None
    ) -> Msg:
        """A request's answer. Raises Unavailable (no answer, nobody listening) or Refused (not permitted)."""
        if not (self.is_connected and self._up.is_set()):
            started = time.monotonic()
            await self.wait_connected(timeout)
            timeout = max(0.05, timeout - (time.monotonic() - started))
        reply, answer = await self.expect_answer(subject)
        try:
            await self.say(subject, payload, reply=reply, headers=headers)
            async with asyncio.timeout(timeout):
                message = await answer
        except TimeoutError:
            raise Unavailable(f"{subject}: no answer within {timeout:.3g} s") from None
        finally:
            self._waiting.pop(reply, None)
        if message.headers and message.headers.get("Status") == _NO_RESPONDERS and not message.data:
            raise Unavailable(f"{subject}: nobody listens (server starting, or the topology is not applied)")
        return message

    async def say(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish without an answer of its own. Raises Unavailable or Refused (larger than the server takes)."""
        try:
            await self.publish(subject, payload, reply=reply, headers=headers)
        except nats.errors.MaxPayloadError:
            raise Refused(
                f"{subject}: {len(payload)} bytes are more than the server takes (max_payload {self.max_payload})"
            ) from None
        except (nats.errors.Error, OSError) as error:
            raise Unavailable(f"{subject}: {_text(error)}") from error

    async def expect_answer(self, subject: str) -> tuple[str, asyncio.Future[Msg]]:
        """A fresh reply subject and the future of its one answer; forget it with :meth:`forget_answer`."""
        if not self._mux_prefix:
            prefix = f"{self.inbox}.{secrets.token_hex(8)}"
            self._mux_prefix = prefix  # before the await: the subscription is queued ahead of any request
            await self.listen(f"{prefix}.*", self._answered)
        reply = f"{self._mux_prefix}.{secrets.token_hex(8)}"
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting[reply] = (subject.lower(), answer)
        return reply, answer

    def forget_answer(self, reply: str) -> None:
        self._waiting.pop(reply, None)

    async def listen(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Subscribe without nats-py's limit on waiting bytes. Raises Unavailable when the connection has ended."""
        try:
            return await self.subscribe(subject, cb=callback, pending_bytes_limit=0)
        except nats.errors.Error as error:
            raise Unavailable(f"{subject}: {_text(error)}") from error

    async def hear(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> None:
        """:meth:`listen`, and what is said from its return on is heard. Raises Refused when the key may not, and
        Unavailable when the connection has ended."""
        await self.listen(subject, callback)
        trips = 0
        while trips < 2:  # the refusal may come after the answer to the first
            try:
                await self.flush()
                trips += 1
            except (nats.errors.Error, OSError) as error:  # TimeoutError is an OSError
                log.info("bus: %s: %s; trying again", subject, _text(error))
                await self.wait_connected(3600.0)
                trips = 0
        if subject.lower() in self._unheard:
            raise Refused(f"this key may not listen to {subject}")
        self._heard.add(subject.lower())

    async def _answered(self, message: Msg) -> None:
        waiting = self._waiting.pop(message.subject, None)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(message)

    def denied(self, text: str) -> None:
        """The server named a subject that this key may not use: fail whoever waits for an answer to it."""
        if 'subscription to "' in text:
            subject = text.split('subscription to "', 1)[1].split('"', 1)[0]
            self._unheard.add(subject)
            if subject in self._heard:
                self._end(f"this key may not listen to {subject} any more")
        if 'publish to "' not in text:
            return
        subject = text.split('publish to "', 1)[1].split('"', 1)[0]
        for reply, (asked, answer) in list(self._waiting.items()):
            if asked == subject and not answer.done():
                del self._waiting[reply]
                answer.set_exception(Refused(f"this key may not publish to {subject}"))

    # ---- what nats-py tells ------------------------------------------------------------------------------------------

    async def was_disconnected(self) -> None:
        """What was asked may have been lost with the connection: nobody shall wait for its answer in vain."""
        self._up.clear()
        for reply, (asked, answer) in list(self._waiting.items()):
            if not answer.done():
                del self._waiting[reply]
                answer.set_exception(Unavailable(f"{asked}: the connection was lost before the answer came"))

    def was_refused(self) -> None:
        """A reconnection was not let in; after a while that is final."""
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        elif now - self._refused_since >= REFUSED_FOR:
            self._end("the server refuses our key: it was revoked, or replaced")

    def _end(self, why: str) -> None:
        if self._ending is None:
            log.error("bus: %s", why)
            # not from here: this runs inside the task that closing has to cancel
            self._ending = asyncio.create_task(Client.close(self))

    async def was_connected(self, again: bool) -> None:
        check_version(self)
        self._refused_since = None
        self._up.set()
        if again:
            self.reconnections += 1
            for listener in list(self._listeners):
                listener()


async def connect(
    *,
    servers: list[str],
    label: str,
    nkey_file: str | None = None,
    ca_file: str | None = None,
    on_closed: Callback | None = None,
    on_reconnected: Callback | None = None,
    give_up_after: float | None = None,
) -> BusClient:
    """A connection to one of ``servers`` (``nats://`` or ``tls://`` addresses), reconnecting for ever.

    ``label`` is the component's (``worker.gpu0``): the connection's name and its inbox. ``on_closed`` is called when
    the connection has ended for good without :meth:`BusClient.close` (the key was revoked): a daemon exits then.
    While no server answers it waits, and says so every few seconds; ``give_up_after`` seconds end that with
    Unreachable. Raises Refused, Untrusted or TooOld at once.
    """
    tls = _tls(servers, ca_file)
    if nkey_file is not None:
        keys.public_key(nkey_file)  # a missing or broken file is told here, by its name
    trouble = _Trouble(servers)
    try:
        async with asyncio.timeout(give_up_after):
            while True:
                client = BusClient()
                client._wants_tls = tls is not None
                try:
                    await _first(client, servers, label, nkey_file, tls, trouble, on_closed, on_reconnected)
                    return client
                except (nats.errors.Error, OSError) as error:  # TimeoutError is an OSError
                    await client.close()
                    raised = _final(error, label)
                    if raised is not None:
                        raise raised from error
                    trouble.note(error)
                    await asyncio.sleep(1)  # the server itself is there but not ready: there is no event to wait for
                except BaseException:
                    await client.close()
                    raise
    except TimeoutError:
        reason = f": {trouble.last}" if trouble.last else ""
        raise Unreachable(f"no bus server answered within {give_up_after:g} s ({', '.join(servers)}){reason}") from None


async def _first(
    client: BusClient,
    servers: list[str],
    label: str,
    nkey_file: str | None,
    tls: ssl.SSLContext | None,
    trouble: _Trouble,
    on_closed: Callback | None,
    on_reconnected: Callback | None,
) -> None:
    async def error(problem: Exception) -> None:
        text = str(problem)
        if "permissions violation" in text:
            log.error("bus: %s", text.removeprefix("nats: "))
            client.denied(text)
        else:
            trouble.note(problem)
            if any(word in text.lower() for word in _AUTHORIZATION):
                client.was_refused()

    async def closed() -> None:
        client._up.clear()
        if not client._leaving:
            log.error("bus: the connection has ended for good: %s", _text(client.last_error or "closed by the server"))
            await _call(on_closed)

    async def reconnected() -> None:
        try:
            await client.was_connected(again=True)
        except TooOld as problem:
            log.error("bus: %s", problem)
            await Client.close(client)
            return
        trouble.over(client)
        await _call(on_reconnected)

    await client.connect(
        servers=list(servers),
        name=label,
        inbox_prefix=_bus.inbox_prefix(label),
        nkeys_seed=nkey_file,
        tls=tls,
        # nats-py swallows a refusal at the first connection unless reconnection is off
        allow_reconnect=False,
        max_reconnect_attempts=-1,
        reconnect_time_wait=1,
        connect_timeout=5,
        ping_interval=5,
        max_outstanding_pings=2,
        error_cb=error,
        disconnected_cb=client.was_disconnected,
        closed_cb=closed,
        reconnected_cb=reconnected,
    )
    client.options["allow_reconnect"] = True
    await client.was_connected(again=False)
    trouble.over(client)


class _Trouble:
    """Says once every few seconds what is wrong with the way to the servers, and that it is over."""

    def __init__(self, servers: list[str]) -> None:
        self.servers = ", ".join(servers)
        self.last = ""
        self._said = -LOG_EVERY

    def note(self, problem: Exception) -> None:
        self.last = _text(problem)
        if time.monotonic() - self._said >= LOG_EVERY:
            self._said = time.monotonic()
            log.warning("bus: no connection to %s: %s; trying again", self.servers, self.last)

    def over(self, client: BusClient) -> None:
        if self.last:
            url = client.connected_url
            log.info("bus: connected to %s", url.netloc if url else self.servers)
        self.last = ""
        self._said = -LOG_EVERY


def check_version(client: Client) -> None:
    """Raises TooOld for a server below ``_bus.MIN_SERVER``."""
    version = client.connected_server_version
    if (version.major, version.minor, version.patch) < _bus.MIN_SERVER:
        url = client.connected_url
        wanted = ".".join(str(part) for part in _bus.MIN_SERVER)
        raise TooOld(
            f"nats-server at {url.netloc if url else '?'} is {version.major}.{version.minor}.{version.patch}; "
            f"{wanted} or later is needed (role `nats` installs it)"
        )


def _without_eof_note(record: logging.LogRecord) -> bool:
    return "returning true from eof_received()" not in record.msg


def _tls(servers: list[str], ca_file: str | None) -> ssl.SSLContext | None:
    if ca_file is None:
        if any(server.startswith("tls://") for server in servers):
            return ssl.create_default_context()
        return None
    # nats-py's protocol keeps a half-closed connection open, which TLS cannot: asyncio says so at each end of one
    logging.getLogger("asyncio").addFilter(_without_eof_note)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise Untrusted(f"CA file {ca_file} cannot be used: {error}") from error


def _final(error: BaseException, label: str) -> BusError | None:
    """The refusal in an error of the first connection, or None when trying again may help."""
    text = str(error).lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return Untrusted(f"the bus server's certificate is not to be trusted: {error.verify_message}")
    if _NO_TLS.lower() in text:
        return Untrusted("the bus server offers no TLS although a CA is configured: wrong address, or a stranger")
    if any(word in text for word in _AUTHORIZATION):
        return Refused(f"the bus server refused the key of {label}: it is not (or no longer) in the server's list")
    return None


async def _call(callback: Callback | None) -> None:
    if callback is not None:
        result = callback()
        if inspect.isawaitable(result):
            await result


def _text(problem: object) -> str:
    """Some exceptions of the client and of asyncio have no text at all."""
    return str(problem).removeprefix("nats: ") or type(problem).__name__
