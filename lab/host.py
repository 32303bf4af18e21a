# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes, mounts and privileges of the host: the few system facts the lab needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll

from .errors import LabError
from .show import say

_DEBIAN_PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "mount": "mount",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def run(*argv: str | Path, timeout: float = 60, stdin: str = "") -> str:
    """Run a program to its end and give its output. Raises `LabError` with what it wrote to standard error."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed", install_hint(words[0])) from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(words)}` did not end within {timeout:g} s") from error
    if done.returncode:
        raise LabError(f"`{' '.join(words)}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def install_hint(program: str) -> str:
    package = _DEBIAN_PACKAGES.get(program, program)
    return f"install it: apt-get install {package} (`./run setup` installs everything the lab needs)"


def missing_tools() -> dict[str, str]:
    """Programs the lab needs and this machine lacks, each with its Debian package."""
    missing = {program: package for program, package in _DEBIAN_PACKAGES.items() if shutil.which(program) is None}
    if not KEYRING.exists():
        missing[str(KEYRING)] = "debian-archive-keyring"
    return missing


def require_tools() -> None:
    missing = missing_tools()
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise LabError(f"the lab needs {', '.join(missing)}", f"apt-get install {packages}, or `./run setup`")


def become_root(why: str) -> None:
    """Start this very command again with sudo when not root (does not return then)."""
    if os.geteuid() == 0:
        return
    if shutil.which("sudo") is None:
        raise LabError(f"root is needed {why}, and sudo is not installed", "run the command as root")
    say(f"root is needed {why}: asking sudo")
    keep = [f"{key}={value}" for key, value in os.environ.items() if key.startswith("ORGANISM_") or key == "NO_COLOR"]
    os.execvp("sudo", ["sudo", "env", *keep, sys.executable, "-m", "lab", *sys.argv[1:]])  # noqa: S606 - a list, no shell


def give_to_user(*paths: Path) -> None:
    """Hand files to the user who called sudo, so that ssh and Ansible work without root."""
    uid, gid = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if os.geteuid() == 0 and uid and gid:
        for path in paths:
            os.chown(path, int(uid), int(gid))


def mounts_below(folder: Path) -> list[Path]:
    """Mount points at or below ``folder`` in this mount namespace, deepest first (proc(5), mountinfo)."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        point = Path(line.split()[4].encode().decode("unicode_escape"))
        if point == folder or folder in point.parents:
            points.append(point)
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


@dataclass(frozen=True)
class Process:
    pid: int
    argv: tuple[str, ...]


def processes() -> list[Process]:
    """Every process with a command line that this user may see."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                raw = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended, or is hidden from this user
            if raw:
                found.append(Process(int(entry.name), tuple(raw.decode(errors="replace").rstrip("\0").split("\0"))))
    return found


def children(pid: int) -> list[int]:
    """Direct children of a process, from all of its threads."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


class Watch:
    """Waits for the end of a process by its pidfd (pidfd_open(2)), so that a reused pid is never mistaken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1

    def ended(self, timeout: float = 0) -> bool:
        """True when the process has ended, or ends within ``timeout`` seconds."""
        if self._fd < 0:
            return True
        waiter = poll()
        waiter.register(self._fd, POLLIN)
        return bool(waiter.poll(timeout * 1000))

    def signal(self, number: signal.Signals) -> None:
        if self._fd >= 0 and not self.ended():
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def end_all(watches: Sequence[Watch], number: signal.Signals, timeout: float) -> list[Watch]:
    """Signal all, wait together; gives those still alive after ``timeout`` seconds."""
    for watch in watches:
        watch.signal(number)
    deadline = time.monotonic() + timeout
    return [watch for watch in watches if not watch.ended(max(0.0, deadline - time.monotonic()))]


def systemd_is_pid_1() -> bool:
    """sd_booted(3): the directory exists exactly when the host was booted with systemd."""
    return Path("/run/systemd/system").is_dir()
