# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Methods of access, nodes and tasks."""

from __future__ import annotations

import time
from typing import Any

from .access import User
from .errors import Died, Unknown, bad_parameters
from .node import VERSION
from .routing import ALL, WORLD, Call, Permission, Router, perm
from .tasks import Task, status
from .vmconfig import split

TASK = "/nodes/{node}/tasks/{upid}"
TOKEN = "/access/users/{userid}/token/{tokenid}"
OWN_OR_MODIFY = Permission(("or", ("userid-param", "self"), ("userid-group", ("User.Modify",))))
NEW_USER = Permission(
    ("and", ("userid-param", "Realm.AllocateUser"), ("userid-group", ("User.Modify",), "groups_param", "create"))
)


def register(router: Router) -> None:
    router.on("GET", "/version", ALL)(lambda call: dict(VERSION))
    router.on("POST", "/access/ticket", WORLD)(ticket)
    router.on("GET", "/access/users", ALL)(users)
    router.on("POST", "/access/users", NEW_USER)(add_user)
    router.on("POST", TOKEN, OWN_OR_MODIFY)(add_token)
    router.on("DELETE", TOKEN, OWN_OR_MODIFY)(remove_token)
    router.on("GET", "/access/roles", ALL)(roles)
    router.on("POST", "/access/roles", perm("/access", "Sys.Modify"))(add_role)
    router.on("GET", "/access/acl", ALL)(acl)
    router.on("PUT", "/access/acl", Permission(("perm-modify", "{path}")))(grant)
    router.on("GET", "/access/permissions", ALL)(own_permissions)
    router.on("GET", "/nodes", ALL)(nodes)
    router.on("GET", "/nodes/{node}/status", perm("/nodes/{node}", "Sys.Audit"))(node_status)
    router.on("GET", "/cluster/status", perm("/", "Sys.Audit"))(cluster_status)
    router.on("GET", "/nodes/{node}/tasks", ALL)(tasks)
    router.on("GET", "/cluster/tasks", ALL)(tasks)
    router.on("GET", f"{TASK}/status", ALL)(task_status)
    router.on("GET", f"{TASK}/log", ALL)(task_log)
    router.on("DELETE", TASK, ALL)(task_stop)


# ---- access ----------------------------------------------------------------------------------------------------------


def ticket(call: Call) -> dict[str, Any]:
    for name in ("otp", "tfa-challenge", "path", "privs"):
        if call.params.get(name):
            raise Unknown(f"logging in with {name}")
    user = call.text("username")
    if "@" not in user:
        user = f"{user}@{call.text('realm', 'pam')}"
    made, csrf = call.node.access.login(user, call.text("password"))
    return {"ticket": made, "CSRFPreventionToken": csrf, "username": user, "cap": {}}


def users(call: Call) -> list[dict[str, Any]]:
    access = call.node.access
    me = call.caller.name.partition("!")[0]
    all_of_them = access.may(call.caller, "/access/groups", ["User.Modify", "Sys.Audit"], any_of=True)
    found = []
    for name, user in sorted(access.users.items()):
        if all_of_them or name == me:
            item: dict[str, Any] = {"userid": name, "enable": 1, "expire": 0, "realm-type": name.partition("@")[2]}
            if call.flag("full"):
                item["tokens"] = [
                    {"tokenid": token_id, "privsep": int(token.privsep), "expire": token.expire}
                    for token_id, token in sorted(user.tokens.items())
                ]
            found.append(item)
    return found


def add_user(call: Call) -> None:
    name = call.text("userid")
    with call.node.guard:
        if name in call.node.access.users:
            raise Died(f"create user failed: user '{name}' already exists")
        call.node.access.users[name] = User(call.text("password") or None)


def add_token(call: Call) -> dict[str, Any]:
    user, token_id = call.text("userid"), call.text("tokenid")
    privsep, expire = call.flag("privsep", True), call.number("expire")
    secret = call.node.access.add_token(user, token_id, privsep=privsep, expire=expire)
    info = {"privsep": int(privsep), "expire": expire}
    return {"full-tokenid": f"{user}!{token_id}", "info": info, "value": secret}


def remove_token(call: Call) -> None:
    user, token_id = call.text("userid"), call.text("tokenid")
    known = call.node.access.users.get(user)
    if known is None or known.tokens.pop(token_id, None) is None:
        raise Died(f"no such token '{token_id}' for user '{user}'")


def roles(call: Call) -> list[dict[str, Any]]:
    return [
        {"roleid": name, "privs": ",".join(sorted(privileges))}
        for name, privileges in sorted(call.node.access.roles.items())
    ]


def add_role(call: Call) -> None:
    name = call.text("roleid")
    with call.node.guard:
        if name in call.node.access.roles:
            raise Died(f"create role failed: role '{name}' already exists")
        call.node.access.roles[name] = frozenset(split(call.text("privs")))


def acl(call: Call) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "ugid": name,
            "type": "token" if "!" in name else "user",
            "roleid": role,
            "propagate": int(propagate),
        }
        for path, entries in sorted(call.node.access.acl.items())
        if call.node.access.may(call.caller, path, ["Permissions.Modify"])
        for name, granted in sorted(entries.items())
        for role, propagate in sorted(granted.items())
    ]


def grant(call: Call) -> None:
    if call.params.get("groups"):
        raise Unknown("groups in an ACL")
    names = [*split(call.text("users")), *split(call.text("tokens"))]
    if not names:
        raise bad_parameters({"users": "either 'users', 'groups' or 'tokens' is required."})
    path = "/" + call.text("path").strip("/")
    for name in names:
        for role in split(call.text("roles")):
            call.node.access.grant(path, name, role, propagate=call.flag("propagate", True), delete=call.flag("delete"))


def own_permissions(call: Call) -> dict[str, dict[str, int]]:
    if call.params.get("userid"):
        raise Unknown("the permissions of somebody else")
    access = call.node.access
    paths = [call.text("path")] if call.params.get("path") else ["/", "/vms", "/storage", "/nodes", *access.acl]
    found = {path: dict.fromkeys(sorted(access.privileges(call.caller.name, path)), 1) for path in paths}
    return {path: privileges for path, privileges in found.items() if privileges}


# ---- nodes and tasks -------------------------------------------------------------------------------------------------


def nodes(call: Call) -> list[dict[str, Any]]:
    node = call.node
    return [
        {
            "node": node.name,
            "id": f"node/{node.name}",
            "type": "node",
            "status": "online",
            "level": "",
            "maxcpu": node.host.cpus,
            "maxmem": node.host.memory * 1024 * 1024,
            "uptime": int(time.time() - node.started),
        }
    ]


def node_status(call: Call) -> dict[str, Any]:
    host = call.node.host
    return {
        "pveversion": f"pve-manager/{VERSION['version']}/{VERSION['repoid']}",
        "cpuinfo": {"cpus": host.cpus, "sockets": 1, "cores": host.cpus // 2, "model": "pvesim"},
        "memory": {"total": host.memory * 1024 * 1024, "used": 0, "free": host.memory * 1024 * 1024},
        "uptime": int(time.time() - call.node.started),
        "kversion": "Linux 7.0.14-14-pve",
    }


def cluster_status(call: Call) -> list[dict[str, Any]]:
    name = call.node.name
    return [
        {"type": "node", "id": f"node/{name}", "name": name, "local": 1, "online": 1, "nodeid": 0, "ip": "127.0.0.1"}
    ]


def _own(call: Call, task: Task, privilege: str) -> None:
    """A task is its user's, and a token's is that token's; others need a privilege on the node."""
    if task.user != call.caller.name:
        call.node.access.check(call.caller, f"/nodes/{task.node}", [privilege])


def tasks(call: Call) -> list[dict[str, Any]]:
    node = call.node
    auditor = node.access.may(call.caller, f"/nodes/{node.name}", ["Sys.Audit"])
    found = []
    for task in sorted(node.tasks.by_upid.values(), key=lambda each: -each.started):
        if not auditor and task.user != call.caller.name:
            continue
        if call.params.get("vmid") and task.id != str(call.vmid):
            continue
        if call.params.get("typefilter") and task.type != call.text("typefilter"):
            continue
        item = {key: value for key, value in status(task).items() if key not in ("status", "exitstatus")}
        if task.ended is not None:
            item.update(endtime=int(task.ended), status=task.exitstatus)
        found.append(item)
    return found[: call.number("limit", 50)]


def task_status(call: Call) -> dict[str, Any]:
    task = call.node.tasks.find(call.text("upid"))
    _own(call, task, "Sys.Audit")
    return status(task)


def task_log(call: Call) -> list[dict[str, Any]]:
    task = call.node.tasks.find(call.text("upid"))
    _own(call, task, "Sys.Audit")
    first = call.number("start")
    lines = task.lines[first : first + (call.number("limit", 50) or len(task.lines))]
    return [{"n": first + index + 1, "t": line} for index, line in enumerate(lines)]


def task_stop(call: Call) -> None:
    task = call.node.tasks.find(call.text("upid"))
    _own(call, task, "Sys.Modify")
    call.node.tasks.abort(task)
