# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig's disk: Debian with what the tests need, built once for each recipe and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from . import debian, zfs
from .config import REPO, SUITE, Settings
from .errors import RigError
from .show import say

PACKAGES = (
    # the system itself
    "systemd", "systemd-sysv", "udev", "dbus", "libpam-systemd", "kmod", "procps", "iproute2", "util-linux",
    "ca-certificates", "initramfs-tools", "zstd", "less", "iputils-ping", "e2fsprogs",
    # its boot loaders
    "grub2-common", "grub-pc-bin", "grub-efi-amd64-bin",
    # what Ansible needs
    "openssh-server", "sudo", "python3", "python3-apt", "python3-venv", "acl", "rsync",
    # what the levels tune, and what is there to be masked
    "irqbalance", "systemd-zram-generator", "linux-cpupower", "zfsutils-linux", "ethtool", "numactl", "nvme-cli",
    # what measures, what looks, and what stands for virtual machines
    "pciutils", "rt-tests", "fio", "qemu-system-x86",
)  # fmt: skip
FLAVOURS = ("cloud-amd64", "amd64")
_SOURCES = ("assemble.py", "image.py")


def recipe(flavour: str) -> str:
    """Identifies what an image is built from; one of another recipe is built anew."""
    here = Path(__file__).parent
    text = json.dumps([SUITE, PACKAGES, flavour, debian.LEFT_OUT, *((here / name).read_text() for name in _SOURCES)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder(where: Settings, flavour: str) -> Path:
    return where.images / f"{SUITE}-{flavour}-{recipe(flavour)}"


def make_key(where: Settings) -> None:
    """The key that opens every rig of this cache."""
    if not where.key.exists():
        where.shared.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = [
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-C",
            "organism rig",
            "-f",
            where.key,
        ]
        subprocess.run(command, check=True)


def base(where: Settings, flavour: str) -> Path:
    """The raw disk, built unless it is there: a minute, and three more for the first build of the ZFS modules."""
    place = folder(where, flavour)
    disk = place / "disk.raw"
    if disk.exists():
        return disk
    debian.require_tools()
    make_key(where)
    release = debian.kernel_release(flavour)
    modules = zfs.modules(where, release)
    say(f"building the disk: Debian {SUITE} with {release}, once (about a minute; log: {where.logs / 'image.log'})")
    unfinished = place.with_name(place.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    unfinished.chmod(0o777)  # the hook runs as the root of a user name space where we are not root
    shutil.copy(f"{where.key}.pub", unfinished / "authorized_keys")
    shutil.copy(modules, unfinished / "zfs.tar")
    words = [sys.executable, "-B", "-m", "rig.assemble"]
    after = [str(unfinished), release]
    hook = f'env PYTHONPATH={shlex.quote(str(REPO))} {shlex.join(words)} "$1" {shlex.join(after)}'
    debian.mmdebstrap(where, "image", [*PACKAGES, f"linux-image-{release}"], hooks=[hook])
    if not (unfinished / "disk.raw").exists():
        raise RigError(f"no disk was written to {unfinished}", f"the log is {where.logs / 'image.log'}")
    for name in ("zfs.tar", "boot.img", "core.img", "grubx64.efi"):
        (unfinished / name).unlink()
    (unfinished / "release").write_text(release + "\n", encoding="utf-8")
    unfinished.chmod(0o755)
    if not any(where.runs.glob("*/system.qcow2")):  # a running machine's disk stands on its image
        for other in where.images.glob(f"{SUITE}-{flavour}-*"):
            if other != unfinished:
                shutil.rmtree(other)  # of an older recipe
    os.replace(unfinished, place)  # noqa: PTH105 - a folder, in one step
    return disk
