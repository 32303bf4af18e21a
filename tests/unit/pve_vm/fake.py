# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A few lines of Proxmox VE in memory, just strict enough to catch a careless caller.

What it copies of the real one: a property string is replaced as a whole (so a MAC that is left out becomes another
one), a volume that is asked for is made, a wrong digest is refused, options of a running VM wait. Anything it does not
know is an error.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from organism.core._pve_client import PveExists, PveForbidden, PveNotFound, PveStaleDigest, PveTaskFailed
from organism.core._pve_strings import parse, parse_option
from organism.core._pve_tasks import TaskResult, parse_upid

LIVE = {"name", "onboot", "tags", "description", "protection", "hookscript", "startup"}


@dataclass
class Guest:
    config: dict[str, Any]
    running: bool = False
    pending: dict[str, Any] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    type: str = "qemu"
    node: str = "pve1"

    @property
    def merged(self) -> dict[str, Any]:
        return {key: value for key, value in {**self.config, **self.pending}.items() if key not in self.deleted}


class FakePve:
    def __init__(self, *, backend: str = "local", root: bool = True) -> None:
        self.backend = backend
        self.is_root = root
        self.guests: dict[int, Guest] = {}
        self.maps: dict[str, dict[str, Any]] = {}
        self.pci: list[dict[str, Any]] = []
        self.checks: dict[str, list[dict[str, str]]] = {}
        self.nodes = {"pve1": 12}
        self.bridges = ["vmbr0"]
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.before_write: Callable[[FakePve], None] | None = None
        self.fails: dict[str, str] = {}
        self.macs = itertools.count(1)
        self.ignores_shutdown: set[int] = set()
        self.clock = 0.0

    # the protocol ------------------------------------------------------------------------------------------------

    def get(self, path: str, **params: Any) -> Any:
        return self._route("GET", path, params)

    def post(self, path: str, **params: Any) -> Any:
        return self._route("POST", path, params)

    def put(self, path: str, **params: Any) -> Any:
        return self._route("PUT", path, params)

    def delete(self, path: str, **params: Any) -> Any:
        return self._route("DELETE", path, params)

    def wait(self, upid: str, timeout: float) -> TaskResult:
        parsed = parse_upid(upid)
        if why := self.fails.pop(f"task {parsed.type}", None):
            raise PveTaskFailed(f"task {parsed.type}: {why}", exitstatus=why)
        return TaskResult(parsed, "OK")

    # what tests look at ------------------------------------------------------------------------------------------

    @property
    def writes(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [call for call in self.calls if call[0] != "GET"]

    def digest(self, vmid: int) -> str:
        return hashlib.sha1(json.dumps(self.guests[vmid].merged, sort_keys=True).encode()).hexdigest()

    # its inside --------------------------------------------------------------------------------------------------

    def _route(self, method: str, path: str, params: dict[str, Any]) -> Any:
        params = {key: value for key, value in params.items() if value is not None}
        self.calls.append((method, path, params))
        if method != "GET" and self.before_write:
            before, self.before_write = self.before_write, None
            before(self)
        if why := self.fails.pop(f"{method} {path}", None):
            raise PveTaskFailed(why, path=path)
        for pattern, handler in ROUTES[method].items():
            if found := re.fullmatch(pattern, path):
                return handler(self, params, *found.groups())
        raise AssertionError(f"the stand-in does not know {method} {path}")

    def guest(self, vmid: str) -> Guest:
        if int(vmid) not in self.guests:
            raise PveNotFound(f"Configuration file 'nodes/pve1/qemu-server/{vmid}.conf' does not exist")
        return self.guests[int(vmid)]

    def upid(self, kind: str, vmid: str) -> str:
        return f"UPID:pve1:00001234:00005678:69000000:{kind}:{vmid}:root@pam:"

    def resources(self, params: dict[str, Any]) -> Any:
        return [
            {
                "vmid": vmid,
                "name": guest.config.get("name"),
                "type": guest.type,
                "node": guest.node,
                "status": "running" if guest.running else "stopped",
                "template": guest.config.get("template", 0),
            }
            for vmid, guest in self.guests.items()
        ]

    def config(self, params: dict[str, Any], vmid: str) -> Any:
        return {**self.guest(vmid).merged, "digest": self.digest(int(vmid))}

    def pending(self, params: dict[str, Any], vmid: str) -> Any:
        guest = self.guest(vmid)
        out: list[dict[str, Any]] = [{"key": key, "value": value} for key, value in guest.config.items()]
        out += [{"key": key, "pending": value} for key, value in guest.pending.items()]
        return out + [{"key": key, "delete": 1} for key in guest.deleted]

    def set_config(self, params: dict[str, Any], vmid: str) -> Any:
        guest = self.guest(vmid)
        if params.pop("digest", None) not in (None, self.digest(int(vmid))):
            raise PveStaleDigest("detected modified configuration - file changed by other user? Try again.")
        gone = [key for key in params.pop("delete", "").split(",") if key]
        for key, value in params.items():
            if not self.is_root and key in ("affinity", "args", "hookscript", "hugepages"):
                raise PveForbidden(f"only root can set '{key}' config")
            self._one(guest, int(vmid), key, self.stored(key, value, int(vmid)))
        for key in gone:
            if guest.running and key not in LIVE:
                guest.deleted.add(key)
            else:
                guest.config.pop(key, None)

    def _one(self, guest: Guest, vmid: int, key: str, value: Any) -> None:
        if guest.running and key not in LIVE:
            guest.pending[key] = value
        else:
            guest.config[key] = value

    def stored(self, key: str, value: Any, vmid: int) -> Any:
        """As Proxmox VE writes it: volumes made, a MAC invented, numbers as numbers."""
        text = str(value)
        if re.fullmatch(r"(scsi|virtio|sata|ide|efidisk)\d+", key):
            string = parse_option(key, text)
            asked = re.fullmatch(r"([^:]+):(\d+|cloudinit)", string.get("file") or "")
            if asked:
                size = {"0": "2G", "cloudinit": "4M"}.get(asked[2], f"{asked[2]}G")
                string = string.with_({"file": f"{asked[1]}:vm-{vmid}-{key}", "import-from": None, "size": size})
            return string.render()
        if re.fullmatch(r"net\d+", key):
            string = parse_option(key, text)
            if "macaddr" not in string:
                rest = string.without("model").render()
                return f"{string.get('model')}=BC:24:11:00:00:{next(self.macs):02X}" + (f",{rest}" if rest else "")
            return text
        return int(text) if text.isdigit() and key != "hugepages" else text

    def post_config(self, params: dict[str, Any], vmid: str) -> Any:
        self.set_config(params, vmid)
        return self.upid("qmconfig", vmid)

    def create(self, params: dict[str, Any]) -> Any:
        vmid = int(params.pop("vmid"))
        if vmid in self.guests:
            raise PveExists(f"unable to create VM {vmid}: VM {vmid} already exists on node 'pve1'")
        params.pop("pool", None)
        self.guests[vmid] = Guest({key: self.stored(key, value, vmid) for key, value in params.items()})
        return self.upid("qmcreate", str(vmid))

    def clone(self, params: dict[str, Any], vmid: str) -> Any:
        config = {key: value for key, value in self.guest(vmid).config.items() if key not in ("template", "name")}
        for key in [key for key in config if key.startswith("net")]:
            config[key] = self.stored(key, parse_option(key, config[key]).without("macaddr").render(), 0)
        if params.get("name"):
            config["name"] = params["name"]
        self.guests[int(params["newid"])] = Guest(config)
        return self.upid("qmclone", vmid)

    def resize(self, params: dict[str, Any], vmid: str) -> Any:
        config = self.guest(vmid).config
        config[params["disk"]] = (
            parse_option(params["disk"], config[params["disk"]]).with_(size=params["size"]).render()
        )
        return self.upid("resize", vmid)

    def destroy(self, params: dict[str, Any], vmid: str) -> Any:
        del self.guests[int(vmid)]
        return self.upid("qmdestroy", vmid)

    def status(self, params: dict[str, Any], vmid: str) -> Any:
        return {"status": "running" if self.guest(vmid).running else "stopped", "vmid": int(vmid), "ha": {"managed": 0}}

    def start(self, params: dict[str, Any], vmid: str) -> Any:
        guest = self.guest(vmid)
        guest.config = guest.merged
        guest.pending, guest.deleted, guest.running = {}, set(), "task qmstart" not in self.fails
        return self.upid("qmstart", vmid)

    def stop(self, params: dict[str, Any], vmid: str) -> Any:
        self.guest(vmid).running = False
        return self.upid("qmstop", vmid)

    def shutdown(self, params: dict[str, Any], vmid: str) -> Any:
        if int(vmid) in self.ignores_shutdown:
            self.fails["task qmshutdown"] = "VM quit/powerdown failed - got timeout"
        else:
            self.guest(vmid).running = False
        return self.upid("qmshutdown", vmid)

    def mapping_list(self, params: dict[str, Any]) -> Any:
        checks = self.checks if "check-node" in params else {}
        return [{"id": name, **entry, "checks": checks.get(name, [])} for name, entry in self.maps.items()]

    def mapping(self, params: dict[str, Any], name: str) -> Any:
        if name not in self.maps:
            raise PveNotFound(f"pci mapping '{name}' not found")
        return {"id": name, **self.maps[name], "digest": self.map_digest()}

    def map_digest(self) -> str:
        return hashlib.sha1(json.dumps(self.maps, sort_keys=True).encode()).hexdigest()

    def mapping_create(self, params: dict[str, Any]) -> Any:
        name = params.pop("id")
        if name in self.maps:
            raise PveExists(f"pci ID '{name}' already defined")
        self.maps[name] = params
        for text in params["map"]:
            parse(None, text)

    def mapping_set(self, params: dict[str, Any], name: str) -> Any:
        if params.pop("digest", None) not in (None, self.map_digest()):
            raise PveStaleDigest("detected modified configuration - file changed by other user? Try again.")
        for key in [key for key in str(params.pop("delete", "")).split(",") if key]:
            self.maps[name].pop(key, None)
        self.maps[name].update(params)

    def mapping_delete(self, params: dict[str, Any], name: str) -> Any:
        del self.maps[name]


Q = r"/nodes/pve1/qemu/(\d+)"
ROUTES: dict[str, dict[str, Callable[..., Any]]] = {
    "GET": {
        "/cluster/resources": FakePve.resources,
        "/cluster/nextid": lambda pve, params: next(n for n in itertools.count(100) if n not in pve.guests),
        "/nodes": lambda pve, params: [
            {"node": name, "status": "online", "maxcpu": cpus, "maxmem": 32768 * 1024**2}
            for name, cpus in pve.nodes.items()
        ],
        "/nodes/pve1/network": lambda pve, params: [{"iface": bridge} for bridge in pve.bridges],
        "/nodes/pve1/hardware/pci": lambda pve, params: pve.pci,
        "/cluster/mapping/pci": FakePve.mapping_list,
        "/cluster/mapping/pci/([^/]+)": FakePve.mapping,
        f"{Q}/config": FakePve.config,
        f"{Q}/pending": FakePve.pending,
        f"{Q}/status/current": FakePve.status,
    },
    "POST": {
        "/nodes/pve1/qemu": FakePve.create,
        "/cluster/mapping/pci": FakePve.mapping_create,
        f"{Q}/config": FakePve.post_config,
        f"{Q}/clone": FakePve.clone,
        f"{Q}/status/start": FakePve.start,
        f"{Q}/status/stop": FakePve.stop,
        f"{Q}/status/shutdown": FakePve.shutdown,
    },
    "PUT": {
        f"{Q}/config": FakePve.set_config,
        f"{Q}/resize": FakePve.resize,
        "/cluster/mapping/pci/([^/]+)": FakePve.mapping_set,
    },
    "DELETE": {Q: FakePve.destroy, "/cluster/mapping/pci/([^/]+)": FakePve.mapping_delete},
}
