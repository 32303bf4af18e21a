# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The API over HTTPS, as pveproxy serves it: tickets in a cookie, tokens in a header, CSRF tokens for writes."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import urllib.parse
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .access import Caller
from .errors import ApiError
from .node import Node
from .routing import Router
from .schema import VARIABLE, Schema

PREFIXES = ("/api2/json", "/api2/extjs")
MAX_BODY = 16 * 1024 * 1024


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Certificate and key for this host; the certificate is its own authority (``api_ca``)."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "pve-root-ca.pem", folder / "pve.key"
    if not certificate.exists():
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-days", "30", "-subj", "/CN=pvesim", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
    return certificate, key


class Api:
    """The listening side; `down` and `up` again while the node lives on."""

    def __init__(self, node: Node, router: Router, schema: Schema | None, host: str, port: int) -> None:
        self.node = node
        self.router = router
        self.schema = schema
        self.address = (host, port)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(*make_certificate(node.top / "etc/pve"))
        self.server: _Server | None = None

    def up(self) -> int:
        """Listen; returns the port."""
        if self.server is None:
            self.server = _Server(self.address, self)
            self.address = (self.address[0], self.server.server_address[1])
            threading.Thread(target=self.server.serve_forever, args=(0.05,), name="pveproxy", daemon=True).start()
        return self.address[1]

    def down(self) -> None:
        """Stop listening and drop every connection, as a restart of pveproxy does."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server.drop()
            self.server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], api: Api) -> None:
        self.api = api
        self.open: set[Any] = set()
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[Any, Any]:
        raw, peer = super().get_request()
        # the handshake is the connection's own thread's, so that nobody who stalls keeps others out
        wrapped = self.api.tls.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        wrapped.settimeout(120)
        self.open.add(wrapped)
        return wrapped, peer

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def drop(self) -> None:
        for each in list(self.open):
            super().shutdown_request(each)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server's."""
        self.api.node.syslog(f"connection of {client_address} broke")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        self.server.api.node.syslog(f"pveproxy: {self.address_string()} {format % args}")

    def _answer(self, verb: str) -> None:
        api = self.server.api
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), MAX_BODY))
        prefix = next((each for each in PREFIXES if url.path.startswith(each)), None)
        try:
            if prefix is None:
                raise ApiError(501, f"Method '{verb} {url.path}' not implemented")
            path = urllib.parse.unquote(url.path.removeprefix(prefix)) or "/"
            caller = self._caller(verb, path)
            params = {**_form(url.query), **self._body(body)}
            data = api.router.dispatch(api.node, api.schema, caller, verb, path, params)
        except ApiError as error:
            self._send(error.status, error.message.split("\n", 1)[0], _failed(error))
        else:
            self._send(200, "OK", {"data": data})

    def _caller(self, verb: str, path: str) -> Caller | None:
        access = self.server.api.node.access
        if path.rstrip("/") == "/access/ticket":
            return None
        authorization = self.headers.get("Authorization", "")
        if authorization.startswith("PVEAPIToken="):
            return access.by_token(authorization.removeprefix("PVEAPIToken="))
        cookie = SimpleCookie(self.headers.get("Cookie", ""))
        if "PVEAuthCookie" not in cookie:
            raise ApiError(401, "No ticket")
        ticket = urllib.parse.unquote(cookie["PVEAuthCookie"].value)
        return access.by_ticket(ticket, self.headers.get("CSRFPreventionToken"), writes=verb != "GET")

    def _body(self, body: bytes) -> dict[str, Any]:
        if not body:
            return {}
        kind = self.headers.get("Content-Type", "").partition(";")[0]
        if kind == "application/json":
            given = json.loads(body)
            return given if isinstance(given, dict) else {}
        if kind == "application/x-www-form-urlencoded":
            return _form(body.decode())
        raise ApiError(501, f"pvesim does not know: a body of type {kind}")

    def _send(self, status: int, reason: str, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status, reason.encode("latin-1", "replace").decode("latin-1"))
        self.send_header("Content-Type", "application/json;charset=UTF-8")
        self.send_header("Content-Length", str(len(text)))
        if self.server.api.schema is None:
            self.send_header("X-Pvesim-Unchecked", f"no schema: {VARIABLE} is not set")
        self.end_headers()
        self.wfile.write(text)


def _form(text: str) -> dict[str, Any]:
    """A key that comes several times is a list."""
    return {
        key: values[0] if len(values) == 1 else values
        for key, values in urllib.parse.parse_qs(text, keep_blank_values=True).items()
    }


def _failed(error: ApiError) -> dict[str, Any]:
    answer: dict[str, Any] = {"data": None, "message": f"{error.message}\n"}
    if error.errors:
        answer["errors"] = error.errors
    return answer
