# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small host: kernel values in files, and a systemctl that keeps units in a dictionary."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from organism.core import _kernel_value
from organism.core._host_settings_apply import Outcome, converge
from organism.core._host_settings_wish import wish_from
from organism.core._root import Root
from organism.core._systemd import CommandError

KERNEL = {
    "proc/sys/vm/swappiness": "60\n",
    "proc/sys/vm/dirty_ratio": "20\n",
    "proc/sys/vm/dirty_bytes": "0\n",
    "proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456\n",
    "proc/sys/net/ipv4/conf/eth0.5/rp_filter": "2\n",
    "proc/sys/kernel/osrelease": "6.12.0\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
    "sys/module/zfs/parameters/zfs_flag": "N\n",
    "lib/modules/6.12.0/modules.dep": "kernel/drivers/block/zram/zram.ko.xz: kernel/mm/zsmalloc.ko.xz\n",
    "lib/modules/6.12.0/modules.builtin": "kernel/fs/ext4/ext4.ko\n",
}


@dataclass
class Unit:
    enabled: str = "disabled"
    active: str = "inactive"
    load: str = "loaded"
    id: str = ""
    masked: bool = False


@dataclass
class Host:
    """A tree, its kernel's whims, and its programs."""

    top: Path
    units: dict[str, Unit] = field(default_factory=dict)
    appear: dict[str, Unit] = field(default_factory=dict)  # units that a daemon-reload brings
    alters: dict[str, str] = field(default_factory=dict)  # path -> what the kernel makes of any value
    refuses: set[str] = field(default_factory=set)
    fails: set[str] = field(default_factory=set)  # systemctl verbs that end with an error
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, text in KERNEL.items():
            self.put(name, text)
        for cpu in range(4):
            self.put(f"sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us", "0\n")
        self.put("run/systemd/system/.there", "")
        (self.top / "etc/sysctl.d").mkdir(parents=True)

    def put(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.top / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def text(self, name: str) -> str:
        return (self.top / name.lstrip("/")).read_text()

    def write(self, root: Root, path: str, value: str) -> None:
        """Writes as the kernel does: it may refuse or alter, and a choice stays a choice."""
        self.ran.append(f"{path} = {value}")
        if path in self.refuses:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        if path in self.alters:
            value = self.alters[path]
        now = root.read(path)
        offered = _kernel_value.choices(now)
        if offered:
            value = " ".join(f"[{word}]" if word == value else word for word in offered)
        other = {"/proc/sys/vm/dirty_ratio": "/proc/sys/vm/dirty_bytes"}
        other |= {half: ratio for ratio, half in other.items()}
        if path in other and now != value:
            root.path(other[path]).write_text("0\n")
        if path.startswith("/proc/sys/"):
            value = value.replace(" ", "\t")
        root.path(path).write_text(value + "\n")

    def run(self, argv: list[str]) -> str:
        self.ran.append(" ".join(argv))
        if argv[:2] == ["systemctl", "show"]:
            return "\n".join(self._shown(name) for name in argv[argv.index("--") + 1 :])
        if argv[0] == "systemctl":
            words = [word for word in argv[2:] if not word.startswith("--")]
            if words[0] in self.fails:
                raise CommandError(f"`{' '.join(argv)}` ended with 1: no")
            self._systemctl(words[0], words[1:])
        if argv[0] == "modprobe":
            folder = self.top / "sys/module" / argv[-1]
            if "--remove" in argv:
                folder.rmdir()
            else:
                folder.mkdir(parents=True)
        return ""

    def _shown(self, name: str) -> str:
        unit = self.units.get(name, Unit("", "inactive", "not-found"))
        enabled = "masked" if unit.masked else unit.enabled
        load = "masked" if unit.masked else unit.load
        return (
            f"Id={unit.id or name}\nLoadState={load}\nActiveState={unit.active}\nUnitFileState={enabled}\nMainPID=0\n"
        )

    def _systemctl(self, verb: str, names: list[str]) -> None:
        if verb == "daemon-reload":
            self.units |= self.appear
        for name in names:
            unit = self.units[name]
            if verb in ("start", "restart"):
                assert not unit.masked
                unit.active = "active"
            elif verb == "stop":
                unit.active = "inactive"
            elif verb in ("mask", "unmask"):
                unit.masked = verb == "mask"
            elif verb in ("enable", "disable"):
                assert not unit.masked
                unit.enabled = f"{verb}d"

    def call(self, check: bool = False, **arguments: Any) -> Outcome:
        """One call of the module's library."""
        self.ran.clear()
        wish = wish_from({"capability": "test", **arguments})
        return converge(wish, check=check, root=Root(self.top), run=self.run, writer=self.write)

    def snapshot(self) -> dict[str, Any]:
        """Everything but where the record lies: what must be identical after taking back."""
        found: dict[str, Any] = {
            str(path.relative_to(self.top)): (path.read_bytes(), path.stat().st_mode, path.stat().st_uid)
            if path.is_file()
            else None
            for path in sorted(self.top.rglob("*"))
            if "var" not in path.relative_to(self.top).parts
        }
        return found | {name: (unit.enabled, unit.masked, unit.active) for name, unit in self.units.items()}

    def record(self) -> Path:
        return self.top / "var/lib/organism/earlier/test.json"
