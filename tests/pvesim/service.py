# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The server's process: HTTPS for everybody, a unix socket for the commands and for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import sys
import threading
from pathlib import Path
from typing import Any, Self

from .api import router
from .commands import Commands, Terminal
from .control import Control
from .errors import ApiError
from .ha import Ha
from .https import Api
from .node import Node, Settings
from .schema import VARIABLE, Schema

SOCKET = "pvesim.sock"
COMMANDS = ("pvesh", "qm")

_SCRIPT = """\
#!{python} -IS
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# Only what is built in is imported: hooks and tests start this very often.
import os
import sys

import _socket

if os.geteuid() != 0:
    sys.exit("please run as root")
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
try:
    server.connect({address!r})
except OSError as error:
    sys.exit(f"pvesim does not run at {address}: {{error.strerror}}")


def read(count):
    got = b""
    while len(got) < count:
        more = server.recv(count - len(got))
        if not more:
            sys.exit("pvesim went away")
        got += more
    return got


asked = b"\\0".join(os.fsencode(word) for word in [{command!r}, *sys.argv[1:]])
server.sendall(b"%08d" % len(asked) + asked)
while True:
    kind, size = read(1), int(read(8))
    told = read(size)
    if kind == b"r":
        sys.exit(int(told))
    stream = sys.stdout if kind == b"o" else sys.stderr
    stream.buffer.write(told)
    stream.flush()
"""


class Service:
    """One simulated node, served until it is told to end."""

    def __init__(self, top: Path, settings: Settings, host: str = "127.0.0.1", port: int = 0) -> None:
        self.node = Node(top, settings)
        self.schema = Schema.load()
        self.ha = Ha(self.node)
        made = router(self.ha)
        self.api = Api(self.node, made, self.schema, host, port)
        self.commands = Commands(self.node, made, self.schema)
        self.ended = threading.Event()
        self.control = Control(self.node, self.api, self.ha, self.ended.set)
        self.socket_path = top / SOCKET
        self._write_commands()

    def _write_commands(self) -> None:
        for command in COMMANDS:
            script = self.node.top / "bin" / command
            script.write_text(
                _SCRIPT.format(python=sys.executable, address=str(self.socket_path), command=command), encoding="utf-8"
            )
            script.chmod(0o755)

    def run(self, *, announce: bool = True) -> None:
        """Serve until SIGTERM, SIGINT or the operation ``quit``; then no VM runs any more.

        ``announce``: one line of JSON on standard output once everybody is served.
        """
        self.socket_path.unlink(missing_ok=True)
        local = _Local(str(self.socket_path), self)
        threading.Thread(target=local.serve_forever, args=(0.05,), name="local", daemon=True).start()
        threading.Thread(target=self.ha.run, name="pve-ha-lrm", daemon=True).start()
        port = self.api.up()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.ended.set())
        ready = {"port": port, "schema": self.schema is not None, "pid": os.getpid(), "top": str(self.node.top)}
        if self.schema is None:
            print(f"pvesim: requests are NOT checked: {VARIABLE} names no schema", file=sys.stderr, flush=True)
        if announce:
            print(json.dumps(ready), flush=True)
        try:
            self.ended.wait()
        finally:
            self.ha.ended.set()
            self.api.down()
            local.shutdown()
            for machine in list(self.node.machines.values()):
                machine.kill()
            self.socket_path.unlink(missing_ok=True)


class _Local(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: str, service: Service) -> None:
        self.service = service
        super().__init__(path, _LocalRequest)
        Path(path).chmod(0o600)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A command that was killed is no error of the server's; anything else is told."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


class _LocalRequest(socketserver.StreamRequestHandler):
    server: _Local

    def handle(self) -> None:
        """Control operations, each a line of JSON; or a command, as eight digits and so many bytes of words."""
        first = self.rfile.read(1)
        while first == b"{":
            self._control(json.loads(first + self.rfile.readline()))
            first = self.rfile.read(1)
        if first:
            size = int(first + self.rfile.read(7))
            command, *words = os.fsdecode(self.rfile.read(size)).split("\0")
            terminal = Terminal(lambda text: self._say(b"o", text), lambda text: self._say(b"e", text))
            self._say(b"r", str(self.server.service.commands.run(command, words, terminal)))

    def _control(self, asked: dict[str, Any]) -> None:
        try:
            answer = {"data": self.server.service.control.run(asked["control"], asked.get("arguments", {}))}
        except (ApiError, KeyError, TypeError) as error:
            answer = {"error": repr(error)}
        self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _say(self, kind: bytes, text: str) -> None:
        told = os.fsencode(text)
        self.wfile.write(kind + b"%08d" % len(told) + told)
        self.wfile.flush()


class Line:
    """``with Line(path) as line: line.ask("machines")``: control operations over one connection."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self._path))
        self._stream = self._socket.makefile("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises OSError, RuntimeError."""
        self._socket.sendall(json.dumps({"control": operation, "arguments": arguments}).encode() + b"\n")
        answer = json.loads(self._stream.readline() or b'{"error": "pvesim went away"}')
        if "error" in answer:
            raise RuntimeError(f"pvesim {operation}: {answer['error']}")
        return answer.get("data")


def ask(path: Path, operation: str, **arguments: Any) -> Any:
    """One control operation. Raises OSError, RuntimeError."""
    with Line(path) as line:
        return line.ask(operation, **arguments)
