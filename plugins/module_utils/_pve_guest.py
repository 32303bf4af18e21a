# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waits until the system inside a VM is ready: its guest agent answers, and cloud-init has finished.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from typing import Any

from ._pve_client import Pve, PveError, PveForbidden, PveNotFound, PveTimeout
from ._pve_find import Vm
from ._pve_power import POLL, Clock

CLOUD_INIT = ["cloud-init", "status", "--wait"]
CLOUD_INIT_ERROR = 1
"""Its exit status after a failure; 2 is a success with complaints (cloud-init 23.4 and later)."""


class GuestFailed(Exception):
    """The system inside does not become what it should; the text says what it said."""


def wait_agent(pve: Pve, vm: Vm, end: float, clock: Clock) -> None:
    """Until the agent answers. Raises PveTimeout at ``end`` (the clock's time), and PveForbidden at once."""
    while True:
        try:
            pve.post(f"{vm.path}/agent/ping")
            return
        except (PveForbidden, PveNotFound):
            raise
        except PveError as error:
            if clock.now() >= end or "No QEMU guest agent configured" in str(error):
                raise PveTimeout(
                    f"{vm}: its guest agent does not answer ({error}); look at its console (qm terminal {vm.vmid}), "
                    "whether qemu-guest-agent runs, and whether the VM has had agent: 1 since its last cold start"
                ) from error
        clock.sleep(POLL)


def wait_cloud_init(pve: Pve, vm: Vm, end: float, clock: Clock) -> str:
    """Until cloud-init has finished; what it said last. Raises GuestFailed and PveTimeout."""
    pid = pve.post(f"{vm.path}/agent/exec", command=CLOUD_INIT)["pid"]
    while True:
        status: dict[str, Any] = pve.get(f"{vm.path}/agent/exec-status", pid=pid)
        if status.get("exited"):
            said = " ".join(str(status.get("out-data") or status.get("err-data") or "").split())
            if int(status.get("exitcode") or 0) == CLOUD_INIT_ERROR:
                raise GuestFailed(
                    f"{vm}: cloud-init failed inside ({said or 'it says nothing'}); "
                    "see /var/log/cloud-init-output.log there"
                )
            return said
        if clock.now() >= end:
            raise PveTimeout(f"{vm}: cloud-init still works; see /var/log/cloud-init-output.log inside, or wait longer")
        clock.sleep(POLL)
