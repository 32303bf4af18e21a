# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control group of a VM on Proxmox VE: limiting it to zones, for now and for each later start.

A VM lives in a transient unit ``ID.scope`` of ``qemu.slice`` that exists only while it runs. A drop-in in
``/etc/systemd/system/ID.scope.d`` is applied when the scope is made, and ``daemon-reload`` does not apply it to a scope
that is there; ``systemctl set-property --runtime`` does, and is lost with the scope. So both are needed (systemd 257,
src/core/scope.c and unit.c; observed). The first such call realises all scopes of the slice, though: those that have a
drop-in by then are limited with it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import _cpu_list
from ._root import Root
from ._systemd import Runner

SLICE = "/sys/fs/cgroup/qemu.slice"


def dropin_path(vmid: int) -> str:
    return f"/etc/systemd/system/{vmid}.scope.d/50-organism.conf"


def dropin_text(cpus: Iterable[int]) -> str:
    return (
        "# Managed by Ansible (organism.proxmox, qemu_pin): changes made here are lost.\n"
        "# For the next start of the VM; a running one is changed by `systemctl set-property --runtime`.\n"
        f"[Scope]\nAllowedCPUs={_cpu_list.render(cpus)}\n"
    )


def current(root: Root, vmid: int) -> str | None:
    """The CPUs that a running scope is limited to, as a list; empty where there is no limit, None without the scope."""
    top = f"{SLICE}/{vmid}.scope"
    if not root.exists(top):
        return None
    return _cpu_list.normalise(root.read_or_none(f"{top}/cpuset.cpus") or "")


def at_start(root: Root, vmid: int) -> str | None:
    """The CPUs that our drop-in gives a scope when it is made, as a list; None without one."""
    text = root.read_or_none(dropin_path(vmid)) or ""
    match = re.search(r"^AllowedCPUs=(\S+)$", text, re.MULTILINE)
    return _cpu_list.normalise(match[1]) if match else None


def allowed(root: Root) -> str:
    """The CPUs that a scope without a limit has, as a list; empty where the kernel does not tell."""
    return _cpu_list.normalise(root.read_or_none(f"{SLICE}/cpuset.cpus.effective") or "")


def limit(vmid: int, cpus: str, run: Runner) -> None:
    """Limit a running scope; an empty list takes the limit away. Raises CommandError."""
    run(["systemctl", "set-property", "--runtime", f"{vmid}.scope", f"AllowedCPUs={cpus}"])
