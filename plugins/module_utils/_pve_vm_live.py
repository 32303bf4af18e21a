# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which changes of a running VM act at once and which wait for a cold start; pure.

After a change Proxmox VE says it itself (``GET .../pending``). Before one, check mode predicts it by the rules of
vmconfig_hotplug_pending (qemu-server 9.2.6, QemuServer.pm:4594-4900). A reboot inside the guest applies nothing,
since QEMU goes on; ``qm reboot`` or a stop and a start do.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import _pve_vm_keys as keys
from ._pve_strings import kind, parse_option
from ._pve_vm_plan import ConfigPlan

_AT_ONCE = frozenset(
    {
        "cpulimit", "cpuunits", "description", "hookscript", "hotplug", "migrate_downtime", "migrate_speed", "name",
        "onboot", "protection", "shares", "startup", "tags", "vmstatestorage",
    }
)  # fmt: skip
"""$fast_plug_option, and what is passed to the running process or is read only by Proxmox VE itself."""

_THROTTLE = ("bps", "iops", "mbps")
_LIVE_DRIVE = ("backup", "replicate", "shared", "media", "file", "size")


def waiting(pending: Iterable[Mapping[str, Any]]) -> list[str]:
    """Options that wait for a cold start, of the answer of ``GET .../pending``."""
    return sorted(str(each["key"]) for each in pending if each.get("pending") is not None or each.get("delete"))


def needs_cold_start(option: str, config: Mapping[str, Any], made: ConfigPlan) -> bool:
    """Whether a change of a running VM will wait, as far as the rules tell."""
    of = kind(option)
    if option in made.grows and option not in made.sets:
        return False
    if option in _AT_ONCE:
        return False
    plugged = str(config.get("hotplug", keys.DEFAULTS["hotplug"])).split(",")
    before, after = config.get(option), made.sets.get(option)
    if option == "balloon":
        return (str(before or "") == "0") != (str(after or "") == "0")
    if of == "net":
        return "network" not in plugged
    if of == "usb":
        return "usb" not in plugged
    if of in ("scsi", "virtio"):
        if "disk" not in plugged:
            return True
        if before is None or after is None:
            return False
        old, new = parse_option(option, str(before)).as_dict(), parse_option(option, after).as_dict()
        changed = [sub for sub in {*old, *new} if old.get(sub) != new.get(sub)]
        return not all(sub in _LIVE_DRIVE or sub.startswith(_THROTTLE) for sub in changed)
    return True
