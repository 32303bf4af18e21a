# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Changing a VM's configuration: what becomes pending, what is live at once (PVE::API2::Qemu, update_vm_api)."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from . import hooks, permissions
from .access import Caller
from .conf import Conf
from .devices import DRIVE, add_unused, default_boot, make_volume, parse_drive, parse_net, with_mac
from .errors import ApiError, Died, bad_parameters
from .formats import parse_hotplug
from .node import Node
from .startcheck import memory_of

LIVE = frozenset(
    {
        "description",
        "hookscript",
        "lock",
        "migrate_downtime",
        "migrate_speed",
        "name",
        "onboot",
        "protection",
        "shares",
        "startup",
        "tags",
        "vmstatestorage",
        "cicustom",
        "cipassword",
        "citype",
        "ciuser",
        "ciupgrade",
        "nameserver",
        "searchdomain",
        "sshkeys",
    }
)
"""Options without any effect on the running VM ($fast_plug_option): live at once. So are ``ipconfigN``."""

COLD_DRIVE = ("aio", "discard", "iothread", "queues", "product", "cache", "ssd", "vendor", "ro")
COLD_NET = ("model", "macaddr", "queues", "mtu")
CALL_ONLY = frozenset(
    {"digest", "delete", "revert", "force", "skiplock", "background_delay", "import-working-storage", "node", "vmid"}
)


def split(text: str) -> list[str]:
    return [word for word in re.split(r"[,;\s\0]+", text) if word]


def is_live(key: str) -> bool:
    return key in LIVE or re.fullmatch(r"ipconfig\d+", key) is not None


# ---- pending changes that become effective ---------------------------------------------------------------------------


def cleanup_pending(conf: Conf) -> None:
    """A pending value equal to the effective one, and a removal of what is not there, wait for nothing."""
    conf.pending = {key: value for key, value in conf.pending.items() if conf.values.get(key) != value}
    conf.delete = {key: force for key, force in conf.delete.items() if key in conf.values}


def apply_pending(node: Node, vmid: int, conf: Conf) -> None:
    """What a stopped VM does with its pending changes: all of them."""
    for key in list(conf.delete):
        _remove(node, conf, key)
    cleanup_pending(conf)
    for key, value in list(conf.pending.items()):
        if key in conf.values and DRIVE.fullmatch(key):
            _replace_drive(node, conf, key, value)
        conf.values[key] = conf.pending.pop(key)
    node.configs.write(vmid, conf)


def _remove(node: Node, conf: Conf, key: str) -> None:
    value = conf.values.pop(key, None)
    if value is not None and DRIVE.fullmatch(key):
        if conf.delete[key]:
            node.storages.free(parse_drive(value)["file"])
        else:
            add_unused(node, conf.values, value)
    conf.delete.pop(key)


def _replace_drive(node: Node, conf: Conf, key: str, value: str) -> None:
    old = conf.values[key]
    if parse_drive(old).get("file") != parse_drive(value).get("file"):
        del conf.values[key]
        add_unused(node, conf.values, old)
        conf.values[key] = old


def hotplug_pending(node: Node, vmid: int, conf: Conf, chosen: set[str]) -> dict[str, str]:
    """What a running VM takes at once; the rest stays pending. Returns complaints by key."""
    for key in [key for key in conf.pending if is_live(key)]:
        conf.values[key] = conf.pending.pop(key)
    features = parse_hotplug(conf.values.get("hotplug", "1"))
    errors: dict[str, str] = {}
    for key in [key for key in conf.delete if key in chosen]:
        if _hot_remove(conf, key, features):
            _remove(node, conf, key)
    for key in [key for key in conf.pending if key in chosen]:
        try:
            if _hot_change(conf, key, conf.pending[key], features):
                if key in conf.values and DRIVE.fullmatch(key):
                    _replace_drive(node, conf, key, conf.pending[key])
                conf.values[key] = conf.pending.pop(key)
        except ApiError as error:
            errors[key] = f"hotplug problem - {error.message}\n"
    node.configs.write(vmid, conf)
    return errors


def _hot_remove(conf: Conf, key: str, features: set[str]) -> bool:
    if is_live(key) or key in ("cpuunits", "cpulimit"):
        return True
    if key == "balloon":
        return conf.values.get("balloon") != "0"
    if re.fullmatch(r"net\d+", key):
        return "network" in features
    if DRIVE.fullmatch(key):
        return "disk" in features and not re.match(r"efidisk|ide|sata|tpmstate", key)
    if key == "hotplug":
        return re.search("cpu|memory", conf.values.get("hotplug", "")) is None
    if key == "tablet" or re.fullmatch(r"usb\d+", key):
        return "usb" in features
    return False


def _hot_change(conf: Conf, key: str, value: str, features: set[str]) -> bool:
    if key in ("cpuunits", "cpulimit", "agent"):
        return True
    if key == "balloon":
        return (conf.values.get("balloon") != "0") == (value != "0")
    if key == "hotplug":
        return re.search("cpu|memory", value + conf.values.get("hotplug", "")) is None
    if key == "vcpus":
        return "cpu" in features
    if key == "memory":
        return "memory" in features
    if key == "tablet" or re.fullmatch(r"usb\d+", key):
        return "usb" in features
    if re.fullmatch(r"net\d+", key):
        return _hot_net(conf.values.get(key), value, features)
    if DRIVE.fullmatch(key):
        return _hot_drive(key, conf.values.get(key), value, features)
    return False


def _hot_net(old: str | None, new: str, features: set[str]) -> bool:
    """Model, MAC, queues and MTU need the device to be unplugged; the rest is set on the bridge."""
    if old is None:
        return "network" in features
    before, after = parse_net(old), parse_net(new)
    swapped = any(before.get(key) != after.get(key) for key in COLD_NET)
    return "network" in features if swapped or not (before.get("bridge") and after.get("bridge")) else True


def _hot_drive(key: str, old: str | None, new: str, features: set[str]) -> bool:
    if re.match(r"efidisk|tpmstate", key):
        return False
    if old is None:
        return "disk" in features and not re.match(r"ide|sata", key)
    before, after = parse_drive(old), parse_drive(new)
    if before.get("media", "disk") != after.get("media", "disk"):
        raise Died("unable to change media type")
    if before.get("media") == "cdrom":
        return True
    if before.get("file") != after.get("file"):
        return "disk" in features and not re.match(r"ide|sata", key)
    return all(before.get(each) == after.get(each) for each in COLD_DRIVE)


# ---- an update -------------------------------------------------------------------------------------------------------


def prepare(
    node: Node, caller: Caller, vmid: int, params: Mapping[str, Any]
) -> Callable[[Callable[[str], None]], None]:
    """All that is checked before the lock is taken; what it returns does the work under the lock.

    Raises ApiError.
    """
    options = {key: str(value) for key, value in params.items() if key not in CALL_ONLY}
    delete, revert = split(str(params.get("delete", ""))), split(str(params.get("revert", "")))
    if not options and not delete and not revert:
        raise Died("no options specified")
    for key in [*delete, *revert]:
        word = "delete" if key in delete else "revert"
        if not re.fullmatch(r"[a-z][a-z_\d-]*", key):
            raise bad_parameters({word: f"unknown option '{key}'"})
        if key in options:
            raise bad_parameters({"delete": f"you can't use '-{key}' and -{word} {key}' at the same time"})
    for key, value in options.items():
        if re.fullmatch(r"net\d+", key):
            options[key] = with_mac(value)
        elif key == "hookscript":
            try:
                hooks.check(node, value)
            except ApiError as error:
                raise bad_parameters({key: error.message}) from None
    permissions.check_keys(node, caller, vmid, [*delete, *options])
    permissions.check_storage(node, caller, options)
    permissions.check_bridges(node, caller, options)
    _load(node, vmid, params, options, revert)

    def work(say: Callable[[str], None]) -> None:
        conf = _load(node, vmid, params, options, revert)
        shown = [
            f"-{key} {value}" for key, value in sorted(params.items()) if key not in ("node", "vmid", "cipassword")
        ]
        say(f"update VM {vmid}: {' '.join(shown)}")
        _change(node, caller, vmid, conf, (options, delete, revert), bool(params.get("force")))

    return work


def _load(node: Node, vmid: int, params: Mapping[str, Any], options: dict[str, str], revert: list[str]) -> Conf:
    conf = node.configs.load(vmid)
    digest = params.get("digest")
    if digest and digest != conf.digest:
        raise Died("checksum mismatch (file change by other user?)")
    if "lock" in conf.values and not params.get("skiplock"):
        raise Died(f"VM is locked ({conf.values['lock']})")
    if "memory" in options or "balloon" in options:
        memory = memory_of({"memory": options.get("memory") or conf.merged().get("memory", "512")})
        if int(options.get("balloon") or conf.merged().get("balloon") or 0) > memory:
            raise Died("balloon value too large (must be smaller than assigned memory)")
    return conf


def _change(
    node: Node,
    caller: Caller,
    vmid: int,
    conf: Conf,
    what: tuple[dict[str, str], list[str], list[str]],
    force: bool,
) -> None:
    options, delete, revert = what
    chosen = {*options, *delete}
    for key in revert:
        conf.pending.pop(key, None)
        conf.delete.pop(key, None)
    for key in delete:
        value = conf.values.get(key, conf.pending.get(key))
        if value is None:
            continue
        if DRIVE.fullmatch(key):
            if conf.values.get("protection") == "1":
                raise Died(f"can't remove drive '{key}' - protection mode enabled")
            permissions.check_drive(node, caller, vmid, value)
        permissions.check_value(node, caller, vmid, key, value)
        waiting = conf.pending.pop(key, None)
        if key.startswith("unused"):
            node.storages.free(conf.values.pop(key))
            continue
        if waiting is not None and DRIVE.fullmatch(key):
            add_unused(node, conf.values, waiting)
        conf.delete[key] = force
        _drop_from_boot(conf, key, chosen)
    for key, value in options.items():
        conf.delete.pop(key, None)
        _set(node, caller, vmid, conf, key, value)
    _check_boot(conf, options)
    cleanup_pending(conf)
    node.configs.write(vmid, conf)
    if not conf.has_pending:
        return
    if node.machine(vmid) is None:
        apply_pending(node, vmid, conf)
        return
    errors = hotplug_pending(node, vmid, conf, chosen)
    if errors:
        raise bad_parameters(errors)


def _set(node: Node, caller: Caller, vmid: int, conf: Conf, key: str, value: str) -> None:
    old = conf.values.get(key)
    if old is not None:
        permissions.check_value(node, caller, vmid, key, old)
    permissions.check_value(node, caller, vmid, key, value)
    if DRIVE.fullmatch(key):
        if old is not None:
            permissions.check_drive(node, caller, vmid, old)
        permissions.check_drive(node, caller, vmid, value)
        if key in conf.pending:
            add_unused(node, conf.values, conf.pending[key])
        value, _made = make_volume(node, vmid, key, value)
    if key == "vmgenid" and value == "1":
        value = str(uuid.uuid4())
    if key == "tags":
        value = ";".join(sorted({tag.lower() for tag in split(value)}))
    conf.pending[key] = value


def _drop_from_boot(conf: Conf, key: str, chosen: set[str]) -> None:
    order = conf.merged().get("boot", "")
    if order.startswith("order=") and key in order.removeprefix("order=").split(";"):
        left = [each for each in order.removeprefix("order=").split(";") if each != key]
        conf.pending["boot"] = f"order={';'.join(left)}" if left else ""
        chosen.add("boot")


def _check_boot(conf: Conf, options: Mapping[str, str]) -> None:
    order = options.get("boot", "")
    if order.startswith("order="):
        there = conf.merged()
        for device in split(order.removeprefix("order=")):
            if device not in there:
                raise Died(f"invalid bootorder: device '{device}' does not exist'")


# ---- a new VM, and the end of one ------------------------------------------------------------------------------------


def create(node: Node, vmid: int, options: Mapping[str, str]) -> None:
    """Make volumes and write the configuration; at a failure the volumes go again. Raises Died."""
    values = dict(options)
    made: list[str] = []
    try:
        for key in sorted(values):
            if DRIVE.fullmatch(key):
                values[key], volume = make_volume(node, vmid, key, values[key])
                made += [volume] if volume else []
    except ApiError as error:
        for volume in made:
            node.storages.free(volume)
        raise Died(f"unable to create VM {vmid} - {error.message}") from None
    values.setdefault("boot", default_boot(values))
    values.setdefault("meta", f"creation-qemu=11.0.0,ctime={int(time.time())}")
    values.setdefault("smbios1", f"uuid={uuid.uuid4()}")
    if values.get("vmgenid", "1") == "1":
        values["vmgenid"] = str(uuid.uuid4())
    if "tags" in values:
        values["tags"] = ";".join(sorted({tag.lower() for tag in split(values["tags"])}))
    node.configs.write(vmid, Conf({key: value for key, value in values.items() if value != ""}))


def destroy(node: Node, vmid: int) -> None:
    conf = node.configs.load(vmid)
    for key, value in {**conf.values, **conf.pending}.items():
        if DRIVE.fullmatch(key):
            file = parse_drive(value).get("file", "")
            if re.search(rf"vm-{vmid}-", file):
                node.storages.free(file)
    node.configs.path(vmid).unlink()
