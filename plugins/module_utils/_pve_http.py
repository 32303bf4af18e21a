# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Proxmox VE over HTTPS, by an API token or by a ticket; carried by proxmoxer.

The one file of the library that knows proxmoxer, and it imports it only when a connection is made: hosts that use the
local backend do not need it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _pve_tasks
from ._pve_errors import PveAuthFailed, PveError, PveUnreachable, classify

PROXMOXER = "proxmoxer==2.3.0"


@dataclass(frozen=True)
class Login:
    """Who connects. ``token_id`` None: ``secret`` is the user's password, with which a ticket is fetched."""

    user: str
    token_id: str | None
    secret: str = field(repr=False)

    @property
    def name(self) -> str:
        """The user as Proxmox VE names it, in logs and ACLs."""
        return f"{self.user}!{self.token_id}" if self.token_id else self.user


class HttpsPve:
    """The protocol `Pve` over HTTPS. ``verify``: True for the system's authorities, a file's path, or False."""

    def __init__(self, host: str, port: int, login: Login, verify: bool | str, timeout: float) -> None:
        self.host = host
        self.port = port
        self.login = login
        self.verify = verify
        self.timeout = timeout
        self.backend = "https-token" if login.token_id else "https-ticket"
        self._api: Any = None

    @property
    def is_root(self) -> bool:
        return self.login.token_id is None and self.login.user == "root@pam"

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, params)

    def post(self, path: str, **params: Any) -> Any:
        return self._call("POST", path, params)

    def put(self, path: str, **params: Any) -> Any:
        return self._call("PUT", path, params)

    def delete(self, path: str, **params: Any) -> Any:
        return self._call("DELETE", path, params)

    def wait(self, upid: str, timeout: float) -> _pve_tasks.TaskResult:
        return _pve_tasks.wait(self.get, upid, timeout)

    # ---- carrying ----------------------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, params: Mapping[str, Any]) -> Any:
        sent = wire(params)
        try:
            return self._once(method, path, sent)
        except PveAuthFailed:
            # The ticket of a connection that idled is expired or was made before the node's key was rotated: log in
            # once more. A request that is answered with 401 has done nothing, so it may be sent again.
            if self.login.token_id or self._api is None:
                raise
            self._api = None
            return self._once(method, path, sent)

    def _once(self, method: str, path: str, sent: dict[str, Any]) -> Any:
        import requests
        from proxmoxer.core import ResourceException

        api = self._connected()
        resource = api(path.strip("/"))
        call: Callable[..., Any] = getattr(resource, method.lower())
        try:
            return call(**sent)
        except ResourceException as error:
            errors = error.errors if isinstance(error.errors, dict) else {}
            said = str(getattr(error, "content", "") or "")
            raise classify(error.status_code, said, method=method, path=path, errors=errors) from None
        except requests.exceptions.RequestException as error:
            raise self._unreachable(method, path, error) from None

    def _connected(self) -> Any:
        if self._api is not None:
            return self._api
        try:
            import requests
            from proxmoxer import ProxmoxAPI
            from proxmoxer.core import AuthenticationError
        except ImportError as error:
            raise PveUnreachable(
                f"backend https needs {PROXMOXER} and requests in the Python that runs the module ({error}): "
                f"'pip install {PROXMOXER} requests' there, or run it on the node with backend local"
            ) from None
        if self.login.token_id:
            how = {"token_name": self.login.token_id, "token_value": self.login.secret}
        else:
            how = {"password": self.login.secret}
        try:
            self._api = ProxmoxAPI(
                self.host, port=self.port, user=self.login.user, verify_ssl=self.verify, timeout=self.timeout, **how
            )
        except AuthenticationError:
            raise PveAuthFailed(
                f"{self.host} does not accept the password of {self.login.user}: check user, realm and password",
                status=401,
                path="/access/ticket",
            ) from None
        except requests.exceptions.RequestException as error:
            raise self._unreachable("POST", "/access/ticket", error) from None
        return self._api

    def _unreachable(self, method: str, path: str, error: Exception) -> PveError:
        import requests

        where = f"{self.host}:{self.port}"
        if isinstance(error, requests.exceptions.SSLError):
            return PveUnreachable(
                f"{method} {path}: the certificate of {where} cannot be verified ({_inner(error)}); give api_ca "
                "the node's /etc/pve/pve-root-ca.pem",
                path=path,
            )
        if isinstance(error, requests.exceptions.Timeout):
            reason = f"it did not answer within {self.timeout:g} s"
        else:
            reason = _inner(error)
        return PveUnreachable(
            f"{method} {path}: {where} cannot be reached: {reason}; check address, port and pveproxy", path=path
        )


def _inner(error: BaseException) -> str:
    """The cause at the bottom in one line: requests wraps it several times."""
    bottom = error
    while True:
        reason = getattr(bottom, "reason", None)
        inner = reason if isinstance(reason, BaseException) else (bottom.__cause__ or bottom.__context__)
        if inner is None or inner is bottom:
            break
        bottom = inner
    return " ".join(str(bottom).split()) or type(bottom).__name__


def wire(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the API reads them from a form: 1 and 0 for booleans, a list as the same key several times."""
    sent: dict[str, Any] = {}
    for key, value in params.items():
        if value is None:
            continue
        sent[key] = [_text(each) for each in value] if isinstance(value, (list, tuple)) else _text(value)
    return sent


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
