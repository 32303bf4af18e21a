# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client's connection, and its questions to the conductor: patient through a restart of either side."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import msgspec

from organism.bus import messages, rpc_types
from organism.bus.connection import BusClient, connect
from organism.bus.errors import BusError, Refused, TooOld, Unavailable
from organism.bus.jetstream import JetStream
from organism.client._errors import (
    AccessDeniedError,
    BusUnreachableError,
    ConductorUnreachableError,
    ConflictError,
    MaestroError,
    NotFoundError,
    RequestError,
)
from organism.core import _bus
from organism.core._client_settings import ClientSettings

ANSWER_TIMEOUT = 5.0
"""Seconds to wait for one answer."""
RETRY_PAUSE = 0.25
"""Seconds between two questions that nobody answered: there is no event that tells of a conductor's return."""

Reply = TypeVar("Reply", bound=msgspec.Struct)

_BY_CODE: dict[str, type[MaestroError]] = {
    "not_found": NotFoundError,
    "forbidden": AccessDeniedError,
    "bad_request": RequestError,
    "conflict": ConflictError,
    "unavailable": ConductorUnreachableError,
}


class Link:
    """One connection of one user. Use :meth:`open`; then ``nc`` and ``js`` are there."""

    nc: BusClient
    js: JetStream

    def __init__(self, settings: ClientSettings, *, patience: float) -> None:
        self.settings = settings
        self.patience = patience
        self.shard = settings.shard

    async def open(self) -> None:
        """Connect. Raises BusUnreachableError or AccessDeniedError."""
        settings = self.settings
        try:
            self.nc = await connect(
                servers=list(settings.servers),
                label=settings.component.label,
                nkey_file=settings.nkey_file,
                ca_file=settings.ca_file,
                give_up_after=max(self.patience, 1.0),
            )
        except Refused as error:
            raise AccessDeniedError(f"{error} (settings from {settings.source})", code="access_denied") from error
        except TooOld as error:
            raise MaestroError(str(error), code="server_too_old") from error
        except BusError as error:
            raise BusUnreachableError(
                f"{error}; is nats-server up there (`systemctl status nats-server`), and is the address right"
                f" (settings from {settings.source})?"
            ) from error
        self.js = JetStream(self.nc)

    async def close(self) -> None:
        await self.nc.close()

    @property
    def where(self) -> str:
        return ", ".join(self.settings.servers)

    @property
    def _of_shard(self) -> str:
        """For messages; who works with the default one need not know that there are others."""
        return "" if self.shard == _bus.DEFAULT_SHARD else f" of shard {self.shard}"

    def denied(self, error: Refused) -> AccessDeniedError:
        user, key = self.settings.user, self.settings.nkey_file
        held = f"the key {key}" if key else "a connection without a key"
        return AccessDeniedError(f"{error}: {held} may not act as user {user!r} (settings from {self.settings.source})")

    def silent(self, waited: float) -> MaestroError:
        """Why there is no answer: no bus, or a bus without a conductor."""
        if not self.nc.is_connected:
            return BusUnreachableError(
                f"no connection to the bus at {self.where} for {waited:.0f} s; accepted jobs are safe on its disk."
                " Next: `systemctl status nats-server` on its host, then try again"
            )
        return ConductorUnreachableError(
            f"no conductor{self._of_shard} answers on the bus at {self.where} ({waited:.0f} s); accepted jobs are safe"
            " on the bus and go on when one is back. Next: `systemctl status maestro` and"
            " `journalctl -u maestro -n 50` on its host"
        )

    async def rpc(
        self,
        operation: str,
        request: msgspec.Struct,
        kind: type[Reply],
        *,
        within: float = ANSWER_TIMEOUT,
        patience: float | None = None,
        repeatable: bool = True,
    ) -> Reply:
        """Ask the conductor; raises a MaestroError that names what to do.

        One answer is waited for ``within`` seconds. While nobody answers the question is repeated for ``patience``
        seconds, unless it is not ``repeatable``.
        """
        patience = self.patience if patience is None else patience
        subject = _bus.rpc_subject(self.settings.user, operation, self.shard)
        payload = messages.encode(request)
        started = time.monotonic()
        while True:
            try:
                return await self._once(subject, payload, kind, within)
            except Refused as error:
                raise self.denied(error) from error
            except (Unavailable, ConductorUnreachableError) as error:
                waited = time.monotonic() - started
                if not repeatable or waited + RETRY_PAUSE >= patience:
                    if isinstance(error, ConductorUnreachableError):
                        raise
                    raise self.silent(waited) from error
            except BusError as error:
                raise BusUnreachableError(str(error)) from error
            await asyncio.sleep(RETRY_PAUSE)

    async def _once(self, subject: str, payload: bytes, kind: type[Reply], within: float) -> Reply:
        answer = await self.nc.ask(subject, payload, timeout=within)
        try:
            reply = messages.decode(answer.data, messages.RpcReply)
            if reply.ok:
                return rpc_types.from_data(reply.data, kind)
        except messages.BadMessage as error:
            raise RequestError(f"the conductor's answer to {subject} does not fit: {error}", code="version") from error
        problem = reply.error or messages.RpcError(code="bad_request", message="the conductor gave no reason")
        raise _BY_CODE.get(problem.code, RequestError)(problem.message, code=_code(problem.code))


def _code(code: str) -> str:
    return "conductor_unreachable" if code == "unavailable" else code
