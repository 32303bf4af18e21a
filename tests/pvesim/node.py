# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state of one node, and where its files lie below one folder."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from .access import Access
from .conf import Configs
from .errors import Died
from .hardware import Host
from .locks import locked
from .pci import Mappings, Reservations
from .process import Behaviour, Machine
from .storage import Storages
from .tasks import Tasks

MAX_STARTS = 10_000
VERSION = {"release": "9.2", "repoid": "14a22df3", "version": "9.2.11"}


@dataclass
class Settings:
    """``vm_kind``: ``qemu`` or ``stand-in``. ``lock_timeout``: seconds; Proxmox VE's is 10. ``poll``: seconds between
    looks at a VM that shall stop; Proxmox VE's is 1. ``hook_server``: a socket of `warm` that runs hookscripts."""

    node: str = "pve1"
    root_password: str = "secret"
    vm_kind: str = "stand-in"
    lock_timeout: float = 10.0
    poll: float = 0.05
    gpus: int = 12
    hook_server: Path | None = None


@dataclass
class Node:
    """Everything that the API and the commands share. ``clock_ahead``: seconds that tickets think it is later."""

    top: Path
    settings: Settings = field(default_factory=Settings)
    clock_ahead: float = 0.0

    def __post_init__(self) -> None:
        self.name = self.settings.node
        for folder in (
            "var/lock/qemu-server",
            "run/qemu-server",
            "var/log",
            "bin",
            "etc/pve/mapping",
            f"etc/pve/nodes/{self.name}",
        ):
            (self.top / folder).mkdir(parents=True, exist_ok=True)
        configs = self.top / "etc/pve/nodes" / self.name / "qemu-server"
        configs.mkdir(exist_ok=True)
        for link, target in (
            ("etc/pve/qemu-server", f"nodes/{self.name}/qemu-server"),
            ("etc/pve/local", f"nodes/{self.name}"),
            ("var/run", "../run"),
        ):
            if not (self.top / link).is_symlink():
                (self.top / link).symlink_to(target)
        self.host = Host.standard(self.settings.gpus)
        self.host.write_sysfs(self.top / "sys")
        self.access = Access(self.clock, self.settings.root_password)
        self.tasks = Tasks(self.name)
        self.configs = Configs(configs, self.name)
        self.storages = Storages(self.top)
        self.mappings = Mappings(self.top / "etc/pve/mapping/pci.cfg")
        self.machines: dict[int, Machine] = {}
        self.starts: deque[dict[int, tuple[str, ...]]] = deque(maxlen=MAX_STARTS)
        """Which VMs ran, with their devices, at the instant after each start."""
        self.behaviours: dict[int, Behaviour] = {}
        self.reboot_requests: set[int] = set()
        self.reservations = Reservations(self.pid, self.top / "run/qemu-server/pci-id-reservations")
        self.guard = threading.RLock()
        self.started = time.time()

    def clock(self) -> float:
        return time.time() + self.clock_ahead

    # ---- machines ----------------------------------------------------------------------------------------------------

    def machine(self, vmid: int) -> Machine | None:
        """The VM's process if it runs."""
        with self.guard:
            found = self.machines.get(vmid)
        return found if found is not None and found.running else None

    def pid(self, vmid: int) -> int | None:
        found = self.machine(vmid)
        return found.pid if found else None

    def behaviour(self, vmid: int) -> Behaviour:
        with self.guard:
            return self.behaviours.setdefault(vmid, Behaviour())

    # ---- locks and logs ----------------------------------------------------------------------------------------------

    def vm_lock(
        self, vmid: int, timeout: float | None = None, say: Callable[[str], None] | None = None
    ) -> AbstractContextManager[None]:
        """The lock of a VM's configuration (PVE::AbstractConfig, lock_config: 10 s)."""
        shown = f"/var/lock/qemu-server/lock-{vmid}.conf"
        path = self.top / shown.lstrip("/")
        return locked(path, shown, self.settings.lock_timeout if timeout is None else timeout, say)

    def syslog(self, text: str) -> None:
        with (self.top / "var/log/syslog").open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%FT%T')} {text.rstrip()}\n")

    def environment(self) -> dict[str, str]:
        """What hookscripts run with: our commands come first on PATH."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        path = inherited.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        return {**inherited, "PATH": f"{self.top}/bin:{path}", "PVESIM": str(self.top)}

    def check_node(self, name: str) -> None:
        if name not in (self.name, "localhost"):
            raise Died(
                f"hostname lookup '{name}' failed - failed to get address info for: {name}: Name or service not known"
            )
