# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run by mmdebstrap on the finished tree: settles it as a server and packs it into a disk that boots by itself.

The disk is GPT: a BIOS boot partition with GRUB's core, an EFI system partition, the root file system. It is written
without loop devices and mounts, so no root is needed beyond the tree's own name space.

    python3 -m rig.assemble TREE FOLDER RELEASE     (FOLDER holds authorized_keys and zfs.tar, and receives disk.raw)
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from .hardware import MANAGEMENT_MAC, PORT_MAC

SECTOR = 512
MIB = 1 << 20
CORE_START, CORE_SECTORS = 34, 2014
ESP_START, ESP_BYTES = 2048, 256 * MIB
ROOT_START = ESP_START + ESP_BYTES // SECTOR
ROOT_BYTES = 10 << 30
DISK_BYTES = ROOT_START * SECTOR + ROOT_BYTES + 2 * MIB
# GUIDs of the partition types: BIOS boot (GRUB manual, "BIOS installation"), EFI system partition, Linux root x86-64
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
COMMON_MODULES = (
    "part_gpt ext2 fat normal linux search search_label search_fs_uuid configfile echo test serial terminal gzio "
    "minicmd"
)

# A panic ends QEMU, and the keeper starts it again. The four switches avoid what an emulated processor takes ten times
# as long for (page table switches, mispredicted returns); `mitigations=off` itself is left to what is tested.
KERNEL = "console=ttyS0 panic=-1 tsc=reliable pti=off spectre_v2=off retbleed=off mds=off intel_iommu=on iommu=pt"
GRUB_DEFAULTS = f"""\
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR="Rig"
GRUB_CMDLINE_LINUX_DEFAULT="quiet"
GRUB_CMDLINE_LINUX="{KERNEL}"
GRUB_TERMINAL=serial
GRUB_DISABLE_OS_PROBER=true
"""
MANAGEMENT = (
    f"[Match]\nMACAddress={MANAGEMENT_MAC}\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n[DHCPv4]\nUseDNS=no\n"
)
PORT = f"[Match]\nMACAddress={PORT_MAC}\nType=ether\n[Link]\nRequiredForOnline=no\n[Network]\nBridge=vmbr0\n"
BRIDGE = (
    "[Match]\nName=vmbr0\n[Link]\nRequiredForOnline=no\n"
    "[Network]\nAddress=10.77.0.2/24\nConfigureWithoutCarrier=yes\nLinkLocalAddressing=no\n"
)
FILES = {
    "etc/hostname": "rig\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 rig\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",
    "etc/default/grub": GRUB_DEFAULTS,
    "etc/systemd/network/10-management.network": MANAGEMENT,
    "etc/systemd/network/20-vmbr0.netdev": "[NetDev]\nName=vmbr0\nKind=bridge\n",
    "etc/systemd/network/20-vmbr0.network": BRIDGE,
    "etc/systemd/network/30-port.network": PORT,
    "etc/ssh/sshd_config.d/rig.conf": "UseDNS no\nPermitRootLogin prohibit-password\n",
    # what the machine boots from, and no more: rebuilding it takes seconds instead of a minute on an emulated processor
    "etc/initramfs-tools/conf.d/rig.conf": "MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\nnvme\next4\n",
    "etc/modules-load.d/rig.conf": "acpi-cpufreq\n",
    # the package would make a device at each boot; a host has none until somebody wants one
    "etc/systemd/zram-generator.conf": "",
    # several copies of one snapshot would share it
    "etc/machine-id": "",
}
# they would wake up in the middle of a measurement
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer")

# runs a command on the tree ($1) without what is mounted in it
BARE = """tree=$1; shift
cut -d' ' -f5 /proc/self/mountinfo | grep "^$tree/" | sort -r | while read -r point; do umount "$point"; done
exec "$@"
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def settle(tree: Path, folder: Path, release: str) -> None:
    """Files, units, ZFS modules, keys, boot image."""
    for name, text in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
    keys = tree / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(folder / "authorized_keys", keys / "authorized_keys")
    (keys / "authorized_keys").chmod(0o600)
    run("tar", "-C", tree / "usr", "--no-same-owner", "-xf", folder / "zfs.tar")
    run("chroot", tree, "depmod", release)
    run("chroot", tree, "systemctl", "-q", "enable", "systemd-networkd.service", "ssh.service")
    run("chroot", tree, "systemctl", "-q", "mask", *MASKED)
    run("chroot", tree, "update-initramfs", "-u", "-k", release)
    shutil.rmtree(tree / "var/cache/apt/archives")
    (tree / "var/cache/apt/archives/partial").mkdir(parents=True)


def grub_config(release: str, root: str) -> str:
    """The first grub.cfg; update-grub in the running machine replaces it."""
    return (
        f"serial --unit=0\nsearch --no-floppy --fs-uuid {root} --set=root\nset timeout=0\n"
        f"menuentry rig {{ linux /boot/vmlinuz-{release} root=UUID={root} ro "
        f"quiet {KERNEL}\n initrd /boot/initrd.img-{release} }}\n"
    )


def grub(tree: Path, folder: Path, release: str, root: str) -> None:
    """GRUB's modules and configuration in the tree; its core images in ``folder``."""
    for target in ("i386-pc", "x86_64-efi"):
        destination = tree / "boot/grub" / target
        destination.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.mod", "*.lst"):
            for path in (tree / "usr/lib/grub" / target).glob(pattern):
                shutil.copy(path, destination)
    (tree / "boot/grub/grub.cfg").write_text(grub_config(release, root), encoding="utf-8")
    early = tree / "tmp/early.cfg"
    early.write_text(
        f"search --no-floppy --fs-uuid {root} --set=root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
    )
    for target, image, more in (
        ("i386-pc", "core.img", ["biosdisk"]),
        ("x86_64-efi", "grubx64.efi", ["efi_gop", "all_video"]),
    ):
        modules = [*COMMON_MODULES.split(), *more]
        run(
            "chroot",
            tree,
            "grub-mkimage",
            "-O",
            target,
            "-p",
            "/boot/grub",
            "-c",
            "/tmp/early.cfg",  # noqa: S108 - in the tree
            "-o",
            f"/tmp/{image}",  # noqa: S108 - in the tree
            *modules,
        )
        shutil.move(tree / "tmp" / image, folder / image)
    early.unlink()
    shutil.copy(tree / "usr/lib/grub/i386-pc/boot.img", folder / "boot.img")


def partition(disk: Path) -> None:
    with disk.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    table = (
        f"label: gpt\nunit: sectors\nfirst-lba: {CORE_START}\n"
        f"start={CORE_START}, size={CORE_SECTORS}, type={BIOS_BOOT}\n"
        f"start={ESP_START}, size={ESP_BYTES // SECTOR}, type={ESP}\n"
        f"start={ROOT_START}, size={ROOT_BYTES // SECTOR}, type={ROOT}\n"
    )
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)


def patch_core(core: bytes, start: int) -> bytes:
    """GRUB's core image reads the rest of itself by the block list at the end of its first sector.

    The entry is (first sector: 64 bits, sectors: 16 bits, segment: 16 bits): grub-core/boot/i386/pc/diskboot.S.
    """
    sectors = (len(core) + SECTOR - 1) // SECTOR
    if sectors > CORE_SECTORS:
        raise ValueError(f"GRUB's core image has {sectors} sectors; the BIOS boot partition holds {CORE_SECTORS}")
    patched = bytearray(core)
    struct.pack_into("<QHH", patched, SECTOR - 12, start + 1, sectors - 1, 0x820)
    return bytes(patched)


def patch_boot(boot: bytes, mbr: bytes, start: int) -> bytes:
    """GRUB's boot sector with the core's place (at 0x5c) and without its check of the drive number, keeping the table.

    Offsets: grub-core/boot/i386/pc/boot.S (GRUB_BOOT_MACHINE_KERNEL_SECTOR, GRUB_BOOT_MACHINE_DRIVE_CHECK).
    """
    patched = bytearray(boot[:SECTOR])
    struct.pack_into("<Q", patched, 0x5C, start)
    patched[0x66:0x68] = b"\x90\x90"
    patched[440:SECTOR] = mbr[440:SECTOR]
    return bytes(patched)


def bios_boot(disk: Path, folder: Path) -> None:
    with disk.open("r+b") as stream:
        mbr = stream.read(SECTOR)
        stream.seek(0)
        stream.write(patch_boot((folder / "boot.img").read_bytes(), mbr, CORE_START))
        stream.seek(CORE_START * SECTOR)
        stream.write(patch_core((folder / "core.img").read_bytes(), CORE_START))


def efi_partition(disk: Path, folder: Path) -> None:
    image = folder / "esp.img"
    with image.open("wb") as stream:
        stream.truncate(ESP_BYTES)
    run("mkfs.vfat", "-F", "32", "-n", "RIGESP", image)
    run("mmd", "-i", image, "::EFI", "::EFI/BOOT")
    run("mcopy", "-i", image, folder / "grubx64.efi", "::EFI/BOOT/BOOTX64.EFI")
    write_sparse(image, disk, ESP_START * SECTOR)
    image.unlink()


def write_sparse(source: Path, target: Path, offset: int) -> None:
    """Copy ``source`` into ``target`` at ``offset``, leaving out what is zero there already."""
    with source.open("rb") as reader, target.open("r+b") as writer:
        position = offset
        while chunk := reader.read(MIB):
            if chunk.strip(b"\0"):
                writer.seek(position)
                writer.write(chunk)
            position += len(chunk)


def root_partition(tree: Path, disk: Path, root: str) -> None:
    """The tree as ext4, with a journal: the machine's power will be cut."""
    extended = f"offset={ROOT_START * SECTOR},lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
    where = ["-U", root, "-L", "rigroot", "-J", "size=32", "-E", extended, "-d", str(tree)]
    # in a mount name space of its own: /proc and the like, which packages wanted in the tree, are no part of it
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", BARE, "sh", str(tree)]
    run(*inside, "mkfs.ext4", "-q", "-F", *where, disk, f"{ROOT_BYTES // 1024}k")


def main(arguments: Sequence[str]) -> int:
    tree, folder, release = Path(arguments[0]), Path(arguments[1]), arguments[2]
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    root, disk = str(uuid.uuid4()), folder / "disk.raw"
    (tree / "boot/efi").mkdir(exist_ok=True)
    (tree / "etc/fstab").write_text(
        f"UUID={root} / ext4 defaults,noatime,noinit_itable,errors=remount-ro 0 1\n"
        "LABEL=RIGESP /boot/efi vfat umask=0077,noauto 0 0\n"
    )
    settle(tree, folder, release)
    grub(tree, folder, release, root)
    partition(disk)
    bios_boot(disk, folder)
    efi_partition(disk, folder)
    root_partition(tree, disk, root)
    shutil.copy(tree / f"boot/vmlinuz-{release}", folder / "vmlinuz")
    shutil.copy(tree / f"boot/initrd.img-{release}", folder / "initrd.img")
    (folder / "root").write_text(root + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
