# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""organism-audit on cards: in force, waiting, gone, and files that somebody changed."""

from __future__ import annotations

from collections.abc import Callable

from organism.core import _host_audit, _vfio_files
from organism.core._check import Check
from organism.core._host_audit_parts import judges

from .host import Host, write

Hosts = Callable[[str], Host]


def checks(it: Host) -> list[Check]:
    found = _host_audit.audit(_host_audit.Host(it.root, it.run), judges())
    return [check for check in found if check.subject.startswith("vfio")]


def test_cards_in_force_waiting_and_gone(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"})
    waiting = [check for check in checks(it) if check.ok is None]
    assert [check.subject for check in waiting] == ["vfio 0000:05:00.0", "vfio 0000:05:00.1"]
    assert "has amdgpu, and waits for a reboot" in waiting[0].detail
    it.boot()
    assert [(check.ok, check.detail) for check in checks(it)] == [
        (True, "2 in force"),
        (True, "4 set again at boot"),
    ]
    it.write("/sys/bus/pci/devices/0000:05:00.0/driver/unbind", "0000:05:00.0")
    it.root.path("/sys/bus/pci/devices/0000:05:00.1").unlink()
    write(it.root, _vfio_files.RULES, "# mine")
    wrong = {check.subject: check.detail for check in checks(it) if check.ok is False}
    assert wrong == {
        "vfio 0000:05:00.0": "has no driver, not vfio-pci",
        "vfio 0000:05:00.1": "is not on the PCI bus: dead, unpowered, or in another slot",
        f"vfio {_vfio_files.RULES}": "is not as it was written, or is not there",
    }
