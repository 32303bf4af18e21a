# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Proxmox VE node to test against: its API over HTTPS, ``pvesh`` and ``qm`` over one state, VMs that are processes.

Test equipment, no part of the product, and never the word on what Proxmox VE does: it answers what `facts` and the
sources of PVE 9.2 say, and 501 to everything else. See docs/pvesim.md.
"""
