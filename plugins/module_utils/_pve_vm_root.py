# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options that only root@pam itself may set, for a connection that is somebody else: refused, or sent by ``pvesh``.

The two ways are two requests, each under the digest of what was read just before. The ordinary options go first, since
those are the ones that a privilege may be missing for.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _pve_vm_keys as keys
from ._pve_client import Pve, PveForbidden, PveNotFound, PveRefused
from ._pve_errors import ROOT_ONLY_WAY_OUT
from ._pve_find import Vm
from ._pve_vm_plan import ConfigPlan


def options(config: Mapping[str, Any], made: ConfigPlan) -> list[str]:
    """Those of a change that need root@pam itself."""
    found = []
    for option in (*made.sets, *made.deletes):
        before = config.get(option)
        if keys.root_only(option, None if before is None else str(before), made.sets.get(option)):
            found.append(option)
    return sorted(found)


def refuse(pve: Pve, root: Pve | None, vm: Vm, config: Mapping[str, Any], made: ConfigPlan, digest: Any) -> None:
    """Raises PveForbidden where nobody may send them, and PveRefused where ``root`` is no way to this very VM.

    ``digest``: of the configuration; None for a VM that is not there yet.
    """
    if pve.is_root:
        return
    only = options(config, made)
    if not only:
        return
    names = ", ".join(only)
    if root is None:
        raw = any(option.startswith("hostpci") for option in only)
        raise PveForbidden(
            f"{vm}: {names}: {ROOT_ONLY_WAY_OUT}, or root_only: local where this runs as root on the node"
            + ("; for hostpci use a PCI mapping (pve_pci_mapping), which needs Mapping.Use only" if raw else "")
            + ". Nothing was changed",
            root_only=tuple(only),
        )
    _same_node(root, vm, names, digest)


def _same_node(root: Pve, vm: Vm, names: str, digest: Any) -> None:
    """pvesh is asked for the same VM before anything is sent: it may belong to another cluster, or not be there."""
    other = f"{vm}: {names} were to be set by pvesh, which here "
    step = "; run this on a node of the cluster that api_host is in. Nothing was changed"
    if digest is None:
        if vm.node not in {each["node"] for each in root.get("/nodes")}:
            raise PveRefused(f"{other}knows no node {vm.node}{step}")
        return
    try:
        here = root.get(f"{vm.path}/config")
    except PveNotFound as error:
        raise PveRefused(f"{other}knows no such VM{step}") from error
    if here.get("digest") != digest:
        raise PveRefused(
            f"{other}has another configuration of that VM than api_host: it is of another cluster, or somebody changed "
            f"it just now (then repeat){step}"
        )


def way(pve: Pve, root: Pve | None, config: Mapping[str, Any], made: ConfigPlan) -> tuple[Pve, ConfigPlan]:
    """By whom to send which part of a change now; what is left is planned anew afterwards."""
    only = [] if pve.is_root else options(config, made)
    if not only or root is None:
        return pve, made
    ordinary = made.part(lambda option: option not in only)
    return (pve, ordinary) if ordinary else (root, made)
