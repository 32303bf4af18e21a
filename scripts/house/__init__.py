# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The house: what ./run does. Standard library only, since it runs before anything is installed."""
