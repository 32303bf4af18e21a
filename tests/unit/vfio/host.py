# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A recorded host with what runs on it (mounts, routes, pools), and a kernel that binds and frees PCI functions there.

The kernel does what drivers/base and drivers/pci do on the writes that the product makes, and on a boot what udev does
with the product's rule; it knows nothing of how the product decides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from organism.core import _vfio_apply, _vfio_plan, _vfio_select
from organism.core._earlier import EarlierState
from organism.core._root import Root
from organism.core._systemd import CommandError
from organism.core._vfio_plan import Plan, Wish

DEVICES = "/sys/bus/pci/devices"
MOUNTED = {
    "pool_host": "22 1 259:3 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p3 rw",
    "nvidia_workstation": "22 1 0:25 / / rw,relatime shared:1 - zfs rpool/ROOT/pve-1 rw,xattr",
    "intel_sriov": "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
}
UDEV = {
    "nvidia_workstation": {
        "b259:1": f"E:ID_FS_TYPE=vfat\nE:ID_PART_ENTRY_TYPE={'c12a7328-f81f-11d2-ba4b-00a0c93ec93b'}",
        "b259:3": "S:disk/by-label/rpool\nE:ID_FS_TYPE=zfs_member",
    },
}
ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
DEFAULT = "vmbr0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"


def write(root: Root, path: str, text: str) -> None:
    real = root.path(path)
    real.parent.mkdir(parents=True, exist_ok=True)
    real.write_text(text + "\n", encoding="utf-8")


class Host(_vfio_apply.Hands):
    """``fail``: what the kernel refuses, path's end to errno. ``ran``: commands."""

    def __init__(self, root: Root, shape: str) -> None:
        super().__init__(root, self.command)
        self.ran: list[str] = []
        self.refuse_command = ""
        self.refuse_bind: set[str] = set()
        self.natives = self._natives()
        write(root, "/proc/sys/kernel/osrelease", "6.17.2-1-pve")
        write(root, "/lib/modules/6.17.2-1-pve/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.zst:")
        write(root, "/proc/self/mountinfo", MOUNTED.get(shape, ""))
        write(root, "/proc/net/route", ROUTES + DEFAULT)
        write(root, "/usr/sbin/update-initramfs", "")
        for name, text in UDEV.get(shape, {}).items():
            write(root, f"/run/udev/data/{name}", text)

    def _natives(self) -> dict[str, str]:
        links = {name: self.driver(name) for name in self.root.listdir(DEVICES)}
        return {name: driver for name, driver in links.items() if driver}

    # --- the kernel ---------------------------------------------------------------------------------------------------

    def write(self, path: str, text: str) -> None:
        if path.endswith("/driver_override"):
            assert text, "an empty write(2) never reaches sysfs"
            write(self.root, path, text.strip() or "(null)")
        elif path.endswith("/reset_method"):
            write(self.root, path, text)
        elif path.endswith("/driver/unbind"):
            assert text in path
            self.root.path(f"{DEVICES}/{text}/driver").unlink()
        elif path == "/sys/bus/pci/drivers_probe":
            self.probe(text)
        else:
            raise AssertionError(f"nothing writes {path}")

    def probe(self, address: str) -> None:
        """device_attach(): an override alone decides, else who has the id."""
        if self.driver(address) or address in self.refuse_bind:
            return
        wanted = self.override(address) or self.natives.get(address, "")
        if wanted and self.root.exists(f"/sys/bus/pci/drivers/{wanted}"):
            link = self.root.path(f"{DEVICES}/{address}").resolve() / "driver"
            up = "../" * (len(link.relative_to(self.root.top.resolve()).parts) - 2)
            link.symlink_to(f"{up}bus/pci/drivers/{wanted}")

    def command(self, argv: list[str]) -> str:
        self.ran.append(" ".join(argv))
        if self.refuse_command and self.refuse_command in self.ran[-1]:
            raise CommandError(f"`{self.ran[-1]}` ended with 1: no space left on device")
        if argv == ["modprobe", "vfio-pci"]:
            self.root.path("/sys/bus/pci/drivers/vfio-pci").mkdir(parents=True, exist_ok=True)
        return ""

    def boot(self) -> None:
        """All functions lose their drivers; then udev sees each, with the rule that is there."""
        for address in self.root.listdir(DEVICES):
            self.root.path(f"{DEVICES}/{address}/driver").unlink(missing_ok=True)
            write(self.root, f"{DEVICES}/{address}/driver_override", "(null)")
        self.root.path("/run/organism/reboot-required.d/vfio").unlink(missing_ok=True)
        self.command(["modprobe", "vfio-pci"])
        rule = self.root.read_or_none("/etc/udev/rules.d/10-organism-vfio.rules") or ""
        taken = set()
        for line in rule.splitlines():
            match = re.match(r'KERNEL=="([^"]+)", ATTR\{vendor\}=="([^"]+)", ATTR\{device\}=="([^"]+)"', line)
            if match and all(
                self.root.read_or_none(f"{DEVICES}/{match[1]}/{name}") == match[number]
                for name, number in (("vendor", 2), ("device", 3))
            ):
                taken.add(match[1])
        options = self.root.read_or_none("/etc/modprobe.d/organism-vfio.conf") or ""
        ids = set(re.findall(r"[0-9a-f]{4}:[0-9a-f]{4}", options.split("softdep")[0]))
        for address in self.root.listdir(DEVICES):
            known = ":".join(
                (self.root.read_or_none(f"{DEVICES}/{address}/{name}") or "").removeprefix("0x")
                for name in ("vendor", "device")
            )
            if address in taken or known in ids:
                if address in taken:
                    write(self.root, f"{DEVICES}/{address}/driver_override", "vfio-pci")
                else:
                    self._force(address, "vfio-pci")
            self.probe(address)

    def _force(self, address: str, driver: str) -> None:
        native, self.natives[address] = self.natives.get(address), driver
        self.probe(address)
        if native:
            self.natives[address] = native
        else:
            del self.natives[address]

    def hold(self, pid: int, node: str, *cmdline: str) -> None:
        """A process that has a device node open."""
        folder = self.root.path(f"/proc/{pid}/fd")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "7").symlink_to(node)
        write(self.root, f"/proc/{pid}/cmdline", "\0".join(cmdline))
        write(self.root, f"/proc/{pid}/comm", cmdline[0].rsplit("/", 1)[-1] if cmdline else "x")

    # --- the product --------------------------------------------------------------------------------------------------

    def plan(self, *entries: dict[str, str], **more: Any) -> Plan:
        earlier = EarlierState("vfio", self.root)
        wish = Wish(tuple(_vfio_select.selector(entry) for entry in entries), **more)
        return _vfio_plan.make_plan(self.root, earlier, _vfio_plan.gather(self.root, earlier), wish)

    def have(self, *entries: dict[str, str], **more: Any) -> _vfio_apply.Outcome:
        """Plan and apply."""
        plan = self.plan(*entries, **more)
        return _vfio_apply.apply(self, EarlierState("vfio", self.root), plan)

    def drivers(self) -> dict[str, str | None]:
        return {name: self.driver(name) for name in self.root.listdir(DEVICES)}

    def state(self) -> dict[str, str]:
        """Every file and link of the tree, but for records of ours."""
        found = {}
        for path in sorted(self.root.top.rglob("*")):
            name = str(path.relative_to(self.root.top))
            if path.is_symlink():
                found[name] = f"-> {Path(path).readlink()}"
            elif path.is_file():
                found[name] = path.read_text(encoding="utf-8")
        return found
