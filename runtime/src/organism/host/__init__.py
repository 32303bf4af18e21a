# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keepers and commands of a tuned host, each a module with ``main(argv) -> int``.

They run under the system's Python before any virtual environment is there: the standard library, ``organism.core`` and
this package are all that they may import. The module ``host_tools`` installs them into ``/opt/organism/host``.
"""
