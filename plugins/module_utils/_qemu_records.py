# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is pinned now, and how it shall be: the settings that outlive a boot, and a record a VM that does not.

    /etc/organism/qemu_pin.json      which VMs are pinned, with which zones (module ``qemu_pin`` writes it)
    /etc/organism/extreme.conf       HOST_CPUS, VCPU_CPUS, IO_CPUS: an operator's override of all zones (optional)
    /run/organism/pins/100.json      which CPUs VM 100 has, and the masks of its threads before

A record holds CPUs as long as its process runs; afterwards it only remembers which CPUs the VM had.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _cpu_list, _cpu_plan, _qemu, _topology
from ._atomic import write_atomic
from ._cpu_plan import CpuPlan
from ._qemu import Machine, QemuError, Target
from ._qemu_plan import PinRefusedError, Zones
from ._root import Root

CONFIG = "/etc/organism/qemu_pin.json"
OVERRIDE = "/etc/organism/extreme.conf"
RECORDS = "/run/organism/pins"
_LOCK = ".lock"
FORMAT = 1


class NoPlanError(PinRefusedError):
    """Neither a plan nor zones are known."""


@dataclass(frozen=True)
class Wish:
    """A VM that shall be pinned. ``ratio``: vCPUs to CPUs that it may share, None: a CPU for each."""

    target: Target
    ratio: float | None = None


@dataclass(frozen=True)
class Config:
    """``every``: every VM of Proxmox VE, also those that are not named. CPU lists: empty where the plan decides.

    ``confine``: the control group of a VM is limited to the VCPU and IO zones too.
    """

    wishes: tuple[Wish, ...] = ()
    every: bool = False
    vcpu: str = ""
    io: str = ""
    confine: bool = True

    def wish(self, name: str) -> Wish | None:
        """What is wanted of a VM, None when it is left alone."""
        for each in self.wishes:
            if each.target.name == name:
                return each
        if self.every and name.isdigit():
            return Wish(_qemu.pve(int(name)))
        return None

    def names(self, root: Root) -> list[str]:
        """VMs to look at: those that are named, and those of Proxmox VE that run."""
        running = [str(vmid) for vmid in _qemu.pve_running(root)] if self.every else []
        return list(dict.fromkeys([*(each.target.name for each in self.wishes), *running]))

    def text(self) -> str:
        """The settings' file."""
        vms = {
            each.target.name: {
                "vmid": each.target.vmid,
                "pidfile": each.target.pidfile,
                "qmp": each.target.qmp,
                "oversubscribe": each.ratio,
            }
            for each in self.wishes
        }
        raw = {
            "format": FORMAT,
            "every_vm": self.every,
            "vcpu_cpus": self.vcpu,
            "io_cpus": self.io,
            "confine": self.confine,
            "vms": vms,
        }
        return json.dumps(raw, indent=1) + "\n"


def check_name(name: str) -> str:
    """Names become names of files. Raises QemuError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise QemuError(f"{name!r} is no name of a VM: letters, digits, _, - and dots")
    return name


def load_config(root: Root) -> Config | None:
    """The settings, None when there are none. Raises QemuError."""
    try:
        raw = json.loads(root.read(CONFIG))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise QemuError(f"{CONFIG}: {error}; run the role qemu_pin again") from error
    try:
        if raw["format"] != FORMAT:
            raise QemuError(f"{CONFIG}: format {raw['format']}, and this version reads {FORMAT}")
        wishes = tuple(
            Wish(Target(check_name(name), vm["pidfile"], vm["qmp"], vm["vmid"]), vm["oversubscribe"])
            for name, vm in raw["vms"].items()
        )
        return Config(wishes, raw["every_vm"], raw["vcpu_cpus"], raw["io_cpus"], raw["confine"])
    except (KeyError, TypeError, AttributeError) as error:
        raise QemuError(f"{CONFIG} holds no settings of pinning ({error!r}); run the role qemu_pin again") from error


# Zones ----------------------------------------------------------------------------------------------------------------


def override(root: Root) -> dict[str, str]:
    """``HOST_CPUS``, ``VCPU_CPUS`` and ``IO_CPUS`` of extreme.conf, as far as they are set. Raises QemuError."""
    text = root.read_or_none(OVERRIDE)
    found: dict[str, str] = {}
    for number, line in enumerate((text or "").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(?:export\s+)?(HOST_CPUS|VCPU_CPUS|IO_CPUS)=([\"']?)([0-9,:/ -]*)\2\s*(?:#.*)?", line)
        if match is None:
            raise QemuError(f"{OVERRIDE}:{number}: {line[:60]!r} is not HOST_CPUS=, VCPU_CPUS= or IO_CPUS= and a list")
        found[match[1]] = match[3].strip()
    return {name: value for name, value in found.items() if value}


def zones(root: Root, vcpu: str = "", io: str = "", foretold: CpuPlan | None = None) -> Zones:
    """The zones: those that are named here, else those of extreme.conf, else the stored CPU plan's.

    ``foretold``: the plan that an earlier task would have stored, in check mode.

    Raises PinRefusedError for CPUs that are not online and zones that overlap in part, QemuError, CpuPlanError.
    """
    central, plan = override(root), _cpu_plan.load(root) or foretold
    host_text = central.get("HOST_CPUS", "")
    sources, chosen = [], {}
    for name, given, key in (("vcpu", vcpu, "VCPU_CPUS"), ("io", io, "IO_CPUS")):
        try:
            if given:
                chosen[name], source = _cpu_list.parse(given), f"{name}_cpus"
            elif key in central:
                chosen[name], source = _cpu_list.parse(central[key]), OVERRIDE
            elif plan is not None:
                chosen[name], source = plan.zone(name), _cpu_plan.PATH
            else:
                raise NoPlanError("no CPU plan is stored: run level 1 (cpu_plan), or name vcpu_cpus and io_cpus")
        except _cpu_list.CpuListError as error:
            raise PinRefusedError(f"{name}_cpus: {error}") from error
        sources.append(source)
    host = _cpu_list.parse(host_text) if host_text else (plan.host if plan is not None else ())
    topology = _topology.read(root)
    _check_zones(chosen["vcpu"], chosen["io"], host, topology.online)
    return Zones(
        chosen["vcpu"],
        chosen["io"],
        " and ".join(dict.fromkeys(sources)),
        topology.cores,
        topology.caches,
        tuple(topology.nodes.values()),
    )


def _check_zones(vcpu: tuple[int, ...], io: tuple[int, ...], host: tuple[int, ...], online: tuple[int, ...]) -> None:
    for name, cpus in (("VCPU", vcpu), ("IO", io)):
        if not cpus:
            raise PinRefusedError(f"the {name} zone is empty: name at least one CPU")
        if absent := sorted(set(cpus) - set(online)):
            raise PinRefusedError(
                f"the {name} zone {_cpu_list.render(cpus)} has CPUs that are not online: {_cpu_list.render(absent)}; "
                f"online are {_cpu_list.render(online)}"
            )
    pairs = (("VCPU and IO", vcpu, io), ("VCPU and HOST", vcpu, host))
    for names, one, other in pairs:
        common = set(one) & set(other)
        if common and set(one) != set(other):  # equal zones are those of a machine that is too small for zones
            raise PinRefusedError(f"the zones {names} overlap in CPUs {_cpu_list.render(common)}: give each its own")


# Records --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """``vcpus``: index to CPU. ``earlier``: mask of each thread before (CPU list). ``scope``: the control group's CPUs
    before, None where they were not touched.
    """

    name: str
    pid: int
    start: int
    vcpus: Mapping[int, int] = field(default_factory=dict)
    io: tuple[int, ...] = ()
    earlier: Mapping[int, str] = field(default_factory=dict)
    scope: str | None = None

    def of(self, machine: Machine) -> bool:
        """Is it about this very process?"""
        return (self.pid, self.start) == (machine.pid, machine.start)

    def text(self) -> str:
        raw: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "pid": self.pid,
            "start": self.start,
            "vcpus": {str(index): cpu for index, cpu in sorted(self.vcpus.items())},
            "io": list(self.io),
            "earlier": {str(tid): cpus for tid, cpus in sorted(self.earlier.items())},
            "scope": self.scope,
        }
        return json.dumps(raw, indent=1) + "\n"


def load_record(root: Root, name: str) -> Record | None:
    """The record of a VM; a damaged one is none: it is written anew with the next pinning."""
    text = root.read_or_none(f"{RECORDS}/{name}.json")
    try:
        raw = json.loads(text or "")
        if raw["format"] != FORMAT:
            return None
        return Record(
            name,
            int(raw["pid"]),
            int(raw["start"]),
            {int(index): int(cpu) for index, cpu in raw["vcpus"].items()},
            tuple(int(cpu) for cpu in raw["io"]),
            {int(tid): str(cpus) for tid, cpus in raw["earlier"].items()},
            raw["scope"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def records(root: Root) -> dict[str, Record]:
    """All records by VM, those of ended processes included."""
    names = [name.removesuffix(".json") for name in root.listdir(RECORDS) if name.endswith(".json")]
    found = {name: load_record(root, name) for name in names if not name.startswith(".")}
    return {name: record for name, record in found.items() if record is not None}


def holders(root: Root, *but: str) -> dict[str, list[int]]:
    """CPUs that the vCPUs of VMs other than those named have now, by the VMs' labels."""
    return {
        f"VM {name}": sorted(record.vcpus.values())
        for name, record in sorted(records(root).items())
        if name not in but and _qemu.start_of(root, record.pid) == record.start
    }


def save(root: Root, record: Record) -> None:
    """Write a record (it need not survive a power cut). Raises OSError."""
    folder = root.path(RECORDS)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{record.name}.json", record.text(), mode=0o600, durable=False)


def drop(root: Root, name: str) -> None:
    """Forget a VM. Raises OSError."""
    root.path(f"{RECORDS}/{name}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def locked(root: Root) -> Iterator[None]:
    """One at a time: two VMs that start together must not get the same CPUs. Raises OSError."""
    folder = root.path(RECORDS)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # `clear` was between the two
        except FileExistsError:
            if folder.exists():
                raise  # a file has the folder's name
            continue  # `clear` was between mkdir's two looks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_there(descriptor, folder / _LOCK):
                yield
                return
        finally:
            os.close(descriptor)


def clear(root: Root) -> None:
    """Remove the folder of records, if there is none left. Raises OSError."""
    folder = root.path(RECORDS)
    if not folder.is_dir():
        return
    with locked(root):
        if {each.name for each in folder.iterdir()} == {_LOCK}:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove the empty folder with its lock, which the caller holds. Raises OSError."""
    (folder / _LOCK).unlink()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # somebody has come since: it is in use again
            raise


def _is_there(descriptor: int, path: Path) -> bool:
    """Is the file that was opened the one that has the name now, or has `clear` removed it meanwhile?"""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
