# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A virtual machine without an emulated processor: Debian's user-mode Linux, a kernel that runs as a process.

Its programs run at the processor's own speed, their system calls slower: where KVM does not work it is many times
faster than emulation. One processor, no hardware. Needs root, the package vde2 (its network, without privileges and
apart from the host's) and, on a processor with AMX, a C compiler.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

PACKAGE = "user-mode-linux"
GUEST = "10.0.2.15"
START = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs -o exec,size=100% tmpfs "$1/tmp"
mkdir -p "$1$2"
mount --bind "$2" "$1$2"
root=$1
shift 2
exec chroot "$root" "$@"
"""
"""In a mount name space of its own: the kernel keeps the guest's memory in a file below /tmp, and finds its network."""


def prepare(tree: Path, host: Path) -> None:
    """Take from a Debian tree with the kernel's package what the kernel's process needs, before it becomes an image."""
    version = next((tree / "usr/lib/uml/modules").iterdir()).name
    (tree / "usr/lib/modules").mkdir(exist_ok=True)
    (tree / "usr/lib/modules" / version).symlink_to(f"../uml/modules/{version}")
    shutil.rmtree(host, ignore_errors=True)
    for folder in ("proc", "dev", "tmp", "run", "usr/lib/x86_64-linux-gnu", "usr/lib64"):
        (host / folder).mkdir(parents=True)
    for name in ("lib", "lib64"):
        (host / name).symlink_to(f"usr/{name}")
    (tree / "usr/bin/linux.uml").rename(host / "linux.uml")  # the guest does not need it
    for name in ("usr/lib/x86_64-linux-gnu/libc.so.6", "usr/lib64/ld-linux-x86-64.so.2"):
        shutil.copy((tree / name).resolve() if (tree / name).exists() else tree / name, host / name)


def preload(host: Path) -> dict[str, str]:
    """The environment of the kernel's process."""
    environment = {"TMPDIR": "/tmp", "HOME": "/"}  # noqa: S108 - a file system of its own
    if "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        source = Path(__file__).with_name("uml_xstate.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", host / "xstate.so", source], check=True)
        environment["LD_PRELOAD"] = "/xstate.so"
    return environment


class Network:
    """A switch and a router in user space; the guest's port 22 is ``port`` on this host."""

    def __init__(self, work: Path, port: int) -> None:
        self.folder = work / "vde"
        shutil.rmtree(self.folder, ignore_errors=True)
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.switch = subprocess.Popen(["vde_switch", "-s", self.folder], start_new_session=True, **quiet)  # type: ignore[call-overload]  # keyword passthrough
        while not (self.folder / "ctl").exists():
            if self.switch.poll() is not None:
                raise RuntimeError("vde_switch ended at its start")
        self.router = subprocess.Popen(
            ["slirpvde", "-s", self.folder, "--dhcp", "-L", f"{port}:{GUEST}:22"], start_new_session=True, **quiet
        )  # type: ignore[call-overload]  # keyword passthrough

    def stop(self) -> None:
        for process in (self.router, self.switch):
            process.terminate()
            process.wait(10)


def launch(work: Path, image: Path, memory: str, log: Path) -> tuple[subprocess.Popen[bytes], Network, int]:
    """Start it on a copy of the image; returns its process, its network and the port of its sshd."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    host = work / "uml"
    environment = preload(host)
    disk = host / "disk.img"
    subprocess.run(["cp", "--sparse=always", image, disk], check=True)
    network = Network(work, port)
    kernel = ["/linux.uml", f"mem={memory}", "ubd0=/disk.img", "root=/dev/ubda", "rw", "con=null", "con0=null,fd:1"]
    kernel += [f"eth0=daemon,52:54:00:12:34:56,unix,{network.folder}/ctl", "uml_dir=/run/", "panic=1", "quiet"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", START, "sh", host, network.folder, *kernel],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**environment, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            start_new_session=True,
        )
    return process, network, port
