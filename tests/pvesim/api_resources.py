# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Methods of resources: the cluster's list, PCI mappings, hardware and storages."""

from __future__ import annotations

from typing import Any

from . import lifecycle
from .errors import ApiError, Died, Unknown, bad_parameters
from .pci import PciMapping, check_entry, fields
from .routing import ALL, Call, Router, either, perm
from .vmconfig import split

PCI = "/cluster/mapping/pci"
ONE = "/mapping/pci/{id}"
SEES_STORAGE = perm("/storage/{storage}", "Datastore.Audit", "Datastore.AllocateSpace", any_of=True)


def register(router: Router) -> None:
    router.on("GET", "/cluster/resources", ALL)(resources)
    router.on("GET", "/cluster/nextid", ALL)(next_id)
    router.on("GET", "/cluster/ha/groups", perm("/", "Sys.Audit"))(ha_groups)
    router.on("GET", "/cluster/ha/resources", perm("/", "Sys.Audit"))(ha_resources)
    router.on("GET", PCI, ALL)(mappings)
    router.on("POST", PCI, perm("/mapping/pci", "Mapping.Modify"))(add_mapping)
    see = either(perm(ONE, "Mapping.Use"), perm(ONE, "Mapping.Modify"), perm(ONE, "Mapping.Audit"))
    router.on("GET", f"{PCI}/{{id}}", see)(mapping)
    router.on("PUT", f"{PCI}/{{id}}", perm(ONE, "Mapping.Modify"))(change_mapping)
    router.on("DELETE", f"{PCI}/{{id}}", perm("/mapping/pci", "Mapping.Modify"))(remove_mapping)
    router.on("GET", "/nodes/{node}/hardware/pci", perm("/", "Sys.Audit", "Sys.Modify", any_of=True))(hardware)
    router.on("GET", "/nodes/{node}/network", ALL)(network)
    router.on("GET", "/storage", ALL)(storages)
    router.on("POST", "/storage", perm("/storage", "Datastore.Allocate"))(add_storage)
    router.on("GET", "/storage/{storage}", perm("/storage/{storage}", "Datastore.Allocate"))(storage)
    router.on("PUT", "/storage/{storage}", perm("/storage", "Datastore.Allocate"))(change_storage)
    router.on("DELETE", "/storage/{storage}", perm("/storage", "Datastore.Allocate"))(remove_storage)
    router.on("GET", "/nodes/{node}/storage", ALL)(node_storages)
    router.on("GET", "/nodes/{node}/storage/{storage}/status", SEES_STORAGE)(storage_status)
    router.on("GET", "/nodes/{node}/storage/{storage}/content", SEES_STORAGE)(storage_content)


# ---- the cluster -----------------------------------------------------------------------------------------------------


def resources(call: Call) -> list[dict[str, Any]]:
    node, wanted = call.node, call.text("type")
    found: list[dict[str, Any]] = []
    if wanted in ("", "vm"):
        for vmid in node.configs.vmids():
            if node.access.may(call.caller, f"/vms/{vmid}", ["VM.Audit"]):
                try:
                    status = lifecycle.status(node, vmid)
                except Died:
                    continue  # destroyed in between
                template = int(status.get("template", 0))
                maxcpu = status.pop("cpus")
                if call.ha.manages(vmid):
                    status["hastate"] = call.ha.by_vmid[vmid].state
                found.append(
                    {
                        **status,
                        "id": f"qemu/{vmid}",
                        "type": "qemu",
                        "node": node.name,
                        "maxcpu": maxcpu,
                        "template": template,
                    }
                )
    if wanted in ("", "node") and node.access.may(call.caller, f"/nodes/{node.name}", ["Sys.Audit"]):
        found.append({"id": f"node/{node.name}", "type": "node", "node": node.name, "status": "online"})
    if wanted in ("", "storage"):
        found += [
            {
                "id": f"storage/{node.name}/{name}",
                "type": "storage",
                "node": node.name,
                "storage": name,
                "status": "available",
            }
            for name in node.storages.by_id
            if node.access.may(
                call.caller, f"/storage/{name}", ["Datastore.Audit", "Datastore.AllocateSpace"], any_of=True
            )
        ]
    return found


def next_id(call: Call) -> str:
    node = call.node
    if call.params.get("vmid"):
        if node.configs.exists(call.vmid):
            raise bad_parameters({"vmid": f"VM {call.vmid} already exists"})
        return str(call.vmid)
    return str(next(vmid for vmid in range(100, 1_000_000) if not node.configs.exists(vmid)))


def ha_resources(call: Call) -> list[dict[str, Any]]:
    if call.text("type", "vm") != "vm":
        return []
    return [{"sid": f"vm:{vmid}", "type": "vm", "state": each.state} for vmid, each in sorted(call.ha.by_vmid.items())]


def ha_groups(_call: Call) -> None:
    raise Died("ha groups have been migrated to rules")


# ---- mappings --------------------------------------------------------------------------------------------------------


def mappings(call: Call) -> list[dict[str, Any]]:
    node, checked = call.node, call.text("check-node")
    if checked and checked not in ("localhost", node.name):
        raise Died(f"wrong node to check - {checked} != {node.name}")
    found = []
    for name, each in sorted(node.mappings.by_id.items()):
        seen = ["Mapping.Modify", "Mapping.Use", "Mapping.Audit"]
        if not node.access.may(call.caller, f"/mapping/pci/{name}", seen, any_of=True):
            continue
        item = {**each.shown(), "digest": node.mappings.digest}
        if checked:
            item["checks"] = _checks(call, each)
        found.append(item)
    return found


def _checks(call: Call, each: PciMapping) -> list[dict[str, str]]:
    node = call.node
    entries = [entry for entry in map(fields, each.maps) if entry.get("node") == node.name]
    if not entries:
        return [{"severity": "warning", "message": f"No mapping for node {node.name}."}]
    found = []
    for entry in entries:
        try:
            check_entry(node.host, each.id, entry, each.mdev)
        except ApiError as error:
            found.append({"severity": "error", "message": f"Invalid configuration: {error.message}\n"})
    return found


def mapping(call: Call) -> dict[str, Any]:
    return {**call.node.mappings.find(call.text("id")).shown(), "digest": call.node.mappings.digest}


def _maps(call: Call) -> list[str]:
    given = call.params.get("map")
    return [str(each) for each in (given if isinstance(given, list) else [given])] if given is not None else []


def add_mapping(call: Call) -> None:
    name, known = call.text("id"), call.node.mappings
    with known.lock:
        if name in known.by_id:
            raise Died(f"create hardware mapping failed: pci ID '{name}' already defined")
        description = call.params.get("description")
        known.by_id[name] = PciMapping(
            name,
            _maps(call),
            None if description is None else str(description),
            call.flag("mdev"),
            call.flag("live-migration-capable"),
        )
        known.write()


def change_mapping(call: Call) -> None:
    name, known = call.text("id"), call.node.mappings
    with known.lock:
        known.check_digest(call.text("digest") or None)
        if name not in known.by_id:
            raise Died(f"update hardware mapping failed: pci ID '{name}' does not exist")
        each = known.by_id[name]
        for key in split(call.text("delete")):
            if key == "description":
                each.description = None
            elif key == "mdev":
                each.mdev = False
            elif key == "live-migration-capable":
                each.live_migration = False
            else:
                raise Unknown(f"deleting {key} of a mapping")
        if "map" in call.params:
            each.maps = _maps(call)
        if "description" in call.params:
            each.description = call.text("description")
        if "mdev" in call.params:
            each.mdev = call.flag("mdev")
        if "live-migration-capable" in call.params:
            each.live_migration = call.flag("live-migration-capable")
        known.write()


def remove_mapping(call: Call) -> None:
    with call.node.mappings.lock:
        call.node.mappings.by_id.pop(call.text("id"), None)
        call.node.mappings.write()


# ---- hardware --------------------------------------------------------------------------------------------------------


def hardware(call: Call) -> list[dict[str, Any]]:
    hidden = split(call.text("pci-class-blacklist", "05;06;0b"))
    return [
        device.listed()
        for _address, device in sorted(call.node.host.devices.items())
        if not any(device.pci_class.startswith(prefix) for prefix in hidden)
    ]


def network(call: Call) -> list[dict[str, Any]]:
    kind = call.text("type")
    if kind not in ("", "bridge", "any_bridge", "any_local_bridge"):
        raise Unknown(f"network devices of type {kind}")
    found = []
    for name in call.node.host.bridges:
        path = f"/sdn/zones/localnetwork/{name}"
        if call.node.access.may(call.caller, path, ["SDN.Audit", "SDN.Use"], any_of=True):
            found.append(
                {"iface": name, "type": "bridge", "active": 1, "autostart": 1, "method": "manual", "priority": 3}
            )
    return found


# ---- storages --------------------------------------------------------------------------------------------------------


def storages(call: Call) -> list[dict[str, Any]]:
    wanted = call.text("type")
    return [
        each.shown()
        for name, each in sorted(call.node.storages.by_id.items())
        if wanted in ("", each.kind)
        and call.node.access.may(
            call.caller, f"/storage/{name}", ["Datastore.Audit", "Datastore.AllocateSpace"], any_of=True
        )
    ]


def storage(call: Call) -> dict[str, Any]:
    return call.node.storages.find(call.text("storage")).shown()


def add_storage(call: Call) -> dict[str, Any]:
    kind, name = call.text("type"), call.text("storage")
    if kind == "zfspool":
        _only(call, "storage", "type", "pool", "content", "sparse")
        content = set(split(call.text("content", "images,rootdir")))
        if alien := sorted(content - {"images", "rootdir"}):
            raise Unknown(f"{alien[0]} on a zfspool")
        options = {"pool": call.text("pool"), **({"sparse": 1} if call.flag("sparse") else {})}
        call.node.storages.add(name, kind, content, call.node.top / "zfs" / name, **options)
        return {"storage": name, "type": kind}
    if kind != "dir":
        raise Unknown(f"making a storage of type {kind}")
    _only(call, "storage", "type", "path", "content")
    path = call.node.top / call.text("path").lstrip("/")
    content = set(split(call.text("content", "images,rootdir,vztmpl,iso,backup,snippets,import")))
    call.node.storages.add(name, kind, content, path)
    return {"storage": name, "type": kind}


def change_storage(call: Call) -> dict[str, Any]:
    each = call.node.storages.find(call.text("storage"))
    _only(call, "storage", "content", *(["sparse"] if each.kind == "zfspool" else []))
    if "sparse" in call.params:
        each.options["sparse"] = int(call.flag("sparse"))
    if "content" in call.params:
        each.content = set(split(call.text("content")))
        call.node.storages.write()
    return {"storage": each.id, "type": each.kind}


def remove_storage(call: Call) -> None:
    call.node.storages.remove(call.text("storage"))


def _only(call: Call, *names: str) -> None:
    for name in call.params:
        if name not in names:
            raise Unknown(f"a storage's {name}")


def node_storages(call: Call) -> list[dict[str, Any]]:
    wanted, only = call.text("content"), call.text("storage")
    return [
        call.node.storages.status(each)
        for name, each in sorted(call.node.storages.by_id.items())
        if (not wanted or set(split(wanted)) & each.content)
        and only in ("", name)
        and call.node.access.may(
            call.caller, f"/storage/{name}", ["Datastore.Audit", "Datastore.AllocateSpace"], any_of=True
        )
    ]


def storage_status(call: Call) -> dict[str, Any]:
    return call.node.storages.status(call.node.storages.find(call.text("storage")))


def storage_content(call: Call) -> list[dict[str, Any]]:
    kind = call.text("content")
    return [
        each
        for each in call.node.storages.volumes(call.node.storages.find(call.text("storage")))
        if kind in ("", each["content"]) and ("vmid" not in call.params or each.get("vmid") == call.vmid)
    ]
