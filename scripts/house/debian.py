# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Debian packages: only those that are missing, and a word on why each is wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .steps import StepFailed, Steps

LAB = {
    "ca-certificates": "TLS to the package index",
    "debian-archive-keyring": "checks what the lab machines' tree is built from",
    "iproute2": "the lab's bridge",
    "mmdebstrap": "builds the lab machines' Debian tree",
    "mount": "the lab machines' file systems",
    "openssh-client": "Ansible's way into the lab machines",
    "rsync": "copies trees",
    "systemd-container": "systemd-nspawn, which runs the lab machines",
    "util-linux": "nsenter, for a look inside",
}
TEST = {
    "e2fsprogs": "file systems that the cache tests fill up",
    "libfaketime": "steps of the clock in the chaos suite",
    "git": "the checkers' view of which files belong to the project",
    "shellcheck": "checks the shell scripts",
    "strace": "counts what the durability tests must see",
    "xfsprogs": "a second journaled file system, for the cuts of power",
    "systemd": "systemd-analyze, which verifies the units",
}
RIG = {
    "ca-certificates": "TLS to the package index",
    "acpica-tools": "compiles the rig's table of processor frequencies",
    "debian-archive-keyring": "checks what the rig's disk is built from",
    "dosfstools": "the EFI partition of the rig's disk",
    "e2fsprogs": "the root file system of the rig's disk",
    "fdisk": "partitions the rig's disk",
    "mmdebstrap": "builds the rig's Debian",
    "mtools": "fills the EFI partition",
    "openssh-client": "the way into the rig",
    "qemu-system-x86": "runs the rig",
    "qemu-utils": "the rig's disks",
    "util-linux": "setpriv, which ties the rig to its keeper",
}
WANTED = {"demo": LAB, "rig": RIG, "test": LAB | RIG | TEST}


def missing(packages: dict[str, str]) -> list[str]:
    """Names of `packages` that dpkg does not have installed."""
    if shutil.which("dpkg-query") is None:
        return sorted(packages)
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it complains about names that it does not know, which is the answer we want
        text=True,
        check=False,
    )
    have = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return sorted(set(packages) - have)


def install(packages: list[str], why: dict[str, str], steps: Steps) -> None:
    """apt-get install `packages`, through sudo when not root; StepFailed says what to do where neither works."""
    for name in packages:
        steps.say(f"      {name:<20} {why[name]}")
    if shutil.which("apt-get") is None:
        raise StepFailed(f"{steps.title}: no apt-get here: install the equivalents of these packages, then run again")
    apt = _as_root(f"apt-get install {' '.join(packages)}", steps)
    env = dict(os.environ)
    steps.run([*apt, "update"], env=env)
    steps.run([*apt, "install", "-y", "--no-install-recommends", *packages], env=env)


def _as_root(by_hand: str, steps: Steps) -> list[str]:
    """apt-get's first words, through sudo when not root."""
    prefix: list[str] = []
    if os.geteuid() != 0:
        then = f"run this as root, then run again:\n  {by_hand}"
        if shutil.which("sudo") is None:
            raise StepFailed(f"{steps.title}: you are not root and there is no sudo; {then}")
        # asks for the password here, on the terminal: the installation's own output goes to the log
        if subprocess.run(["sudo", "-v"], check=False).returncode != 0:
            raise StepFailed(f"{steps.title}: sudo refused; {then}")
        prefix = ["sudo", "-n"]
    return [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "apt-get", "-q"]


def unpack(package: str, member: str, target: Path, steps: Steps) -> None:
    """One program out of a package, which is not installed: its daemon would start, and its files go everywhere."""
    if shutil.which("apt-get") is None:
        raise StepFailed(f"{steps.title}: no apt-get here: put {member} on the PATH by hand, then run again")
    folder = target.parent / f".{package}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # apt gives up root for a download, and complains where that user cannot write
    download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
    try:
        steps.run(download, env=dict(os.environ), cwd=folder)
    except StepFailed:  # no lists, or lists of an older version
        steps.run([*_as_root("apt-get update", steps), "update"], env=dict(os.environ))
        steps.run(download, env=dict(os.environ), cwd=folder)
    (archive,) = folder.glob("*.deb")
    steps.run(["dpkg-deb", "-x", archive, folder / "tree"], env=dict(os.environ))
    (folder / "tree" / member).replace(target)
    shutil.rmtree(folder)
