# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The version; the wheelhouse appends `+src.<hash of the sources>`, so that changed sources are another version."""

from __future__ import annotations

VERSION = "0.1.0"
