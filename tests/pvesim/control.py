# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a test may do to the node and no user can: crash a guest, take the API away, age tickets, change hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import lifecycle
from .access import ROOT, Caller, User
from .conf import Conf
from .ha import Ha
from .hardware import PciDevice
from .https import Api
from .node import Node


class Control:
    """Operations by name; each takes and gives what JSON can carry."""

    def __init__(self, node: Node, api: Api, ha: Ha, end: Callable[[], None]) -> None:
        self.node = node
        self.api = api
        self.ha = ha
        self.end = end
        self.operations: Mapping[str, Callable[..., Any]] = {
            "crash": self.crash,
            "guest-poweroff": self.guest_poweroff,
            "behave": self.behave,
            "api-down": self.api_down,
            "api-up": self.api_up,
            "age-tickets": self.age_tickets,
            "devices": self.devices,
            "set-devices": self.set_devices,
            "host": self.host,
            "break-reset": self.break_reset,
            "token": self.token,
            "user": self.user,
            "reservations": self.reservations,
            "machines": self.machines,
            "tasks": self.tasks,
            "starts": self.starts,
            "lock": self.lock,
            "set-ha": self.set_ha,
            "ha": self.ha_states,
            "migrate-in": self.migrate_in,
            "migrate-out": self.migrate_out,
            "quit": self.quit,
        }

    def run(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Raises KeyError, TypeError, ApiError."""
        return self.operations[name](**arguments)

    def crash(self, vmid: int) -> bool:
        """SIGKILL for the VM's process."""
        machine = self.node.machine(vmid)
        if machine is not None:
            machine.kill()
            machine.wait(10)
        return machine is not None

    def guest_poweroff(self, vmid: int) -> bool:
        """The guest switches itself off: no pre-stop, but post-stop."""
        machine = self.node.machine(vmid)
        if machine is None:
            return False
        if machine.qmp is not None:
            machine.press_power_button()
        else:
            machine.terminate()
        return machine.wait(30)

    def behave(self, vmid: int, **how: Any) -> dict[str, Any]:
        """Set what a stand-in does: ``ignores_power_button``, ``delay``, ``fails_to_start``."""
        behaviour = self.node.behaviour(vmid)
        for name, value in how.items():
            if not hasattr(behaviour, name):
                raise KeyError(name)
            setattr(behaviour, name, value)
        return asdict(behaviour)

    def api_down(self) -> None:
        self.api.down()

    def api_up(self) -> int:
        return self.api.up()

    def age_tickets(self, seconds: float) -> None:
        self.node.clock_ahead += seconds

    def devices(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.node.host.devices.values()]

    def set_devices(self, devices: list[dict[str, Any]]) -> None:
        """Other hardware, as after a change of cards, firmware or slots."""
        for each in devices:
            each["subsystem"] = tuple(each["subsystem"]) if each.get("subsystem") else None
        self.node.host.replace(PciDevice(**each) for each in devices)
        self.node.host.write_sysfs(self.node.top / "sys")

    def host(self, **values: Any) -> dict[str, Any]:
        """Change ``cpus``, ``memory`` (MiB), ``numa_nodes``, ``hugepages`` (size in MiB to pages), ``bridges``."""
        for name, value in values.items():
            if not hasattr(self.node.host, name):
                raise KeyError(name)
            kept = {int(size): int(count) for size, count in value.items()} if name == "hugepages" else value
            setattr(self.node.host, name, tuple(kept) if name == "bridges" else kept)
        found = asdict(self.node.host)
        del found["devices"], found["stops_left"]
        return found

    def break_reset(self, slot: str, stops: int) -> None:
        """A card (``0000:03:00``) is dead after so many further stops of its VM."""
        self.node.host.stops_left[slot] = stops

    def user(self, name: str, password: str | None = None) -> None:
        self.node.access.users.setdefault(name, User()).password = password

    def token(self, user: str, token_id: str, *, privsep: bool = True, acl: Mapping[str, str] | None = None) -> str:
        """A new token's secret. ``acl``: path to role, for the user and, with privsep, for the token too."""
        secret = self.node.access.add_token(user, token_id, privsep=privsep, expire=0)
        for path, role in (acl or {}).items():
            self.node.access.grant(path, user, role)
            self.node.access.grant(path, f"{user}!{token_id}", role)
        return secret

    def reservations(self) -> dict[str, dict[str, Any]]:
        return {address: asdict(each) for address, each in self.node.reservations.by_address.items()}

    def machines(self) -> dict[str, int]:
        """VMID to process id of all that run."""
        with self.node.guard:
            found = list(self.node.machines.items())
        return {str(vmid): machine.pid for vmid, machine in found if machine.running}

    def tasks(self) -> list[str]:
        """Those that run."""
        return [task.upid for task in self.node.tasks.running()]

    def starts(self) -> list[dict[str, list[str]]]:
        """VMs with their devices that ran at the instant after each start, since this was asked last."""
        with self.node.guard:
            told = [{str(vmid): list(devices) for vmid, devices in each.items()} for each in self.node.starts]
            self.node.starts.clear()
        return told

    def lock(self, vmid: int, lock: str | None) -> None:
        """Set or take away ``lock:`` in a VM's configuration."""
        with self.node.vm_lock(vmid):
            conf = self.node.configs.load(vmid)
            conf.values.pop("lock", None)
            if lock:
                conf.values["lock"] = lock
            self.node.configs.write(vmid, conf)

    def set_ha(self, vmid: int, state: str | None) -> None:
        """Put a VM under HA (``started``, ``stopped``, ``ignored``), or with None take it out."""
        self.ha.set(vmid, state)

    def ha_states(self) -> dict[str, str]:
        return {str(vmid): each.state for vmid, each in self.ha.by_vmid.items()}

    def migrate_in(self, vmid: int, source: str, config: Mapping[str, str]) -> str | None:
        """A running VM comes from another node: its configuration, then a start that knows where from.

        The exit status of that start.
        """
        self.node.configs.write(vmid, Conf(dict(config)))
        task = self.node.tasks.run(
            "qmstart",
            str(vmid),
            Caller(ROOT),
            lambda task: lifecycle.start(self.node, vmid, task, skiplock=True, migrated_from=source),
        )
        task.wait()
        return task.exitstatus

    def migrate_out(self, vmid: int) -> dict[str, str]:
        """A running VM goes to another node: its configuration is gone, then its process, and no hook runs here."""
        with self.node.vm_lock(vmid):
            conf = self.node.configs.load(vmid)
            (self.node.top / f"run/qemu-server/{vmid}.cleanup").unlink(missing_ok=True)
            self.node.configs.path(vmid).unlink()
            self.crash(vmid)
            self.node.reservations.release(vmid)
        return conf.values

    def quit(self) -> None:
        self.end()
