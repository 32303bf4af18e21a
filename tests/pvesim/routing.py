# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Finding the method for a request, and what Proxmox VE does before the method: permissions, then parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .access import Caller
from .errors import ApiError, Unknown, bad_parameters, forbidden
from .ha import Ha
from .node import Node
from .schema import Schema

Handler = Callable[["Call"], Any]


@dataclass
class Call:
    """One request. ``params``: of path, query and body, in their types where the schema is known."""

    node: Node
    caller: Caller
    params: dict[str, Any]
    schema: Schema | None
    ha: Ha

    def text(self, name: str, default: str = "") -> str:
        value = self.params.get(name)
        return default if value is None else str(value)

    def number(self, name: str, default: int = 0) -> int:
        value = self.params.get(name)
        return default if value is None else int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.params.get(name)
        return default if value is None else str(value).lower() in ("1", "true", "yes", "on")

    @property
    def vmid(self) -> int:
        return int(self.params["vmid"])

    def root_only(self, *names: str) -> None:
        """Parameters of a call that are root@pam's alone."""
        for name in names:
            if self.params.get(name) and not self.caller.is_root:
                raise bad_parameters({name: "Only root may use this option."})


@dataclass(frozen=True)
class Permission:
    """What the API's dump calls ``permissions``: ``check`` in its own notation, or for whom it is open."""

    check: tuple[Any, ...] | None = None
    user: str | None = None


ALL = Permission(user="all")
WORLD = Permission(user="world")
ROOT_ONLY = Permission()


def perm(path: str, *privileges: str, any_of: bool = False) -> Permission:
    return Permission(("perm", path, privileges, *(("any", 1) if any_of else ())))


def either(*choices: Permission) -> Permission:
    return Permission(("or", *(choice.check for choice in choices)))


@dataclass(frozen=True)
class Route:
    verb: str
    template: str
    permission: Permission
    handler: Handler
    pattern: re.Pattern[str]


@dataclass
class Router:
    """All methods that are simulated."""

    ha: Ha
    routes: list[Route] = field(default_factory=list)

    def on(self, verb: str, template: str, permission: Permission) -> Callable[[Handler], Handler]:
        pattern = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)))

        def register(handler: Handler) -> Handler:
            self.routes.append(Route(verb, template, permission, handler, pattern))
            return handler

        return register

    def find(self, verb: str, path: str) -> tuple[Route, dict[str, str]] | None:
        for route in self.routes:
            if route.verb == verb and (found := route.pattern.fullmatch(path)):
                return route, found.groupdict()
        return None

    def dispatch(
        self, node: Node, schema: Schema | None, caller: Caller | None, verb: str, path: str, given: Mapping[str, Any]
    ) -> Any:
        """The data of the answer. ``caller`` None: nobody has logged in. Raises ApiError."""
        path = "/" + path.strip("/")
        found = self.find(verb, path)
        if found is None:
            if schema is not None and not _known(schema, verb, path):
                raise ApiError(501, f"Method '{verb} {path}' not implemented")
            raise Unknown(f"{verb} {path}")
        route, in_path = found
        for name, value in in_path.items():
            if name in given and str(given[name]) != value:
                raise bad_parameters({name: "duplicate parameter (already defined in URI) with conflicting values!"})
        params: dict[str, Any] = {**given, **in_path}
        _authorize(node, caller, route.permission, params)
        if schema is not None:
            method = schema.find(verb, route.template)
            if method is None:
                raise Unknown(f"{verb} {route.template}, which the schema does not have")
            params = schema.check(method, params)
        if "node" in in_path:
            node.check_node(in_path["node"])
        return route.handler(Call(node, caller or Caller(""), params, schema, self.ha))


def _known(schema: Schema, verb: str, path: str) -> bool:
    return any(
        method_verb == verb and re.fullmatch(re.sub(r"\{[\w-]+\}", "[^/]+", template), path)
        for method_verb, template in schema.methods
    )


def _authorize(node: Node, caller: Caller | None, permission: Permission, params: Mapping[str, Any]) -> None:
    """PVE::RPCEnvironment::check_api2_permissions. Raises 403."""
    if caller is None:
        if permission.user == "world":
            return
        raise forbidden("user != null")
    if caller.is_root or permission.user in ("all", "world"):
        return
    if permission.check is None:
        raise forbidden("user != root@pam")
    if not _allowed(node, caller, permission.check, params, raising=True):
        raise forbidden()


def _allowed(node: Node, caller: Caller, check: tuple[Any, ...], params: Mapping[str, Any], *, raising: bool) -> bool:
    kind = check[0]
    if kind == "or":
        return any(_allowed(node, caller, each, params, raising=False) for each in check[1:])
    if kind == "and":
        return all(_allowed(node, caller, each, params, raising=raising) for each in check[1:])
    if kind == "perm-modify":
        path = _filled(check[1], params)
        wanted = ["Permissions.Modify"]
        for top, privilege in (("storage", "Datastore.Allocate"), ("vms", "VM.Allocate"), ("pool", "Pool.Allocate")):
            if re.fullmatch(rf"/{top}/.+", path):
                wanted.append(privilege)
        any_of = True
    elif kind == "perm":
        if "require_param" in check and check[check.index("require_param") + 1] not in params:
            return False
        path, wanted, any_of = _filled(check[1], params), list(check[2]), "any" in check[3:]
    else:
        raise Unknown(f"the permission check {kind}")
    if raising:
        node.access.check(caller, path, wanted, any_of=any_of)
        return True
    return node.access.may(caller, path, wanted, any_of=any_of)


def _filled(template: str, params: Mapping[str, Any]) -> str:
    return re.sub(r"\{([\w-]+)\}", lambda found: str(params.get(found[1], "")), template)
