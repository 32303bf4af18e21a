# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig: virtual machines with a real kernel, twelve emulated GPUs and the shape of the reference host."""
