# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a machine is, checked before anything is changed on it: one record a check, each with a reason and a next step.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from ._root import Root

OK, WARN, FAIL = "ok", "warn", "fail"

MIN_PYTHON = (3, 11)
MIN_SYSTEMD = 252
"""Debian 12's; older ones lack what the units use."""
GIB = 1024**3
MIB = 1024**2
TESTED = {("debian", "12"), ("debian", "13")}
VENDORS = {"0x1002": "AMD", "0x10de": "NVIDIA", "0x8086": "Intel"}
EMULATED = {"0x1234", "0x1013", "0x1b36", "0x1af4", "0x15ad"}
"""PCI vendors of emulated display adapters (QEMU, Cirrus, Red Hat, virtio, VMware): no GPU to compute with."""
_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""


@dataclass(frozen=True)
class Record:
    """One check: ``status`` is ok, warn or fail; ``next`` says what to do, empty where nothing is."""

    check: str
    status: str
    detail: str
    next: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a host is for: its groups, folders that must outlive a reboot, and the room they need."""

    groups: tuple[str, ...] = ()
    persistent: tuple[str, ...] = ("/data",)
    min_memory_mib: int = 512
    min_free_mib: int = 1024


def kernel_clock_state() -> int | None:
    """The kernel's word on its clock, by a reading adjtimex(2); None where it cannot be asked."""
    buffer = ctypes.create_string_buffer(512)  # struct timex has 208 bytes on 64-bit Linux; modes=0 only reads
    try:
        state = ctypes.CDLL(None).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else int(state)


@dataclass(frozen=True)
class Probe:
    """What no file tells; a test replaces them."""

    statvfs: Callable[[str], os.statvfs_result] = os.statvfs
    clock_state: Callable[[], int | None] = kernel_clock_state
    python: tuple[int, int] = (sys.version_info[0], sys.version_info[1])
    machine: str = field(default_factory=platform.machine)


def check(root: Root, wanted: Wanted, probe: Probe | None = None) -> list[Record]:
    """All records of a host, in the order in which a reader wants them."""
    probe = probe or Probe()
    return [
        _distribution(root),
        _kernel(root, probe),
        _systemd(root),
        _python(probe),
        _cpu(root),
        _memory(root, wanted),
        _room(root, wanted, probe),
        *(_persistent(root, path) for path in wanted.persistent),
        _iommu(root, wanted),
        _gpus(root, wanted),
        _pve(root, wanted),
        _clock(probe),
    ]


def table(records: Iterable[Record]) -> list[str]:
    """Lines for people, aligned: status, check, detail, and the next step where there is one."""
    records = list(records)
    width = max((len(record.check) for record in records), default=0)
    return [
        f"{record.status:<4}  {record.check:<{width}}  {record.detail}" + (f" -> {record.next}" if record.next else "")
        for record in records
    ]


def failures(records: Iterable[Record]) -> str:
    """The reasons why a host must not be changed, in one text; empty when there are none."""
    return "; ".join(f"{record.check}: {record.detail} ({record.next})" for record in records if record.status == FAIL)


def as_dicts(records: Iterable[Record]) -> list[dict[str, str]]:
    return [asdict(record) for record in records]


def _os_release(root: Root) -> dict[str, str]:
    """os-release(5)."""
    text = root.read_or_none("/etc/os-release") or root.read_or_none("/usr/lib/os-release") or ""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key: value.strip().strip("\"'") for key, value in pairs}


def _distribution(root: Root) -> Record:
    found = _os_release(root)
    name = found.get("PRETTY_NAME") or found.get("ID") or "unknown"
    family = {found.get("ID", ""), *found.get("ID_LIKE", "").split()}
    if "debian" not in family:
        return Record("system", FAIL, f"{name} is not of Debian's family", "use Debian 12 or 13, or Proxmox VE 8 or 9")
    if (found.get("ID", ""), found.get("VERSION_ID", "")) not in TESTED:
        return Record("system", WARN, f"{name} is untested", "Debian 12 and 13 are tested")
    return Record("system", OK, name)


def _kernel(root: Root, probe: Probe) -> Record:
    release = root.read_or_none("/proc/sys/kernel/osrelease") or "unknown"
    detail = f"{release} on {probe.machine}"
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and (int(version[1]), int(version[2])) < (6, 1):
        return Record("kernel", WARN, f"{detail} is older than any tested one", "upgrade to 6.1 or later")
    return Record("kernel", OK, detail)


def _systemd(root: Root) -> Record:
    libraries = [
        path
        for folder in ("/usr/lib/*/systemd", "/usr/lib/systemd")
        for path in root.glob(f"{folder}/libsystemd-shared-*.so")
    ]
    versions = [int(match[1]) for path in libraries if (match := re.search(r"-(\d+)[^/]*\.so\Z", path))]
    if not root.exists("/run/systemd/system"):
        return Record("systemd", FAIL, "is not the running system manager", "boot this host with systemd")
    if not versions:
        return Record("systemd", WARN, "running, version not found", f"make sure that it is {MIN_SYSTEMD} or later")
    if max(versions) < MIN_SYSTEMD:
        return Record("systemd", FAIL, f"{max(versions)} is too old", f"upgrade to Debian 12 or later ({MIN_SYSTEMD})")
    return Record("systemd", OK, str(max(versions)))


def _python(probe: Probe) -> Record:
    found = ".".join(str(part) for part in probe.python)
    if probe.python < MIN_PYTHON:
        wanted = ".".join(str(part) for part in MIN_PYTHON)
        return Record("python", FAIL, f"{found} is too old", f"point ansible_python_interpreter at {wanted} or later")
    return Record("python", OK, found)


def _cpu(root: Root) -> Record:
    text = root.read_or_none("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    threads = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    cores = {
        (root.read_or_none(f"{path}/physical_package_id"), root.read_or_none(f"{path}/core_id"))
        for path in root.glob("/sys/devices/system/cpu/cpu[0-9]*/topology")
    }
    told = f"{len(cores)} cores, " if cores else ""
    return Record("cpu", OK, f"{told}{threads} threads, {model[1] if model else 'model unknown'}")


def _memory(root: Root, wanted: Wanted) -> Record:
    total = re.search(r"^MemTotal:\s*(\d+) kB", root.read_or_none("/proc/meminfo") or "", re.MULTILINE)
    if not total:
        return Record("memory", WARN, "size unknown", "is /proc mounted?")
    size = int(total[1]) * 1024
    if size < wanted.min_memory_mib * MIB:
        return Record("memory", FAIL, f"{size // MIB} MiB", f"give this host {wanted.min_memory_mib} MiB or more")
    return Record("memory", OK, f"{size / GIB:.1f} GiB")


def _room(root: Root, wanted: Wanted, probe: Probe) -> Record:
    told, short = [], False
    for path in ("/", "/opt", "/var", *wanted.persistent):
        if not root.exists(path):
            continue
        found = probe.statvfs(str(root.path(path)))
        free = found.f_bavail * found.f_frsize
        short = short or free < wanted.min_free_mib * MIB
        told.append(f"{path} {free / GIB:.1f} GiB")
    if short:
        return Record("disk", FAIL, "free: " + ", ".join(told), f"make {wanted.min_free_mib} MiB free on each of them")
    return Record("disk", OK, "free: " + ", ".join(told))


def mount_points(root: Root) -> set[str]:
    """Mount points of the own mount namespace (proc(5), mountinfo: field 5, octal escapes)."""
    text = root.read_or_none("/proc/self/mountinfo") or ""
    unescape = re.compile(r"\\([0-7]{3})")
    fields = (line.split() for line in text.splitlines())
    return {unescape.sub(lambda m: chr(int(m[1], 8)), words[4]) for words in fields if len(words) > 4}


def _persistent(root: Root, path: str) -> Record:
    if path in mount_points(root):
        return Record(path, OK, "a mount of its own")
    detail = "no mount of its own: it shares the root file system's room"
    return Record(path, WARN, detail, f"mount a persistent file system on {path}")


def _iommu(root: Root, wanted: Wanted) -> Record:
    groups = len(root.listdir("/sys/kernel/iommu_groups"))
    if groups == 0 and "pve" in wanted.groups:
        return Record("iommu", WARN, "no groups", "switch VT-d or AMD-Vi on in the firmware")
    return Record("iommu", OK, f"{groups} groups")


def _gpus(root: Root, wanted: Wanted) -> Record:
    found: Counter[str] = Counter()
    for device in root.glob("/sys/bus/pci/devices/*"):
        vendor = root.read_or_none(f"{device}/vendor") or ""
        if (root.read_or_none(f"{device}/class") or "").startswith("0x03") and vendor not in EMULATED:
            model = (root.read_or_none(f"{device}/device") or "").removeprefix("0x")
            found[f"{VENDORS.get(vendor, vendor)} {model}"] += 1
    if found:
        return Record("gpus", OK, ", ".join(f"{count} x {name}" for name, count in sorted(found.items())))
    if "gpu_pool" in wanted.groups:
        return Record("gpus", WARN, "none on the PCI bus", "pass GPUs through to this host, or let it simulate some")
    return Record("gpus", OK, "none")


def dpkg_versions(root: Root) -> dict[str, str]:
    """Versions of the installed Debian packages by name (dpkg's status file: one stanza a package)."""
    found: dict[str, str] = {}
    for stanza in (root.read_or_none("/var/lib/dpkg/status") or "").split("\n\n"):
        lines = (line for line in stanza.splitlines() if line.startswith(("Package: ", "Status: ", "Version: ")))
        values = dict(line.split(": ", 1) for line in lines)
        if values.get("Status", "").endswith(" installed"):
            found[values.get("Package", "")] = values.get("Version", "")
    return found


def _pve(root: Root, wanted: Wanted) -> Record:
    version = dpkg_versions(root).get("pve-manager")
    if version is None and "pve" in wanted.groups:
        return Record("proxmox", WARN, "pve-manager is not installed", "leave group pve, or install Proxmox VE")
    return Record("proxmox", OK, version or "not a Proxmox VE node")


def _clock(probe: Probe) -> Record:
    state = probe.clock_state()
    if state is None:
        return Record("clock", WARN, "its state cannot be asked for", "see that a time service runs")
    if state == _TIME_ERROR:
        return Record("clock", WARN, "not synchronised", "run a time service (Debian: apt-get install chrony)")
    return Record("clock", OK, "synchronised")
