# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which boot loader starts this host, where it takes the kernel's command line from, and what makes it read that again.

Proxmox VE: ``/etc/kernel/proxmox-boot-uuids`` exists where proxmox-boot-tool manages the EFI system partitions; each of
them boots by GRUB where ``proxmox-boot-tool status`` says so or the host is not UEFI, else by systemd-boot. Without it:
plain GRUB, or systemd-boot fed by kernel-install.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._root import Root
from ._systemd import Runner, run_command

GRUB = "grub"
KERNEL_CMDLINE = "kernel-cmdline"
"""Places of a command line: shell variables of /etc/default/grub, and the first line of /etc/kernel/cmdline."""

CMDLINE_FILE = "/etc/kernel/cmdline"
BOOT_UUIDS = "/etc/kernel/proxmox-boot-uuids"
_LOADER_INFO = "/sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
_ESPS = ("/boot/efi", "/efi", "/boot")
_STATUS = re.compile(r"^([0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}) is configured with: ?(.*)$", re.MULTILINE)


class BootLoaderError(Exception):
    """The loader cannot be told; the text says what was looked for and what to set."""


@dataclass(frozen=True)
class BootLoader:
    """``name`` is for people and results, ``places`` says where command lines come from, ``refresh`` are the commands
    (each a list of words) that make a change count at the next boot."""

    name: str
    places: tuple[str, ...]
    refresh: tuple[tuple[str, ...], ...]


def parse_status(text: str, *, efi: bool) -> dict[str, str]:
    """``proxmox-boot-tool status``: ``grub`` or ``systemd-boot`` by EFI system partition.

    A partition that was changed from systemd-boot to GRUB keeps the former's files and shows both: GRUB is what boots.
    """
    found = {}
    for uuid, configured in _STATUS.findall(text):
        kinds = re.findall(r"\b(uefi|grub)\b \(", configured)
        if kinds:
            found[uuid] = GRUB if "grub" in kinds or not efi else "systemd-boot"
    return found


def _booted_by(root: Root) -> str:
    """What the loader that started this kernel said of itself (systemd's Boot Loader Interface), or nothing."""
    try:
        raw = root.path(_LOADER_INFO).read_bytes()
    except OSError:
        return ""
    return raw[4:].decode("utf-16-le", errors="replace").rstrip("\0")  # 4 bytes of attributes come first


def _kernels(root: Root) -> list[tuple[str, str]]:
    """(version, image) of the kernels that have both an image and modules."""
    found = [(path.rpartition("/vmlinuz-")[2], path) for path in root.glob("/boot/vmlinuz-*")]
    return [(version, image) for version, image in found if root.exists(f"/lib/modules/{version}")]


def detect(root: Root, run: Runner = run_command) -> BootLoader:
    """The host's boot loader. Raises BootLoaderError, and CommandError when proxmox-boot-tool fails."""
    efi = root.exists("/sys/firmware/efi")
    if root.exists(BOOT_UUIDS):
        partitions = parse_status(run(["proxmox-boot-tool", "status"]), efi=efi)
        if not partitions:
            raise BootLoaderError(
                f"{BOOT_UUIDS} is there and `proxmox-boot-tool status` shows no usable partition; "
                "repair that first (proxmox-boot-tool clean, init), or set loader"
            )
        kinds = set(partitions.values())
        return named("proxmox-boot-tool-" + ("mixed" if len(kinds) > 1 else kinds.pop()), root)
    if _booted_by(root).startswith("systemd-boot"):
        return named("systemd-boot", root)
    if root.exists("/etc/default/grub") or root.exists("/usr/sbin/update-grub"):
        return named("grub", root)
    if any(root.exists(f"{esp}/EFI/systemd/systemd-bootx64.efi") for esp in _ESPS):
        return named("systemd-boot", root)
    raise BootLoaderError(
        "no boot loader was found: neither proxmox-boot-tool's list of partitions, nor /etc/default/grub, nor "
        "systemd-boot on an EFI system partition; set loader"
    )


def written_lines(root: Root, loader: BootLoader) -> list[str] | None:
    """Command lines in the menu that the loader reads at boot; None where they lie out of reach.

    proxmox-boot-tool's partitions are not mounted, and unified kernel images hide theirs.
    """
    if loader.name == "grub":
        text = root.read_or_none("/boot/grub/grub.cfg")
        return None if text is None else re.findall(r"^\s*linux\S*\s+\S+[ \t]+(.*)$", text, re.MULTILINE)
    if loader.name == "systemd-boot":
        entries = [path for esp in _ESPS for path in root.glob(f"{esp}/loader/entries/*.conf")]
        if not entries and any(root.glob(f"{esp}/EFI/Linux/*.efi") for esp in _ESPS):
            return None
        texts = "\n".join(root.read_or_none(path) or "" for path in entries)
        return re.findall(r"^options[ \t]+(.*)$", texts, re.MULTILINE)
    return None


LOADERS = (
    "grub",
    "proxmox-boot-tool-grub",
    "proxmox-boot-tool-systemd-boot",
    "proxmox-boot-tool-mixed",
    "systemd-boot",
)


def named(name: str, root: Root) -> BootLoader:
    """A loader by its name (one of LOADERS)."""
    if name == "grub":
        return BootLoader(name, (GRUB,), (("update-grub",),))
    if name == "systemd-boot":
        commands = tuple(("kernel-install", "add", version, image) for version, image in _kernels(root))
        return BootLoader(name, (KERNEL_CMDLINE,), commands)
    places = {
        "proxmox-boot-tool-grub": (GRUB,),
        "proxmox-boot-tool-systemd-boot": (KERNEL_CMDLINE,),
        "proxmox-boot-tool-mixed": (GRUB, KERNEL_CMDLINE),
    }[name]
    return BootLoader(name, places, (("proxmox-boot-tool", "refresh"),))
