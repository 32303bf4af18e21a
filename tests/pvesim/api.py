# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""All methods, in one router."""

from __future__ import annotations

from . import api_clone, api_node, api_qemu, api_resources
from .ha import Ha
from .routing import Router


def router(ha: Ha) -> Router:
    made = Router(ha)
    for part in (api_node, api_qemu, api_clone, api_resources):
        part.register(made)
    return made
