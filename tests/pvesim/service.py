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
from typing import Any

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
import json
import os
import socket
import sys

if os.geteuid() != 0:
    sys.exit("please run as root")
server = socket.socket(socket.AF_UNIX)
try:
    server.connect({address!r})
except OSError as error:
    sys.exit(f"pvesim does not run at {address}: {{error.strerror}}")
server.sendall(json.dumps({{"command": {command!r}, "words": sys.argv[1:]}}).encode() + b"\\n")
for line in server.makefile("rb"):
    told = json.loads(line)
    if "rc" in told:
        sys.exit(told["rc"])
    stream = sys.stdout if "out" in told else sys.stderr
    stream.write(told.get("out", told.get("err", "")))
    stream.flush()
sys.exit("pvesim went away")
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
        asked = json.loads(self.rfile.readline() or b"{}")
        service = self.server.service
        if "control" in asked:
            try:
                answer = {"data": service.control.run(asked["control"], asked.get("arguments", {}))}
            except (ApiError, KeyError, TypeError) as error:
                answer = {"error": repr(error)}
            self._say(answer)
            return
        terminal = Terminal(lambda text: self._say({"out": text}), lambda text: self._say({"err": text}))
        self._say({"rc": service.commands.run(asked["command"], asked["words"], terminal)})

    def _say(self, told: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(told).encode() + b"\n")
        self.wfile.flush()


def ask(path: Path, operation: str, **arguments: Any) -> Any:
    """One control operation. Raises OSError, RuntimeError."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(path))
        server.sendall(json.dumps({"control": operation, "arguments": arguments}).encode() + b"\n")
        line = server.makefile("rb").readline()
    answer = json.loads(line or b'{"error": "pvesim went away"}')
    if "error" in answer:
        raise RuntimeError(f"pvesim {operation}: {answer['error']}")
    return answer.get("data")
