#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a command of a clean clone on a fresh Debian server: a virtual machine made for it and thrown away.

    scripts/fresh_vm.py [--suite trixie] [--kernel user-mode] [--keep] [--work DIR] -- ./run demo

The server has systemd, sshd and certificates, and no Python, make, pip or git: what the command needs it must install
by itself. The image is built from Debian's packages with mmdebstrap. The machine is emulated unless
ORGANISM_VM_ACCEL=kvm says that KVM works here; emulated, expect ten to twenty times the usual time. With --kernel
user-mode Debian's user-mode Linux is its kernel (scripts/fresh_uml.py): two to three times the usual time, anywhere.
Needs root, mmdebstrap, e2fsprogs, an ssh client and git; qemu-system-x86, or vde2 for user-mode. Exit status: the
command's own; 3 when the machine could not be built or booted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fresh_uml

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = "systemd,systemd-sysv,udev,dbus,libpam-systemd,openssh-server,ca-certificates,iproute2,procps,kmod"
BOOT_SECONDS = 240
CPU = "Skylake-Client,-cx16"
"""Without cmpxchg16b: QEMU 7.2 emulates it with stray flags on one thread, and the guest's kernel dies of them."""
BOOTS = 2
"""A kernel that dies ends the machine (panic=-1, -no-reboot)."""
NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=ipv4\n"


class Trouble(Exception):
    """The machine could not be built or booted."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def quiet(command: Sequence[str | Path], **more: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]  # keyword passthrough
    if done.returncode:
        raise Trouble(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def debian_sources(suite: str) -> str:
    """The host's own Debian mirror, with the suite exchanged."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(REPO_URI) $(COMPONENT) $(CODENAME)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        uri = line.split()[1]
        if uri.rstrip("/").endswith("/debian"):
            return f"deb {uri} {suite} main\ndeb {uri} {suite}-updates main\n"
    raise Trouble("found no Debian archive in this host's apt sources: run `apt-get update` first")


KERNELS = {"emulated": ("linux-image-cloud-amd64", "/dev/nvme0n1"), "user-mode": (fresh_uml.PACKAGE, "/dev/ubda")}
"""The kernel's package, and the disk that it boots from."""


def build(work: Path, suite: str, kernel: str) -> None:
    image, tree = work / f"{suite}-{kernel}.img", work / "tree"
    if image.exists():
        say(f"image {image.name} is there")
        return
    package, disk = KERNELS[kernel]
    packages = f"{PACKAGES},{package}"
    say(f"building a minimal Debian {suite} ({packages.count(',') + 1} packages)")
    shutil.rmtree(tree, ignore_errors=True)
    sources = work / "sources.list"
    sources.write_text(debian_sources(suite))
    options = ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    quiet(["mmdebstrap", "--mode=root", "--variant=minbase", *options, f"--include={packages}", suite, tree, sources])
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", tree / "etc/ssl/certs/ca-certificates.crt")
    (tree / "etc/hostname").write_text("fresh\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost fresh\n")
    (tree / "etc/fstab").write_text(f"{disk} / ext4 defaults,noatime 0 1\n")
    (tree / "etc/systemd/network/10-lan.network").write_text(NETWORK)
    (tree / "etc/resolv.conf").unlink(missing_ok=True)
    (tree / "etc/resolv.conf").write_text("nameserver 10.0.2.3\n")
    (tree / "etc/ssh/sshd_config.d/fresh.conf").write_text("UseDNS no\nPermitRootLogin prohibit-password\n")
    quiet(["chroot", tree, "systemctl", "enable", "systemd-networkd", "ssh"])
    quiet(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / "key"]) if not (work / "key").exists() else None
    keys = tree / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(work / "key.pub", keys / "authorized_keys")
    if kernel == "user-mode":
        fresh_uml.prepare(tree, work / "uml")
    else:
        shutil.copy(next((tree / "boot").glob("vmlinuz-*")), work / f"vmlinuz-{suite}")
    partial = image.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with partial.open("wb") as stream:
        stream.truncate(16 << 30)
    quiet(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", tree, partial])
    partial.rename(image)
    shutil.rmtree(tree)


def accelerator() -> str:
    """Emulation on one thread, which never panicked a guest. (A node /dev/kvm alone proves nothing.)"""
    if os.environ.get("ORGANISM_VM_ACCEL"):
        return os.environ["ORGANISM_VM_ACCEL"]
    return "tcg,thread=single"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machine:
    def __init__(self, work: Path, suite: str, memory: str) -> None:
        self.work, self.port = work, free_port()
        disk = work / "run.qcow2"
        disk.unlink(missing_ok=True)
        quiet(["qemu-img", "create", "-q", "-f", "qcow2", "-b", work / f"{suite}-emulated.img", "-F", "raw", disk])
        command = f"qemu-system-x86_64 -name fresh -machine q35 -accel {accelerator()} -cpu {CPU} -smp 2"
        command += f" -m {memory} -nodefaults -display none -monitor none -device nvme,drive=d0,serial=fresh"
        command += " -device virtio-rng-pci -device virtio-net-pci,netdev=n0 -no-reboot"
        kernel = "root=/dev/nvme0n1 rw console=ttyS0 apparmor=0 mitigations=off tsc=reliable panic=-1"
        with (work / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *command.split(),
                    *("-kernel", str(work / f"vmlinuz-{suite}"), "-append", kernel),
                    *("-drive", f"if=none,id=d0,file={disk},format=qcow2,cache=unsafe"),
                    *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{self.port}-:22"),
                    *("-serial", f"file:{work / 'serial.log'}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def ssh(self, *command: str) -> list[str]:
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        options += ["ConnectTimeout=20", "ServerAliveInterval=30", f"ControlPath={self.work}/c", "ControlMaster=auto"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", *flags, "-i", str(self.work / "key"), "-p", str(self.port), "root@127.0.0.1", *command]

    def wait(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Trouble(f"qemu ended with {self.process.returncode}; see {self.work / 'serial.log'}")
            try:
                done = subprocess.run(self.ssh("true"), capture_output=True, check=False, timeout=60)
            except subprocess.TimeoutExpired:
                continue
            if done.returncode == 0:
                return
            time.sleep(1)  # sshd is not there yet: nothing to wait on but the port
        raise Trouble(f"no ssh within {BOOT_SECONDS} s; see {self.work / 'serial.log'}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)


class UserModeMachine(Machine):
    """The same with a kernel that is a process."""

    def __init__(self, work: Path, suite: str, memory: str) -> None:
        self.work = work
        image = work / f"{suite}-user-mode.img"
        self.process, self.network, self.port = fresh_uml.launch(work, image, memory, work / "serial.log")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the guest's processes are processes here
            self.process.wait(30)
        self.network.stop()


def boot(work: Path, suite: str, memory: str, kernel: str) -> Machine:
    for attempt in range(1, BOOTS + 1):
        say(f"booting (attempt {attempt} of {BOOTS})")
        machine = (UserModeMachine if kernel == "user-mode" else Machine)(work, suite, memory)
        try:
            machine.wait()
        except Trouble as error:
            machine.stop()
            if attempt == BOOTS:
                raise
            say(str(error))
        except BaseException:
            machine.stop()
            raise
        else:
            return machine
    raise Trouble("no boot was tried")


def send_clone(machine: Machine) -> None:
    """A clean clone: only what is committed."""
    archive = subprocess.run(["git", "-C", REPOSITORY, "archive", "HEAD"], capture_output=True, check=True).stdout
    subprocess.run(machine.ssh("mkdir -p /root/organism && tar -C /root/organism -xf -"), input=archive, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="trixie", help="Debian suite (default: %(default)s)")
    parser.add_argument("--kernel", choices=tuple(KERNELS), default="emulated", help="default: %(default)s")
    parser.add_argument("--memory", default="3500M", help="memory of the machine (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / ".cache/fresh-vm", help="folder (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the machine running and say how to enter it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- command, run in the clone")
    arguments = parser.parse_args()
    command = [word for word in arguments.command if word != "--"] or ["./run", "demo"]
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine = None
    try:
        build(arguments.work, arguments.suite, arguments.kernel)
        machine = boot(arguments.work, arguments.suite, arguments.memory, arguments.kernel)
        say(f"up; copying a clean clone, then: {' '.join(command)}")
        send_clone(machine)
        started = time.monotonic()
        environment = "".join(f"{name}={value} " for name, value in os.environ.items() if name.startswith("PIP_CERT"))
        code = subprocess.run(
            machine.ssh(f"cd /root/organism && {environment}{' '.join(command)}"), check=False
        ).returncode
        say(f"`{' '.join(command)}` ended with {code} after {time.monotonic() - started:.0f} s")
        if arguments.keep:
            say("kept: " + " ".join(machine.ssh()))
        return code
    except Trouble as error:
        say(str(error))
        return 3
    finally:
        if machine and not arguments.keep:
            machine.stop()


if __name__ == "__main__":
    sys.exit(main())
