# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real file system on a loop device whose power can be cut.

``EXT4_IOC_SHUTDOWN`` (XFS has the same number) makes a mounted file system forget what it has not written: with
``NOLOGFLUSH`` also what its journal has not; with ``LOGFLUSH`` the journal is written first, so that names are there
and contents are not. Writes that had reached the device stay in their order: a disk that reorders them is not modelled.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

_SHUTDOWN = 0x8004587D
CUTS = {"journal and data lost": 2, "journal kept, data lost": 1}
SIZE = {"ext4": 96, "xfs": 320}  # MiB; mkfs.xfs makes nothing smaller


class Unavailable(Exception):
    """This machine cannot have such a disk; the text says why."""


class Disk:
    """An image of its own, mounted at ``place``."""

    def __init__(self, folder: Path, kind: str = "ext4", *, size: int | None = None) -> None:
        """``size`` in MiB."""
        self.kind = kind
        # what reached the device is what the image holds: it need not outlive this machine
        self.device = folder / f"{kind}-device"
        self.device.mkdir()
        self._run(["mount", "-t", "tmpfs", "device", str(self.device)])
        self.image = self.device / "image"
        self.place = folder / f"{kind}-disk"
        self.place.mkdir()
        with self.image.open("wb") as stream:
            stream.truncate((size or SIZE[kind]) * 1024 * 1024)
        make = {"ext4": ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
                "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"]}[kind]  # fmt: skip
        self._run([*make, str(self.image)])
        self.mount()

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Unavailable(f"{command[0]} is not installed") from None
        if done.returncode != 0:
            raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")

    def mount(self) -> None:
        self._run(
            [
                "mount",
                "-o",
                "loop,nouuid" if self.kind == "xfs" else "loop",
                "-t",
                self.kind,
                str(self.image),
                str(self.place),
            ]
        )

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)

    def remove(self) -> None:
        self.unmount()
        subprocess.run(["umount", "-l", str(self.device)], check=True)

    def sync(self) -> None:
        """All that is written is on the device."""
        self._run(["sync", "--file-system", str(self.place)])

    def cut_power(self, how: int) -> None:
        """Lose what is not written, then come up again: the journal is replayed by the mount."""
        self.lose(how)
        self.come_back()

    def lose(self, how: int) -> None:
        """Forget what is not written. Whoever has files open gets errors from now on."""
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", how))
        finally:
            os.close(descriptor)

    def come_back(self) -> None:
        """After :meth:`lose`, when nobody has a file open any more."""
        self.unmount()
        self.mount()
        try:
            # a dead one still shows what was read of it before, and takes no change
            (self.place / "alive").touch()
            (self.place / "alive").unlink()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # a process that copied this mount namespace meanwhile keeps the dead file system: take another device
            self.unmount()
            other = self.image.with_name(f"{self.image.name}+")
            subprocess.run(["cp", "--sparse=always", str(self.image), str(other)], check=True)
            self.image.unlink()
            self.image = other
            self.mount()
