# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Users, tokens, roles, ACLs, tickets and CSRF tokens (PVE::AccessControl, PVE::RPCEnvironment).

What makes tokens different: a token's name is ``USER@REALM!ID``, and root's rights belong to the literal ``root@pam``
alone, so that no token of root is root. With ``privsep`` a token has what both it and its user are granted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .errors import ApiError, Died, forbidden

ROOT = "root@pam"
TICKET_LIFE_S = 7200

_GROUPS: dict[str, tuple[str, str, str, str]] = {  # root, admin, user, audit (PVE::AccessControl, privgroups)
    "VM": (
        "",
        "VM.Config.Disk VM.Config.CPU VM.Config.Memory VM.Config.Network VM.Config.HWType VM.Config.Options "
        "VM.Allocate VM.Clone VM.GuestAgent.Unrestricted VM.Migrate VM.Replicate VM.Snapshot VM.Snapshot.Rollback",
        "VM.Config.CDROM VM.Config.Cloudinit VM.Console VM.Backup VM.GuestAgent.FileRead "
        "VM.GuestAgent.FileSystemMgmt VM.GuestAgent.FileWrite VM.PowerMgmt",
        "VM.Audit VM.GuestAgent.Audit",
    ),
    "Sys": (
        "Sys.PowerMgmt Sys.Modify Sys.Incoming Sys.AccessNetwork Permissions.Modify",
        "Sys.Console Sys.Syslog",
        "",
        "Sys.Audit",
    ),
    "Datastore": ("", "Datastore.Allocate Datastore.AllocateTemplate", "Datastore.AllocateSpace", "Datastore.Audit"),
    "SDN": ("", "SDN.Allocate SDN.Audit", "SDN.Use", "SDN.Audit"),
    "User": ("Realm.Allocate", "User.Modify Group.Allocate Realm.AllocateUser", "", ""),
    "Pool": ("", "Pool.Allocate", "Pool.Audit", "Pool.Audit"),
    "Mapping": ("", "Mapping.Modify", "Mapping.Use", "Mapping.Audit"),
}


def _roles() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {"NoAccess": set(), "Administrator": set(), "PVEAdmin": set(), "PVEAuditor": set()}
    for name, texts in _GROUPS.items():
        root, admin, user, audit = (text.split() for text in texts)
        found["Administrator"] |= {*root, *admin, *user, *audit}
        found["PVEAdmin"] |= {*admin, *user, *audit} - {"Mapping.Modify"}
        found[f"PVE{name}Admin"] = {*admin, *user, *audit}
        if user:
            found[f"PVE{name}User"] = {*user, *audit}
        found["PVEAuditor"] |= set(audit)
    return {name: frozenset(privileges) for name, privileges in found.items()}


BUILT_IN_ROLES = _roles()
PRIVILEGES = BUILT_IN_ROLES["Administrator"]


@dataclass
class Token:
    secret: str
    privsep: bool = True
    expire: int = 0


@dataclass
class User:
    """``password`` None: cannot log in."""

    password: str | None = None
    tokens: dict[str, Token] = field(default_factory=dict)


@dataclass
class Caller:
    """Who asks. ``by_token``: no CSRF token is needed. ``cli``: qm and pvesh, whose workers run in the foreground."""

    name: str
    by_token: bool = False
    cli: bool = False

    @property
    def is_root(self) -> bool:
        return self.name == ROOT


class Access:
    """The user database of a node. ``clock``: seconds since the epoch."""

    def __init__(self, clock: Callable[[], float], root_password: str) -> None:
        self.clock = clock
        self.users: dict[str, User] = {ROOT: User(root_password)}
        self.roles: dict[str, frozenset[str]] = dict(BUILT_IN_ROLES)
        self.acl: dict[str, dict[str, dict[str, bool]]] = {}  # path -> user or token -> role -> propagate
        self.key = secrets.token_bytes(32)

    # ---- logging in --------------------------------------------------------------------------------------------------

    def login(self, user: str, password: str) -> tuple[str, str]:
        """Ticket and CSRF token. A good ticket is taken for a password, as renewing does. Raises 401."""
        known = self.users.get(user)
        good = known is not None and known.password is not None and hmac.compare_digest(known.password, password)
        if not good and not (known is not None and self._ticket_user(password) == user):
            raise ApiError(401, "authentication failure")
        stamp = f"{int(self.clock()):08X}"
        return f"PVE:{user}:{stamp}::{self._sign(f'ticket:{user}:{stamp}')}", self._csrf(user, stamp)

    def by_ticket(self, ticket: str, csrf: str | None, *, writes: bool) -> Caller:
        """Raises 401."""
        user = self._ticket_user(ticket)
        if user is None or user not in self.users:
            raise ApiError(401, "Authentication failed!")
        if writes:
            stamp = (csrf or "").partition(":")[0]
            if not csrf or not hmac.compare_digest(csrf, self._csrf(user, stamp)) or not self._fresh(stamp):
                raise ApiError(401, "Permission denied - invalid csrf token")
        return Caller(user)

    def by_token(self, text: str) -> Caller:
        """The value of the header after ``PVEAPIToken=``. Raises 401."""
        name, _, secret = text.partition("=")
        user, _, token_id = name.partition("!")
        token = self.users.get(user, User()).tokens.get(token_id)
        good = token is not None and hmac.compare_digest(token.secret, secret)
        if token is None or not good or (token.expire and token.expire < self.clock()):
            raise ApiError(401, "Authentication failed!")
        return Caller(name, by_token=True)

    def _ticket_user(self, ticket: str) -> str | None:
        parts = ticket.split(":")
        if len(parts) != 5 or parts[0] != "PVE" or not self._fresh(parts[2]):
            return None
        good = hmac.compare_digest(parts[4], self._sign(f"ticket:{parts[1]}:{parts[2]}"))
        return parts[1] if good else None

    def _fresh(self, stamp: str) -> bool:
        try:
            age = self.clock() - int(stamp, 16)
        except ValueError:
            return False
        return -300 < age < TICKET_LIFE_S

    def _csrf(self, user: str, stamp: str) -> str:
        return f"{stamp}:{self._sign(f'csrf:{user}:{stamp}')}"

    def _sign(self, text: str) -> str:
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    # ---- what is allowed ---------------------------------------------------------------------------------------------

    def privileges(self, name: str, path: str) -> frozenset[str]:
        """What a user or token may do on a path."""
        if name == ROOT:
            return PRIVILEGES
        user, _, token_id = name.partition("!")
        if not token_id:
            return self._granted(name, path)
        token = self.users.get(user, User()).tokens.get(token_id)
        if token is None:
            return frozenset()
        of_user = self.privileges(user, path)
        return of_user & self._granted(name, path) if token.privsep else of_user

    def _granted(self, name: str, path: str) -> frozenset[str]:
        """Of the entries on the way down, the deepest that reaches the path counts (PVE::AccessControl, roles)."""
        parts = [part for part in path.split("/") if part]
        roles: list[str] = []
        for depth in range(len(parts) + 1):
            entries = self.acl.get("/" + "/".join(parts[:depth]), {}).get(name, {})
            last = depth == len(parts)
            reaching = [role for role, propagate in entries.items() if last or propagate]
            roles = reaching or roles
        if "NoAccess" in roles:
            return frozenset()
        return frozenset().union(*(self.roles.get(role, frozenset()) for role in roles))

    def may(self, caller: Caller, path: str, privileges: Sequence[str], *, any_of: bool = False) -> bool:
        has = self.privileges(caller.name, path)
        return any(p in has for p in privileges) if any_of else all(p in has for p in privileges)

    def check(self, caller: Caller, path: str, privileges: Sequence[str], *, any_of: bool = False) -> None:
        """Raises 403 that names the path and the privilege."""
        has = self.privileges(caller.name, path)
        if any_of:
            if not any(p in has for p in privileges):
                raise forbidden(f"{path}, {'|'.join(privileges)}")
            return
        for privilege in privileges:
            if privilege not in has:
                raise forbidden(f"{path}, {privilege}")

    # ---- changing it -------------------------------------------------------------------------------------------------

    def add_token(self, user: str, token_id: str, *, privsep: bool, expire: int) -> str:
        """The secret, which is shown this once."""
        if user not in self.users:
            raise Died(f"no such user ('{user}')")
        if token_id in self.users[user].tokens:
            raise Died(f"Token already exists: '{token_id}' for user '{user}'")
        secret = str(uuid.uuid4())
        self.users[user].tokens[token_id] = Token(secret, privsep, expire)
        return secret

    def grant(self, path: str, name: str, role: str, *, propagate: bool = True, delete: bool = False) -> None:
        if role not in self.roles:
            raise Died(f"role '{role}' does not exist")
        entries = self.acl.setdefault(path, {}).setdefault(name, {})
        if delete:
            entries.pop(role, None)
        else:
            entries[role] = propagate
