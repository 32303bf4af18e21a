# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which processes hold a PCI function now: virtual machines through VFIO, programs through DRM and NVIDIA's nodes.

A function must not be taken from them: unbinding a driver in use hangs or kills what uses it, and vfio-pci waits for
its virtual machine for ever (vfio_unregister_group_dev() in drivers/vfio/vfio_main.c).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ._gpu import nvidia_information
from ._iommu import Function
from ._root import Root

_NODES = ("/dev/vfio/", "/dev/dri/", "/dev/nvidia", "/dev/snd/")
_SHOWN = 3


def open_nodes(root: Root) -> dict[str, list[str]]:
    """Device nodes that processes have open, each with those processes in words."""
    found: dict[str, list[str]] = {}
    for pid in root.listdir("/proc"):
        if not pid.isdecimal():
            continue
        nodes = set()
        for descriptor in root.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(root.path(f"/proc/{pid}/fd/{descriptor}"))  # noqa: PTH115 - no file of this tree
            except OSError:
                continue  # closed meanwhile
            if target.startswith(_NODES):
                nodes.add(target)
        for node in sorted(nodes):
            found.setdefault(node, []).append(_process(root, pid))
    return found


def _process(root: Root, pid: str) -> str:
    words = (root.read_or_none(f"/proc/{pid}/cmdline") or "").split("\0")
    if "-id" in words[:-1] and re.fullmatch(r"\d+", words[words.index("-id") + 1]):
        return f"VM {words[words.index('-id') + 1]} (process {pid})"
    return f"{root.read_or_none(f'/proc/{pid}/comm') or 'process'} (process {pid})"


def nodes_of(root: Root, it: Function) -> list[str]:
    """The device nodes through which a function can be used now."""
    found = []
    if it.group is not None and it.driver == "vfio-pci":
        found.append(f"/dev/vfio/{it.group}")
    found += [f"/dev/vfio/devices/{name}" for name in root.listdir(f"{it.sysfs}/vfio-dev")]
    found += [
        f"/dev/dri/{name}" for name in root.listdir(f"{it.sysfs}/drm") if re.fullmatch(r"(card|renderD)\d+", name)
    ]
    for card in root.glob(f"{it.sysfs}/sound/card*"):
        found += [f"/dev/snd/{name}" for name in root.listdir(card) if re.match(r"(pcm|control|hw)C\d+", name)]
    minor = nvidia_information(root, it.address).get("Device Minor")
    if minor:
        found.append(f"/dev/nvidia{minor}")
    return found


def holders(root: Root, functions: Iterable[Function]) -> dict[str, list[str]]:
    """Who holds each function now, by address; those that nobody holds are missing."""
    opened = open_nodes(root)
    found: dict[str, list[str]] = {}
    for it in functions:
        who = [process for node in nodes_of(root, it) for process in opened.get(node, [])]
        if who:
            found[it.address] = list(dict.fromkeys(who))
    return found


def told(who: Iterable[str]) -> str:
    """Some holders in words."""
    names = list(who)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
