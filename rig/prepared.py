# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The snapshot that tests start from: the disk booted once by its boot loader, settled, and saved with its memory.

Kept in one file with the disk: started with it the machine is at the moment of the snapshot; booted from it, it was
shut down in good order. What cannot be saved (proxied functions, NVMe, taps) is plugged in after the start.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import acpi, image, launch, remote
from .config import Settings
from .errors import RigError
from .hardware import Machine
from .life import Life
from .ports import free_port
from .qemu import Qemu, accelerator
from .qmp import Qmp
from .show import say

TRIES = 2
SETTLE_SECONDS = 900.0
# Real settings by the machine's own tools, and everything that would still be under way after a first boot.
SETTLE = """set -e
systemctl is-system-running --wait > /dev/null || test "$(systemctl is-system-running)" = degraded
mount /boot/efi && umount /boot/efi
update-grub
modprobe -a acpi-cpufreq zfs vfio-pci nvme tun bridge scsi_mod sd_mod
udevadm settle
apt-get -q clean
sync
systemctl --failed --no-legend
"""


@dataclass(frozen=True)
class Prepared:
    """``disk`` holds the snapshot; ``kernel`` and ``initrd`` are for starts without the boot loader."""

    disk: Path
    kernel: Path
    initrd: Path
    root: str
    table: Path
    accelerator: str


@contextmanager
def _only_one(where: Settings) -> Iterator[None]:
    where.shared.mkdir(parents=True, exist_ok=True)
    with (where.shared / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another rig's preparation")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def exists(where: Settings, machine: Machine) -> bool:
    """Whether such a machine was prepared before, for whatever QEMU and accelerator."""
    return any(image.folder(where, machine.flavour).glob(f"prepared-{machine.memory}-*.qcow2"))


def ensure(where: Settings, machine: Machine, qemu: Qemu) -> Prepared:
    """The prepared disk for this machine's memory, kernel and accelerator; made unless it is in the cache.

    From nothing about five minutes, with ZFS modules and image about one.
    """
    with _only_one(where):
        raw = image.base(where, machine.flavour)
        folder = raw.parent
        accel = accelerator(where, qemu, folder / "vmlinuz")
        disk = folder / f"prepared-{machine.memory}-{accel.split(',')[0]}-{qemu.version}.qcow2"
        found = Prepared(
            disk,
            folder / "vmlinuz",
            folder / "initrd.img",
            (folder / "root").read_text().strip(),
            acpi.table(folder),
            accel,
        )
        if not disk.exists():
            _make(where.named("prepare"), machine, qemu, raw, found)
        return found


def _make(where: Settings, machine: Machine, qemu: Qemu, raw: Path, found: Prepared) -> None:
    where.run.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, TRIES + 1):
        say(f"booting it once for the snapshot (attempt {attempt} of {TRIES}; log: {where.run / 'serial.log'})")
        try:
            _boot_and_save(where, machine, qemu, raw, found)
        except (RigError, subprocess.TimeoutExpired) as error:
            if attempt == TRIES:
                raise RigError(f"the snapshot could not be made: {error}", f"see {where.run / 'serial.log'}") from error
            say(str(error))
        else:
            return


def _boot_and_save(where: Settings, machine: Machine, qemu: Qemu, raw: Path, found: Prepared) -> None:
    system = where.run / "system.qcow2"
    system.unlink(missing_ok=True)
    made = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", system],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise RigError(f"qemu-img create ended with {made.returncode}: {made.stderr.strip()}")
    port = free_port()
    arguments = launch.base(machine, system, found.table, port, found.accelerator)
    life = Life(where, qemu, machine, arguments, port, how="bare")
    life.begin()
    try:
        life.await_ssh()
        say(f"it answers after {life.seconds:.0f} s; settling")
        done = subprocess.run(
            remote.command(where, port, SETTLE), capture_output=True, text=True, check=False, timeout=SETTLE_SECONDS
        )
        if done.returncode:
            raise RigError(f"settling ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-1500:]}")
        if done.stdout.strip():
            say(f"units that failed at boot: {done.stdout.strip()}")
        with Qmp(where.run / "qmp.sock", timeout=120) as qmp:
            if complaint := qmp.human(f"savevm {launch.SNAPSHOT}").strip():
                raise RigError(f"savevm: {complaint}")
        subprocess.run(remote.command(where, port, "systemctl poweroff"), capture_output=True, check=False, timeout=60)
        if life.process.wait(120):
            raise RigError(f"QEMU ended with {life.process.returncode} at the power-off")
    finally:
        life.kill("done")
        life.process.wait()
        subprocess.run(["ssh", *remote.options(where), "-O", "exit", "127.0.0.1"], capture_output=True, check=False)
    system.rename(found.disk)
    shutil.rmtree(where.run)
    say("the snapshot is ready")
