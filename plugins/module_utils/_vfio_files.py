# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files by which a host gives cards to vfio-pci at each boot, before their own drivers see them.

By address: a udev rule sets ``driver_override`` of just these functions while their "add" event is handled, which is
before the rule that loads drivers (80-drivers.rules). It asks for vendor and device too, so that after a change of
hardware nothing else is taken that has come to such an address. The initramfs gets the same rule.

By ids (on demand): options of vfio-pci, which take every card of that kind.

In both cases ``softdep`` lines load vfio-pci before the cards' own drivers, so that it is there to be chosen (S1h-D08).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ._host_files import FileWish
from ._iommu import Function
from ._root import Root

RULES = "/etc/udev/rules.d/10-organism-vfio.rules"
MODULES = "/etc/modules-load.d/organism-vfio.conf"
OPTIONS = "/etc/modprobe.d/organism-vfio.conf"
HOOK = "/etc/initramfs-tools/hooks/organism-vfio"
EARLY = (RULES, OPTIONS, HOOK)
"""Those of which the initramfs holds a copy."""
WAITING = "/run/organism/reboot-required.d/vfio"
ADDRESS_MODE, IDS_MODE = "address", "ids"
UPDATE_INITRAMFS = "/usr/sbin/update-initramfs"

HEAD = "# Managed by Ansible (organism.proxmox, pve_vfio): changes made here are lost.\n"

_VIRQFD_GONE = (6, 2)
"""Linux 6.2 built vfio_virqfd into vfio.ko (drivers/vfio/Makefile)."""

_DRIVERS = {
    ("03", "1002"): ("amdgpu", "radeon"),
    ("03", "10de"): ("nouveau", "nvidia", "nvidia_drm", "nvidiafb"),
    ("03", "8086"): ("i915", "xe"),
    ("0403", ""): ("snd_hda_intel",),
    ("0c03", ""): ("xhci_pci",),
    ("0c80", "10de"): ("i2c_nvidia_gpu",),
}
"""Class and vendor (empty: any) to the modules that would take such a function (their MODULE_DEVICE_TABLE)."""

_TAKE = f"""\
GOTO="organism_vfio_end"

LABEL="organism_vfio_take"
ATTR{{driver_override}}="vfio-pci"
# A driver that is part of the kernel was there first; but nothing is torn from a running host that waits for a reboot.
DRIVER=="?*", DRIVER!="vfio-pci", TEST!="{WAITING}", ATTR{{driver/unbind}}="$kernel"
ATTR{{[subsystem/pci]drivers_probe}}="$kernel"
RUN{{builtin}}+="kmod load vfio-pci"

LABEL="organism_vfio_end"
"""

_HOOK_TEXT = f"""\
#!/bin/sh
{HEAD}# Cards for virtual machines are bound in the initramfs already, since it may hold their own drivers.
set -e
case "$1" in
prereqs)
    exit 0
    ;;
esac
. /usr/share/initramfs-tools/hook-functions
manual_add_modules vfio_pci vfio_iommu_type1
if [ -e {RULES} ]; then
    mkdir -p "$DESTDIR/etc/udev/rules.d"
    cp -p {RULES} "$DESTDIR/etc/udev/rules.d/"
fi
"""


def rules(functions: Iterable[Function], reset_method: str = "") -> str:
    """The udev rule; one line a function. ``reset_method``: the only way to reset a card that the kernel may take."""
    functions = list(functions)
    lines = [
        f'KERNEL=="{f.address}", ATTR{{vendor}}=="0x{f.vendor}", ATTR{{device}}=="0x{f.device}", '
        'GOTO="organism_vfio_take"'
        for f in functions
    ]
    if reset_method:
        lines = [
            f'KERNEL=="{f.address}", ATTR{{vendor}}=="0x{f.vendor}", ATTR{{device}}=="0x{f.device}", '
            f'ATTR{{reset_method}}="{reset_method}"'
            for f in functions
            if f.is_display
        ] + lines
    head = 'ACTION!="add", GOTO="organism_vfio_end"\nSUBSYSTEM!="pci", GOTO="organism_vfio_end"\n'
    return HEAD + head + "\n".join(lines) + "\n" + _TAKE


def ids(functions: Iterable[Function]) -> tuple[str, ...]:
    """Each vendor:device once, in order of the functions."""
    return tuple(dict.fromkeys(f.id for f in functions))


def soft_dependencies(functions: Iterable[Function]) -> tuple[str, ...]:
    """Modules that must come after vfio-pci, so that it has the first choice."""
    found = {
        name
        for f in functions
        for (kind, vendor), names in _DRIVERS.items()
        if f.kind.startswith(kind) and vendor in ("", f.vendor)
        for name in names
    }
    return tuple(sorted(found))


def options(functions: Iterable[Function], mode: str, *, disable_vga: bool) -> str:
    """Options of vfio-pci, and who has to wait for it."""
    functions = list(functions)
    words = [f"ids={','.join(ids(functions))}"] if mode == IDS_MODE else []
    words += ["disable_vga=1"] if disable_vga else []
    lines = [f"options vfio-pci {' '.join(words)}"] if words else []
    lines += [f"softdep {name} pre: vfio-pci" for name in soft_dependencies(functions)]
    return HEAD + "\n".join(lines) + "\n" if lines else ""


def modules(release: str) -> str:
    """What is loaded at boot. ``release``: of the running kernel."""
    version = re.match(r"(\d+)\.(\d+)", release)
    names = ["vfio", "vfio_iommu_type1", "vfio_pci"]
    if version and (int(version[1]), int(version[2])) < _VIRQFD_GONE:
        names.append("vfio_virqfd")
    return HEAD + "\n".join(names) + "\n"


def wanted(
    root: Root, functions: Iterable[Function], mode: str, *, disable_vga: bool, reset_method: str = ""
) -> list[FileWish]:
    """All files for these functions; none for none."""
    functions = list(functions)
    if not functions:
        return []
    found = [FileWish(MODULES, modules(root.read_or_none("/proc/sys/kernel/osrelease") or ""))]
    if mode == ADDRESS_MODE:
        found.append(FileWish(RULES, rules(functions, reset_method)))
    text = options(functions, mode, disable_vga=disable_vga)
    if text:
        found.append(FileWish(OPTIONS, text))
    if has_initramfs(root):
        found.append(FileWish(HOOK, _HOOK_TEXT, "0755"))
    return found


def has_initramfs(root: Root) -> bool:
    """Does the host build its initramfs with initramfs-tools, as Debian and Proxmox VE do?"""
    return root.exists(UPDATE_INITRAMFS)
