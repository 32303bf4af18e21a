# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's monitor protocol, for one exchange at a time.

A monitor serves one client: a second one may connect, and gets no greeting before the first has left. On Proxmox VE
``pvestatd`` asks every VM each ten seconds and gives up after a few, so an exchange is a handful of milliseconds:
greeting, ``qmp_capabilities``, the commands, and the socket is closed. Source: docs/interop/qmp-spec.rst of QEMU.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEADLINE_S = 5.0
_RETRY_S = 0.02  # a full queue of connections has no event to wait for
_LONGEST_ANSWER = 4 << 20


class QmpError(Exception):
    """The monitor cannot be asked; the text names the socket and the next step."""


class QmpBusyError(QmpError):
    """Another client holds the monitor."""


@dataclass(frozen=True)
class Answer:
    """``replies``: the return value of each command. ``peer``: the process that listens, 0 when it cannot be seen."""

    replies: tuple[Any, ...]
    peer: int


def exchange(path: str, commands: Sequence[str], *, deadline_s: float = DEADLINE_S) -> Answer:
    """Ask the monitor at a unix socket and leave it at once. Raises QmpError, QmpBusyError after ``deadline_s``."""
    ends = time.monotonic() + deadline_s
    with _connect(path, ends, deadline_s) as link:
        credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        stream = _Stream(link, path, ends)
        try:
            greeting = stream.message()
        except TimeoutError:
            raise QmpBusyError(_busy(path, deadline_s)) from None
        if "QMP" not in greeting:
            raise QmpError(f"{path} is no QMP monitor: it greets with {str(greeting)[:100]}")
        try:
            stream.command("qmp_capabilities")
            replies = tuple(stream.command(name) for name in commands)
        except TimeoutError:
            raise QmpError(f"{path}: QEMU did not answer within {deadline_s:g} s; is its main loop stuck?") from None
    return Answer(replies, struct.unpack("3i", credentials)[0])


def _busy(path: str, deadline_s: float) -> str:
    return (
        f"{path}: another client has held the monitor for {deadline_s:g} s (a `qm monitor`, a backup, a script?): "
        f"end it and try again"
    )


def _connect(path: str, ends: float, deadline_s: float) -> socket.socket:
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(max(0.001, ends - time.monotonic()))
            link.connect(path)
        except OSError as error:
            link.close()
            if error.errno == errno.EAGAIN and time.monotonic() < ends:  # connect(2): the queue is full
                time.sleep(_RETRY_S)
                continue
            if error.errno == errno.EAGAIN or isinstance(error, TimeoutError):
                raise QmpBusyError(_busy(path, deadline_s)) from None
            if error.errno == errno.ECONNREFUSED:
                raise QmpError(f"{path}: nobody listens; the QEMU that made it has ended") from None
            raise QmpError(f"{path}: {error.strerror or error}") from None
        return link


class _Stream:
    """Messages, a line each; events in between are passed over."""

    def __init__(self, link: socket.socket, path: str, ends: float) -> None:
        self._link, self._path, self._ends = link, path, ends
        self._rest = b""

    def message(self) -> dict[str, Any]:
        """The next message that is no event. Raises TimeoutError, QmpError."""
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                message = self._parse(line)
                if "event" not in message:
                    return message
                continue
            if len(self._rest) > _LONGEST_ANSWER:
                raise QmpError(f"{self._path}: an answer of more than {_LONGEST_ANSWER >> 20} MiB is none of QEMU's")
            left = self._ends - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._link.settimeout(left)
            try:
                block = self._link.recv(65536)
            except ConnectionError as error:
                raise QmpError(f"{self._path}: QEMU has left: {error.strerror}") from None
            if not block:
                raise QmpError(f"{self._path}: QEMU closed the monitor; has the VM ended?")
            self._rest += block

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise QmpError(f"{self._path} is no QMP monitor: it says {line[:100]!r}")
        return message

    def command(self, name: str) -> Any:
        """The command's return value. Raises TimeoutError, QmpError."""
        try:
            self._link.sendall(json.dumps({"execute": name}).encode() + b"\n")
        except ConnectionError as error:
            raise QmpError(f"{self._path}: QEMU has left: {error.strerror}") from None
        message = self.message()
        if "return" not in message:
            reason = message.get("error", {})
            raise QmpError(f"{self._path}: {name} is refused: {reason.get('desc', message)}")
        return message["return"]
