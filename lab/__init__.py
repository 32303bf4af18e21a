# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab: throw-away systemd containers in which the roles run as on real machines, and the demo that drives them.

Run as ``python -m lab VERB`` from the root of the checkout (``./run`` does that); ``python -m lab --help`` lists the
verbs. Nothing outside one folder (``.cache/lab``) and one network interface (``orglab0``) is changed on the host.
"""
