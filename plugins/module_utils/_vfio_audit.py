# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The audit of cards for virtual machines: are they with vfio-pci now, and will they be after a boot?

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from . import _host_files, _iommu, _vfio_plan
from ._earlier import EarlierState
from ._host_audit import BOOT, NOW, Host, Verdict
from ._iommu import VFIO
from ._vfio_files import WAITING

CAPABILITY = _vfio_plan.CAPABILITY


def cards(host: Host, earlier: EarlierState) -> Verdict:
    """Each function that was taken, and each file that takes it at boot."""
    verdict = Verdict(earlier.capability)
    found = _iommu.functions(host.root)
    waits = host.root.exists(WAITING)
    for key, kept in earlier.kept.items():
        if key.startswith("/"):
            same = _host_files.read(host.root, key) == kept.set
            verdict.judge(BOOT, key, same, "is not as it was written, or is not there")
        elif key == _vfio_plan.INITRAMFS:
            verdict.judge(BOOT, "initramfs", False, "was not made anew after the last change")
        elif key.startswith(_vfio_plan.DRIVER):
            address = key[len(_vfio_plan.DRIVER) :]
            function = found.get(address)
            if function is None:
                verdict.judge(NOW, address, False, "is not on the PCI bus: dead, unpowered, or in another slot")
            elif function.driver != VFIO and waits:
                verdict.skip(NOW, address, f"has {function.driver or 'no driver'}, and waits for a reboot")
            else:
                verdict.judge(
                    NOW, address, function.driver == VFIO, f"has {function.driver or 'no driver'}, not {VFIO}"
                )
    return verdict
