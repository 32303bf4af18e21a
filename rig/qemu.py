# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which QEMU runs the rig, and whether KVM really works here.

The proxied identities of the GPUs need x-pci-proxy-dev of QEMU 7.2 (later ones crash with it). Where the host has
another version, Debian 12's packages are unpacked into the cache and run from there, with their own libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import debian
from .config import Settings
from .errors import RigError, Unavailable
from .show import say

VERSION = "7.2"
SUITE = "bookworm"
NAME = "qemu-system-x86_64"
PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Qemu:
    """How to run QEMU: the words before its arguments, and what they need in the environment."""

    words: tuple[str, ...]
    version: str
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            [*self.words, *arguments], capture_output=True, text=True, check=False, timeout=timeout, env=environment
        )


def _inspect(words: tuple[str, ...], environment: dict[str, str] | None = None) -> Qemu | None:
    """The QEMU behind ``words``, or None unless it is of the right version and can proxy PCI functions."""
    candidate = Qemu(words, "", environment or {})
    found = re.search(r"version (\d+\.\d+)", candidate.run("--version").stdout)
    if found is None or found[1] != VERSION:
        return None
    if '"x-pci-proxy-dev"' not in candidate.run("-machine", "none", "-device", "help").stdout:
        return None
    return Qemu(words, found[1], environment or {})


def _unpacked(tree: Path) -> Qemu | None:
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    binary = tree / "usr/bin" / NAME
    if not binary.exists():
        return None
    loader = libraries / "ld-linux-x86-64.so.2"
    if not loader.exists():
        loader = tree / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    paths = f"{libraries}:{tree / 'lib/x86_64-linux-gnu'}:{libraries / 'pulseaudio'}"
    words = (str(loader), "--library-path", paths, str(binary), "-L", str(tree / "usr/share/qemu"),
             "-L", str(tree / "usr/share/seabios"))  # fmt: skip
    return _inspect(words, {"QEMU_MODULE_DIR": str(libraries / "qemu")})


def find(where: Settings) -> Qemu:
    """QEMU 7.2 of this host, or Debian 12's, fetched into the cache. Raises `Unavailable` when neither can be had."""
    here = shutil.which(NAME, path=debian.search_path())
    if here and not os.environ.get("ORGANISM_RIG_FETCH_QEMU") and (found := _inspect((here,))):
        return found
    tree = where.shared / "qemu"
    if found := _unpacked(tree):
        return found
    debian.require_tools()
    say(f"this host has no QEMU {VERSION}: unpacking Debian 12's into {tree}, once")
    shutil.rmtree(tree, ignore_errors=True)
    try:
        packages = ["qemu-system-x86", "seabios", "libc6"]
        debian.mmdebstrap(where, "qemu", packages, suite=SUITE, variant="extract", target=tree)
    except RigError as error:
        raise Unavailable(f"there is no QEMU {VERSION} here, nor can it be fetched: {error}", error.hint) from error
    if found := _unpacked(tree):
        return found
    raise Unavailable(f"the QEMU in {tree} does not run", f"try {tree / 'usr/bin' / NAME} --version by hand")


def kvm_works(where: Settings, qemu: Qemu, kernel: Path) -> bool:
    """Does a real kernel run under KVM here? Tried once since this host's last boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    known = where.shared / "kvm"
    words = known.read_text(encoding="ascii").split() if known.exists() else []
    if words[:1] != [boot]:
        words = [boot, "works" if probe(qemu, kernel, "kvm", PROBE_SECONDS) else "fails"]
        known.write_text(" ".join(words) + "\n", encoding="ascii")
    return words[1] == "works"


def probe(qemu: Qemu, kernel: Path, accel: str, seconds: float) -> bool:
    """Let ``kernel`` come up without a root file system: it has to get as far as to complain about that.

    A node /dev/kvm alone proves nothing, and hosts exist whose KVM runs firmware but no ordinary kernel.
    """
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    arguments = ["-accel", accel, "-machine", "q35", "-nodefaults", "-display", "none", "-m", "512", "-no-reboot"]
    arguments += ["-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    try:
        return "Unable to mount root" in qemu.run(*arguments, timeout=seconds).stdout
    except subprocess.TimeoutExpired:
        return False


def accelerator(where: Settings, qemu: Qemu, kernel: Path) -> str:
    """What -accel gets: KVM where it works, else emulation on one thread (several were seen to kill kernels).

    ORGANISM_RIG_ACCEL=tcg or kvm decides it by hand.
    """
    asked = os.environ.get("ORGANISM_RIG_ACCEL", "")
    if asked not in ("", "tcg", "kvm"):
        raise RigError(f"ORGANISM_RIG_ACCEL={asked!r}", "it is tcg or kvm")
    if asked == "kvm" or (not asked and kvm_works(where, qemu, kernel)):
        return "kvm"
    return "tcg,thread=single"
