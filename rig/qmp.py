# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's machine protocol over a unix socket: one command, one answer; events are kept for who asks.

Protocol: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import array
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import RigError


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A connection to the unix socket ``path``, which may be longer than the 107 bytes that an address holds."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        try:
            connection.connect(f"/proc/self/fd/{folder}/{path.name}")
        except OSError:
            connection.close()
            raise
        return connection
    finally:
        os.close(folder)


class QmpError(RigError):
    """QEMU refused a command."""


class Qmp:
    """One connection. ``on_event`` gets each event, in the thread that waits for answers or listens."""

    def __init__(
        self, path: Path, on_event: Callable[[dict[str, Any]], None] | None = None, timeout: float = 60.0
    ) -> None:
        self._socket = connect(path, timeout)
        self._reader = self._socket.makefile("rb")
        self._on_event = on_event
        self._lock = threading.Lock()
        if "QMP" not in self._read():
            raise RigError(f"{path} is not QEMU's machine protocol")
        self.command("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            raise ConnectionError("QEMU closed its machine protocol")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def command(self, name: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """The command's return value. ``fd`` goes along as a file descriptor (getfd). Raises `QmpError`."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        data = json.dumps(request).encode() + b"\n"
        with self._lock:
            if fd is None:
                self._socket.sendall(data)
            else:
                self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            while True:
                answer = self._read()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise QmpError(f"{name} {arguments or ''}: {answer['error'].get('desc', answer['error'])}")
                self._event(answer)

    def human(self, line: str) -> str:
        """A command of the human monitor, which savevm still is; its complaint is its output."""
        return str(self.command("human-monitor-command", {"command-line": line}))

    def listen(self) -> None:
        """Hand over events until QEMU closes the connection."""
        self._socket.settimeout(None)
        try:
            while True:
                self._event(self._read())
        except (ConnectionError, ValueError):
            return

    def _event(self, answer: dict[str, Any]) -> None:
        if self._on_event is not None and "event" in answer:
            self._on_event(answer)
