#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Records what /sys and /proc say of a machine in one file, for a bug report or a test.

This file needs nothing but Python 3.9 or later: copy it to a machine and run ``python3 record.py -o machine.json``.

Only files that PATTERNS names are read. Serial numbers, hardware addresses, UUIDs, network addresses and the host's
name never reach the recording; equal ones become equal stand-ins, so that relations stay visible.

The file is JSON: ``files`` (path to text), ``links`` (path to target), ``folders`` (empty ones that mean something) and
``unread`` (path to the error's name). Texts are without the last newline.
"""

from __future__ import annotations

import argparse
import errno
import glob
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
LONGEST = 256 * 1024
"""Bytes of a file that are kept; /proc/cpuinfo and /proc/interrupts of the largest machines are below that."""

_CPU = "/sys/devices/system/cpu"
_PCI = "/sys/bus/pci/devices/*"
_NET = "/sys/class/net/*"
_BLOCK = "/sys/block/*"
PATTERNS = (
    *(f"{_CPU}/{name}" for name in ("online", "offline", "present", "possible", "isolated", "nohz_full", "kernel_max")),
    f"{_CPU}/cpu[0-9]*/online",
    f"{_CPU}/cpu[0-9]*/cpu_capacity",
    f"{_CPU}/cpu[0-9]*/topology/*",
    f"{_CPU}/cpu[0-9]*/node[0-9]*",
    *(f"{_CPU}/cpu[0-9]*/cache/index*/{name}" for name in ("level", "type", "size", "id", "shared_cpu_list")),
    f"{_CPU}/cpu[0-9]*/power/pm_qos_resume_latency_us",
    f"{_CPU}/cpu[0-9]*/cpufreq",
    *(f"{_CPU}/cpu[0-9]*/cpuidle/state*/{name}" for name in ("name", "desc", "latency", "residency", "disable")),
    f"{_CPU}/cpuidle/*",
    f"{_CPU}/cpufreq/boost",
    *(f"{_CPU}/cpufreq/policy*/{name}" for name in ("affected_cpus", "related_cpus", "boost", "cpuinfo_*_freq")),
    *(f"{_CPU}/cpufreq/policy*/{name}" for name in ("scaling_[adgm]*", "energy_performance_*", "base_frequency")),
    *(f"{_CPU}/{name}/*" for name in ("intel_pstate", "amd_pstate", "smt", "vulnerabilities")),
    *(f"/sys/devices/{name}/cpus" for name in ("cpu_core", "cpu_atom", "cpu_lowpower")),
    *(f"/sys/devices/system/node/{name}" for name in ("online", "possible", "has_cpu", "has_memory")),
    *(f"/sys/devices/system/node/node*/{name}" for name in ("cpulist", "distance", "meminfo")),
    "/sys/devices/system/node/node*/hugepages/*/nr_hugepages",
    *(f"{_PCI}/{name}" for name in ("vendor", "device", "class", "revision", "subsystem_vendor", "subsystem_device")),
    *(f"{_PCI}/{name}" for name in ("numa_node", "local_cpulist", "local_cpus", "irq", "msi_irqs/*", "driver")),
    *(f"{_PCI}/{name}" for name in ("iommu_group", "reset_method", "boot_vga", "driver_override", "power/control")),
    *(f"{_PCI}/{name}" for name in ("current_link_*", "max_link_*", "link/*", "sriov_numvfs", "sriov_totalvfs")),
    *(f"{_PCI}/mem_info_{name}_total" for name in ("vram", "gtt")),
    *(f"{_PCI}/{name}" for name in ("physfn", "virtfn*", "modalias")),
    *(f"{_NET}/{name}" for name in ("address", "carrier", "flags", "ifindex", "iflink", "mtu", "operstate", "type")),
    *(f"{_NET}/{name}" for name in ("speed", "duplex", "tx_queue_len", "device", "master", "brif/*", "lower_*")),
    *(f"{_NET}/{name}" for name in ("upper_*", "bonding/slaves", "bonding/mode", "bridge/stp_state")),
    *(f"{_NET}/queues/{name}" for name in ("rx-*/rps_cpus", "rx-*/rps_flow_cnt", "tx-*/xps_cpus", "tx-*/xps_rxqs")),
    *(f"/sys/class/nvme/*/{name}" for name in ("model", "firmware_rev", "state", "transport", "device")),
    *(f"{_BLOCK}/queue/{name}" for name in ("rotational", "scheduler", "nr_requests", "read_ahead_kb", "write_cache")),
    *(f"{_BLOCK}/{name}" for name in ("dev", "*/dev", "slaves/*")),
    *(f"{_BLOCK}/{name}" for name in ("size", "removable", "ro", "device/model", "device/vendor", "mq/*/cpu_list")),
    "/sys/kernel/iommu_groups/*/devices/*",
    "/sys/kernel/iommu_groups/*/type",
    "/sys/class/iommu/*",
    "/sys/class/tty/console/active",
    "/sys/kernel/mm/ksm/*",
    *(f"/sys/kernel/mm/transparent_hugepage/{name}" for name in ("*", "khugepaged/*")),
    "/sys/kernel/mm/hugepages/*/*",
    *(f"/sys/module/{name}/parameters/*" for name in ("zfs", "nvme_core", "pcie_aspm", "intel_idle", "processor")),
    *(f"/sys/module/{name}/parameters/*" for name in ("kvm", "kvm_intel", "kvm_amd", "vfio_pci", "vhost", "workqueue")),
    "/sys/devices/virtual/workqueue/cpumask",
    *(f"/sys/class/dmi/id/{name}" for name in ("bios_date", "bios_vendor", "bios_version", "board_name")),
    *(f"/sys/class/dmi/id/{name}" for name in ("board_vendor", "product_name", "sys_vendor")),
    "/sys/firmware/efi/fw_platform_size",
    *(f"/sys/class/hwmon/hwmon*/{name}" for name in ("name", "temp*_input", "temp*_label", "temp*_crit")),
    *(f"/sys/class/thermal/thermal_zone*/{name}" for name in ("type", "temp")),
    "/sys/fs/cgroup/cgroup.controllers",
    *(f"/proc/{name}" for name in ("cmdline", "cpuinfo", "meminfo", "interrupts", "swaps", "version", "filesystems")),
    "/proc/irq/default_smp_affinity",
    *(f"/proc/irq/[0-9]*/{name}" for name in ("smp_affinity", "smp_affinity_list", "effective_affinity", "node")),
    *(f"/proc/irq/[0-9]*/{name}" for name in ("effective_affinity_list", "affinity_hint", "*/")),
    "/proc/sys/vm/*",
    *(f"/proc/sys/net/core/{name}" for name in ("busy_*", "default_qdisc", "netdev_*", "rps_*", "somaxconn")),
    *(f"/proc/sys/kernel/{name}" for name in ("numa_balancing", "sched_*", "timer_migration", "nmi_watchdog")),
    *(f"/proc/driver/nvidia/{name}" for name in ("version", "gpus/*/information", "capabilities/mig/*")),
    "/etc/os-release",
    "/etc/debian_version",
)

_SECRET_NAMES = re.compile(r"serial|wwid|wwn|nguid|uuid|unique_id|subsysnqn|phys_(port|switch)_id|hostname|machine-id")
_SECRET_WORDS = re.compile(
    r"^(ip|nfsroot|nfsaddrs|nameserver|netconsole|BOOTIF|crypt\w*|rd\.\S*|ds|url|hostname|systemd\.hostname|iscsi_\w+)"
    r"=\S+|^(\S*(?:password|passwd|secret|token|key)\S*)=\S+",
    re.IGNORECASE,
)
_SERIAL_LINE = re.compile(r"^([ \t]*(?:serial[^:\n]*|gpu uuid)[ \t]*:).*$", re.IGNORECASE | re.MULTILINE)
_HARDWARE = re.compile(r"(?<![0-9a-f:])(?:[0-9a-f]{2}:){5,19}[0-9a-f]{2}(?![0-9a-f:])", re.IGNORECASE)
_BY_HARDWARE = re.compile(r"(?<![0-9a-z])(enx|wlx|wwx)([0-9a-f]{12})(?![0-9a-f])")
_UUID = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")


class RecordError(Exception):
    """The recording cannot be read, made or unpacked; the message names the file."""


class Redactor:
    """Puts stand-ins for what tells machines and people apart; the same text gets the same stand-in throughout."""

    def __init__(self, hostname: str = "") -> None:
        self._known: dict[tuple[str, str], int] = {}
        names = {name for name in (hostname, hostname.split(".")[0]) if len(name) > 2 and name != "localhost"}
        words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._host = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE) if words else None

    @property
    def count(self) -> int:
        """How many different things were replaced."""
        return len(self._known)

    def _number(self, kind: str, text: str) -> int:
        mine = [key for key in self._known if key[0] == kind]
        return self._known.setdefault((kind, text.lower()), len(mine) + 1)

    def _address(self, digits: str) -> str:
        """A locally administered address of the same length; the ones that mean nobody or everybody stay."""
        if set(digits) <= {"0"} or set(digits) <= {"f"}:
            return digits
        return "02" + format(self._number("address", digits), f"0{len(digits) - 2}x")

    def text(self, path: str, text: str) -> str:
        """A file's text without what must not leave the machine."""
        if _SECRET_NAMES.search(path.rsplit("/", 1)[-1]):
            return f"redacted-{self._number('serial', text)}" if text else text
        if path == "/proc/cmdline":
            words = [_SECRET_WORDS.sub(lambda m: f"{m[1] or m[2]}=redacted", word) for word in text.split(" ")]
            text = " ".join(words)
            text = _IPV4.sub(lambda m: f"192.0.2.{self._number('ipv4', m[0])}", text)
        text = _SERIAL_LINE.sub(r"\1 redacted", text)
        return self.name(text)

    def name(self, text: str) -> str:
        """The same for a path or a link's target."""

        def colons(match: re.Match[str]) -> str:
            digits = self._address(match[0].replace(":", "").lower())
            return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))

        text = _HARDWARE.sub(colons, text)
        text = _BY_HARDWARE.sub(lambda m: m[1] + self._address(m[2]), text)
        text = _UUID.sub(lambda m: f"00000000-0000-4000-8000-{self._number('uuid', m[0]):012d}", text)
        return self._host.sub("host", text) if self._host else text


def record(top: str = "/", about: str = "") -> dict[str, Any]:
    """The recording of the machine (or the tree) below ``top``. Raises RecordError when nothing of it can be read."""
    base = "" if top == "/" else str(Path(top).absolute())
    tape: dict[str, Any] = {"format": FORMAT, "about": about, "files": {}, "links": {}, "folders": [], "unread": {}}
    redactor = Redactor(_read(f"{base}/proc/sys/kernel/hostname")[0] or "")
    for pattern in PATTERNS:
        for found in sorted(glob.glob(glob.escape(base) + pattern)):  # noqa: PTH207 - pathlib's follows no links in "*"
            _keep(base, found[len(base) :], tape, redactor)
    if not tape["files"]:
        raise RecordError(f"{base or '/'}: nothing that a recording holds can be read there; is /sys mounted?")
    tape["folders"] = sorted(set(tape["folders"]))
    tape["redacted"] = redactor.count
    return tape


def _keep(base: str, path: str, tape: dict[str, Any], redactor: Redactor) -> None:
    """Record one path: each link on the way to it, then what it is in the end."""
    real = ""
    for part in path.strip("/").split("/"):
        real = f"{real}/{part}"
        for _hop in range(8):
            if not os.path.islink(base + real):  # noqa: PTH114 - strings throughout: thousands of paths
                break
            target = os.readlink(base + real)  # noqa: PTH115 - as above
            tape["links"][redactor.name(real)] = redactor.name(target)
            joined = target if target.startswith("/") else f"{real.rsplit('/', 1)[0]}/{target}"
            real = os.path.normpath(joined)
    name = redactor.name(real)
    if os.path.isdir(base + real):  # noqa: PTH112 - as above
        tape["folders"].append(name)
        return
    if name not in tape["files"]:
        text, error = _read(base + real)
        if text is None:
            tape["unread"][name] = error
        else:
            tape["files"][name] = redactor.text(real, text)


def _read(path: str) -> tuple[str | None, str]:
    """The text of a file (without its last newline), or None and the name of the error."""
    try:
        with Path(path).open("rb") as stream:
            return stream.read(LONGEST).decode("utf-8", "replace").rstrip("\n"), ""
    except OSError as error:
        return None, errno.errorcode.get(error.errno or 0, "EIO")


def load(file: str | os.PathLike[str]) -> dict[str, Any]:
    """A recording from its file. Raises RecordError."""
    try:
        tape = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{file}: {error}") from error
    if not isinstance(tape, dict) or tape.get("format") != FORMAT or not isinstance(tape.get("files"), dict):
        raise RecordError(f"{file}: no recording of format {FORMAT}")
    return tape


def unpack(tape: dict[str, Any], into: str | os.PathLike[str]) -> None:
    """Lay a recording out as a tree of files. Raises RecordError for a path that leads out of it, OSError."""
    top = Path(into)
    for name in (*tape.get("folders", ()), *tape["files"], *tape.get("links", {})):
        if not name.startswith("/") or ".." in name.split("/"):
            raise RecordError(f"{name!r} in the recording is no plain absolute path")
    for name in tape.get("folders", ()):
        (top / name.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name, text in tape["files"].items():
        path = top / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    for name, target in tape.get("links", {}).items():
        path = top / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            # an absolute target means the recorded machine's, never the one that reads the recording
            path.symlink_to(os.path.relpath(top / target.lstrip("/"), path.parent) if target[:1] == "/" else target)


def render(tape: dict[str, Any]) -> str:
    """The recording's text: sorted, one path a line, so that two of them compare line by line."""
    return json.dumps(tape, indent=0, sort_keys=True, ensure_ascii=False) + "\n"


def _lines(tape: dict[str, Any], where: str) -> Iterator[str]:
    yield f"{where}: {len(tape['files'])} files, {len(tape['links'])} links"
    yield f"{tape['redacted']} serial numbers, addresses and names replaced; please read it before you send it\n"


def main(argv: list[str] | None = None) -> int:
    """0: done, 1: it failed, 2: usage."""
    parser = argparse.ArgumentParser(
        prog="organism-record",
        description="Record what /sys and /proc say of this machine, without serial numbers, addresses and names.",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="where to write it (default: standard output)"
    )
    parser.add_argument("--about", metavar="TEXT", default="", help="a line that says what this machine is")
    parser.add_argument("--root", metavar="DIR", default="/", help="record the tree in DIR instead of this machine")
    parser.add_argument("--unpack", metavar="FILE", help="lay the recording in FILE out as a tree, with --into")
    parser.add_argument("--into", metavar="DIR", help="the folder for --unpack")
    options = parser.parse_args(argv)
    if bool(options.unpack) != bool(options.into):
        parser.error("--unpack and --into go together")
    try:
        if options.unpack:
            unpack(load(options.unpack), options.into)
            return 0
        tape = record(options.root, options.about)
        if options.output == "-":
            sys.stdout.write(render(tape))
        else:
            Path(options.output).write_text(render(tape), encoding="utf-8")
            sys.stderr.write("\n".join(_lines(tape, options.output)))
    except (RecordError, OSError) as error:
        sys.stderr.write(f"organism-record: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
