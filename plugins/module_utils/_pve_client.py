# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One way to talk to Proxmox VE, whatever carries it: HTTPS with a token, HTTPS with a ticket, or ``pvesh`` as root.

    pve = connect(module.params)
    upid = pve.post("/nodes/pve1/qemu/100/status/start")
    pve.wait(upid, timeout=120)

Paths are the API's own, with a leading slash and without ``/api2/json``. Answers are the ``data`` part in JSON types.
Values of parameters may be str, int, float, bool (sent as 1 and 0), a list (sent as the API's array) or None (left
out). Keys that are no Python names are given as ``**{"check-node": "pve1"}``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from ._pve_errors import (
    PveAuthFailed,
    PveError,
    PveExists,
    PveForbidden,
    PveLocked,
    PveNotFound,
    PveRefused,
    PveStaleDigest,
    PveTaskFailed,
    PveTimeout,
    PveUnreachable,
)
from ._pve_tasks import TaskResult

__all__ = [
    "Pve",
    "PveAuthFailed",
    "PveError",
    "PveExists",
    "PveForbidden",
    "PveLocked",
    "PveNotFound",
    "PveRefused",
    "PveStaleDigest",
    "PveTaskFailed",
    "PveTimeout",
    "PveUnreachable",
    "TaskResult",
    "argument_spec",
    "connect",
]

HTTPS_TOKEN, HTTPS_TICKET, LOCAL = "https-token", "https-ticket", "local"


class Pve(Protocol):
    """A connection. Every method raises a subclass of PveError, whose text names object, reason and next step."""

    backend: str
    """``https-token``, ``https-ticket`` or ``local``."""

    @property
    def is_root(self) -> bool:
        """Whether this speaks as root@pam itself, who alone may set the root-only keys. A token never does."""

    def get(self, path: str, **params: Any) -> Any: ...

    def post(self, path: str, **params: Any) -> Any:
        """A UPID (str) where Proxmox VE starts a task."""

    def put(self, path: str, **params: Any) -> Any: ...

    def delete(self, path: str, **params: Any) -> Any: ...

    def wait(self, upid: str, timeout: float) -> TaskResult:
        """Until the task has ended. Raises PveTaskFailed and PveTimeout with the last lines of its log."""


def argument_spec() -> dict[str, Any]:
    """The options of the documentation fragment ``organism.proxmox.pve``, for AnsibleModule."""
    return {
        "backend": {"type": "str", "choices": ["auto", "https", "local"], "default": "auto"},
        "node": {"type": "str"},
        "api_host": {"type": "str"},
        "api_port": {"type": "int", "default": 8006},
        "api_user": {"type": "str"},
        "api_token_id": {"type": "str"},
        "api_token_secret": {"type": "str", "no_log": True},
        "api_password": {"type": "str", "no_log": True},
        "api_ca": {"type": "path"},
        "validate_certs": {"type": "bool", "default": True},
        "timeout": {"type": "int", "default": 60},
    }


def connect(params: Mapping[str, Any]) -> Pve:
    """A connection from a module's parameters; nothing is sent before the first call, but for a ticket's login.

    ``backend: auto`` is https when ``api_host`` is given, and local otherwise. A missing secret is taken from
    PROXMOX_TOKEN_SECRET or PROXMOX_PASSWORD, as community.proxmox takes them. Raises PveRefused for a combination that
    makes no sense, PveUnreachable, PveAuthFailed.
    """
    backend = params.get("backend") or "auto"
    host = params.get("api_host")
    if backend == "local" or (backend == "auto" and not host):
        from ._pve_local import LocalPve  # only where it is used: each backend has its own needs

        return LocalPve(timeout=float(params.get("timeout") or 60))
    return _https(params, host)


def _https(params: Mapping[str, Any], host: str | None) -> Pve:
    from ._pve_http import HttpsPve, Login

    user = params.get("api_user")
    token_id = params.get("api_token_id")
    if not host or not user:
        raise PveRefused(
            "backend https needs api_host and api_user (as root@pam); for the node itself use backend local"
        )
    if "@" not in user:
        raise PveRefused(f"api_user {user!r} lacks its realm: write {user}@pam or {user}@pve")
    secret = params.get("api_token_secret") or os.environ.get("PROXMOX_TOKEN_SECRET")
    password = params.get("api_password") or os.environ.get("PROXMOX_PASSWORD")
    if token_id and not secret:
        raise PveRefused(f"api_token_id {token_id} is given without api_token_secret")
    if not token_id and not password:
        raise PveRefused(f"for {user} on {host} neither api_token_id with api_token_secret nor api_password is given")
    if token_id and "!" in token_id:  # people copy the whole USER@REALM!ID
        user, token_id = token_id.split("!", 1)
    verify: bool | str = params.get("validate_certs", True)
    if verify and params.get("api_ca"):
        verify = str(params["api_ca"])
    login = Login(user, token_id or None, str(secret if token_id else password))
    return HttpsPve(host, int(params.get("api_port") or 8006), login, verify, float(params.get("timeout") or 60))
