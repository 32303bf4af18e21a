# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel modules: which exist for the running kernel, which are loaded.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re

from ._root import Root


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _names(text: str) -> set[str]:
    """Names in modules.dep or modules.builtin: each line begins with a path like ``kernel/mm/zsmalloc.ko.xz``."""
    found = set()
    for line in text.splitlines():
        file = line.split(":", 1)[0].strip().rsplit("/", 1)[-1]
        match = re.fullmatch(r"(.+)\.ko(?:\.\w+)?", file)
        if match:
            found.add(_plain(match.group(1)))
    return found


def folder(root: Root) -> str:
    return f"/lib/modules/{root.read('/proc/sys/kernel/osrelease')}"


def exists(root: Root, name: str) -> bool:
    """Can the running kernel load it, or does it hold it already?"""
    if loaded(root, name):
        return True
    return _plain(name) in _names(root.read_or_none(f"{folder(root)}/modules.dep") or "")


def loaded(root: Root, name: str) -> bool:
    """Is it in the kernel, as a loaded module or built in?"""
    if root.exists(f"/sys/module/{_plain(name)}"):
        return True
    return _plain(name) in _names(root.read_or_none(f"{folder(root)}/modules.builtin") or "")


def in_use(root: Root, name: str) -> bool:
    """Do other modules or open devices hold it, so that it cannot be unloaded?"""
    top = f"/sys/module/{_plain(name)}"
    return bool(root.listdir(f"{top}/holders")) or (root.read_int(f"{top}/refcnt") or 0) > 0
