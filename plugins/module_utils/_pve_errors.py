# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Proxmox VE answers when it does not do a thing, sorted by what the caller can do about it.

The status alone says little: a stale digest, a VM that does not exist, an id that is taken, a lock that is held and a
key that only root may set all come as 500 (seen on PVE 9.2), so the message is read.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class PveError(Exception):
    """A call that did not succeed. The text names the object, the reason and the next step; it holds no secret.

    ``status``: HTTP status, None where there was no answer or the local command gives none. ``errors``: parameter
    name to complaint.
    """

    def __init__(
        self, text: str, *, status: int | None = None, path: str = "", errors: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.path = path
        self.errors: dict[str, str] = dict(errors or {})


class PveUnreachable(PveError):
    """No answer: address, port, certificate, a node that is down, or a missing program."""


class PveAuthFailed(PveError):
    """401: wrong name, password or token, or a ticket that has expired."""


class PveForbidden(PveError):
    """A privilege is missing, or a key is root@pam's alone.

    ``privilege`` and ``object``: what the ACL lacks and where. ``root_only``: the keys that no API token may set.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int | None = 403,
        path: str = "",
        privilege: str = "",
        object: str = "",
        root_only: tuple[str, ...] = (),
    ) -> None:
        super().__init__(text, status=status, path=path)
        self.privilege = privilege
        self.object = object
        self.root_only = root_only


class PveNotFound(PveError):
    """The VM, mapping, storage or node does not exist."""


class PveExists(PveError):
    """The id is taken."""


class PveStaleDigest(PveError):
    """Somebody changed the configuration between our reading and our writing."""


class PveLocked(PveError):
    """A lock is held: by a backup, a migration, or another command that works on the VM."""


class PveRefused(PveError):
    """Parameters that Proxmox VE does not take; ``errors`` says which."""


class PveTaskFailed(PveError):
    """A task ended with something else than OK or warnings. ``exitstatus``, ``log``: its last lines."""

    def __init__(self, text: str, *, path: str = "", exitstatus: str = "", log: tuple[str, ...] = ()) -> None:
        super().__init__(text, path=path)
        self.exitstatus = exitstatus
        self.log = log


class PveTimeout(PveError):
    """A task did not end by its deadline; it still runs. ``log``: its last lines so far."""

    def __init__(self, text: str, *, path: str = "", log: tuple[str, ...] = ()) -> None:
        super().__init__(text, path=path)
        self.log = log


ROOT_ONLY_WAY_OUT = (
    "no API token may set it, not even one of root@pam with privsep=0: use backend local on the node as root, "
    "or a ticket of root@pam (api_user, api_password)"
)

_ONLY_ROOT = re.compile(r"only root (?:can|is allowed to|may) (?:set|use|modify) '([^']+)'")
_PERMISSION = re.compile(r"Permission check failed(?: \(([^,)]+), ([^)]+)\))?")
_STALE = re.compile(r"checksum (?:mismatch|missmatch)|detected modified configuration", re.IGNORECASE)
_LOCKED = re.compile(r"can't lock file|VM is locked|CT is locked|unable to acquire lock|got lock (?:request )?timeout")
_EXISTS = re.compile(r"already exists|already defined", re.IGNORECASE)
_MISSING = re.compile(
    r"Configuration file '[^']*' does not exist|unable to find configuration file"
    r"|no such (?:VM|CT|user|task|node|storage)|'[^']+' (?:not found|does not exist)|hostname lookup '[^']*' failed",
    re.IGNORECASE,
)


def classify(
    status: int | None, message: str, *, method: str, path: str, errors: Mapping[str, str] | None = None
) -> PveError:
    """The error for an answer. ``message``: the status line or the text of stderr, without a trailing newline."""
    told = " ".join(message.split()) or f"status {status}"
    what = f"{method} {path}"
    listed = "; ".join(f"{name}: {' '.join(str(text).split())}" for name, text in (errors or {}).items())
    whole = f"{told} ({listed})" if listed else told
    if status == 401 or (status is None and "authentication failure" in told):
        return PveAuthFailed(
            f"{what}: Proxmox VE does not accept the login ({told}); check user, realm, token id and secret, and "
            "whether the token or ticket has expired",
            status=status,
            path=path,
        )
    if only := tuple(dict.fromkeys(_ONLY_ROOT.findall(whole))):
        names = ", ".join(only)
        return PveForbidden(f"{what}: {told}; {names}: {ROOT_ONLY_WAY_OUT}", status=status, path=path, root_only=only)
    if found := _PERMISSION.search(told):
        on, privilege = found[1] or "", found[2] or ""
        step = f"grant {privilege} on {on} (pveum acl modify {on} ...)" if on else "only root@pam may call this"
        return PveForbidden(
            f"{what}: {told}; {step}; a token with privilege separation needs it itself, besides its user",
            status=status,
            path=path,
            privilege=privilege,
            object=on,
        )
    if status == 403:
        return PveForbidden(f"{what}: {told}", status=status, path=path)
    step, cls = _kind(status, whole)
    return cls(f"{what}: {whole}{step}", status=status, path=path, errors=errors)


def _kind(status: int | None, text: str) -> tuple[str, type[PveError]]:
    """What to tell the operator besides, and the class."""
    if _STALE.search(text):
        return "; somebody else changed it in between: read it again and repeat", PveStaleDigest
    if _LOCKED.search(text):
        return "; wait for the task that holds the lock (pvesh get /cluster/tasks), then repeat", PveLocked
    if status in (595, 596, 599) or (status is not None and status in (502, 503, 504)):
        return "; the node that should answer cannot be reached: check it and pveproxy", PveUnreachable
    if _MISSING.search(text) or status == 404:
        return "", PveNotFound
    if _EXISTS.search(text):
        return "", PveExists
    if status == 400 or "Parameter verification failed" in text:
        return "", PveRefused
    return "", PveError
