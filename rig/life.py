# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One life of the machine: from QEMU's start to its end, with the watchdog that decides whether it came up."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import launch, pci_proxy, tap
from .config import Settings
from .errors import RigError
from .hardware import PORT_QUEUES, Machine, disk_device, functions
from .qemu import Qemu
from .qmp import Qmp

BOOT_SECONDS = 600.0
RESTORE_SECONDS = 300.0
GREETING_SECONDS = 60.0
"""Patience: each new connection is new processes in there, so that the hasty would never be answered."""
SOCKET_SECONDS = 30.0


def ssh_answers(port: int) -> bool:
    """Does an SSH server greet on the forwarded port? QEMU accepts every connection, so that alone proves nothing."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=GREETING_SECONDS) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def make_disks(where: Settings, machine: Machine, *, fresh: bool) -> dict[str, Path]:
    """The data disks' files by name; ``fresh`` empties those that are not the caller's own."""
    found: dict[str, Path] = {}
    for disk in machine.disks:
        path = disk.path or where.run / f"{disk.name}.img"
        if not path.exists() or (fresh and disk.path is None):
            path.unlink(missing_ok=True)
            with path.open("wb") as stream:
                stream.truncate(disk.size)
        found[disk.name] = path
    return found


@dataclass
class Life:
    """``reason`` is why it ended, in QEMU's words (RunState, ShutdownCause) or ours."""

    where: Settings
    qemu: Qemu
    machine: Machine
    arguments: Sequence[str]
    port: int
    how: str
    """snapshot: loaded, then plugged; boot: everything is there at the start; bare: what the snapshot can hold."""
    disks: dict[str, Path] = field(default_factory=dict)
    reason: str = ""
    up: bool = False
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._keep: list[socket.socket | int] = []
        self._qmp: Qmp | None = None
        self._monitor_lock = threading.Lock()
        self._started = time.monotonic()
        self._serial_from = 0

    def begin(self) -> int:
        """Start QEMU and plug in what a snapshot cannot hold; gives its process id. Raises `RigError`."""
        run = self.where.run
        serial = run / "serial.log"
        self._serial_from = serial.stat().st_size if serial.exists() else 0
        for name in ("qmp.sock", "keeper.sock", "qemu.pid"):
            (run / name).unlink(missing_ok=True)
        arguments, descriptors = list(self.arguments), []
        if self.how == "snapshot":
            arguments += ["-loadvm", launch.SNAPSHOT]
        elif self.how == "boot":
            queues = tap.queues(PORT_QUEUES)
            sockets = {function.id: pci_proxy.start(function) for function in functions(self.machine)}
            descriptors = [*queues, *(each.fileno() for each in sockets.values())]
            numbers = {name: each.fileno() for name, each in sockets.items()}
            arguments += launch.cold(self.machine, self.disks, queues, numbers)
            self._keep = [*queues, *sockets.values()]
        # QEMU ends with its keeper, whatever becomes of that
        command = ["setpriv", "--pdeathsig", "KILL", *self.qemu.words, *arguments]
        with (run / "qemu.log").open("ab") as log:
            log.write(f"\n{time.strftime('%H:%M:%S')} {' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                cwd=run,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env={**os.environ, **self.qemu.environment},
            )
        self._release()
        try:
            self._qmp = self._monitor(run / "keeper.sock")
            if self.how == "snapshot":
                self._plug(self._qmp)
        except (RigError, OSError) as error:
            self.kill("a refused start")
            self.process.wait()
            raise RigError(f"QEMU did not start: {error}", f"see {run / 'qemu.log'}") from error
        return self.process.pid

    def _release(self) -> None:
        """QEMU has its own copies: ours would keep devices and connections alive after its end."""
        for each in self._keep:
            os.close(each) if isinstance(each, int) else each.close()
        self._keep = []

    def _monitor(self, path: Path) -> Qmp:
        deadline = time.monotonic() + SOCKET_SECONDS
        while True:
            if self.process.poll() is not None:
                raise RigError(f"it ended with {self.process.returncode}")
            try:
                return Qmp(path, self._event)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # QEMU makes the socket when it is ready to; nothing tells us but the file

    def _plug(self, qmp: Qmp) -> None:
        names = []
        for number, fd in enumerate(tap.queues(PORT_QUEUES)):
            names.append(f"queue{number}")
            qmp.command("getfd", {"fdname": names[-1]}, fd=fd)
            os.close(fd)
        qmp.command("netdev_add", {"type": "tap", "id": "port0", "fds": ":".join(names), "vhost": False})
        if self.machine.flavour == "amd64":
            qmp.command("netdev_add", {"type": "user", "id": "intel", "restrict": True})
        for device in launch.plugged(self.machine):
            qmp.command("device_add", dict(device))
        for function in functions(self.machine):
            connection = pci_proxy.start(function)
            qmp.command("getfd", {"fdname": function.id}, fd=connection.fileno())
            connection.close()
            qmp.command("device_add", dict(launch.proxy(function, function.id)))
        for disk in self.machine.disks:
            qmp.command("blockdev-add", launch.block_node(disk, self.disks[disk.name]))
            qmp.command("device_add", dict(disk_device(disk)))

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "SHUTDOWN" and not self.reason:
            self.reason = str(event.get("data", {}).get("reason", "shutdown"))

    def live(self, came_up: Callable[[], None]) -> str:
        """Wait for QEMU's end and give its reason; ``came_up`` is called when the machine's sshd answers."""
        assert self._qmp is not None
        listener = threading.Thread(target=self._qmp.listen, name="events", daemon=True)
        listener.start()
        watchdog = threading.Thread(target=self._watch, args=(came_up,), name="watchdog", daemon=True)
        watchdog.start()
        code = self.process.wait()
        listener.join(10)
        watchdog.join(30)
        self._qmp.close()
        if not self.reason:
            self.reason = f"QEMU ended with {code}"
        if self.reason == "guest-reset" and self.panicked():
            self.reason = "kernel panic"
        return self.reason

    def _watch(self, came_up: Callable[[], None]) -> None:
        try:
            self.await_ssh()
        except RigError as error:
            self.kill(str(error))
        else:
            came_up()

    def await_ssh(self) -> None:
        """Wait until the machine's sshd answers. Raises `RigError` when the machine ends or hangs."""
        limit = RESTORE_SECONDS if self.how == "snapshot" else BOOT_SECONDS
        while not ssh_answers(self.port):
            if self.process.poll() is not None:
                raise RigError(f"QEMU ended with {self.process.returncode} before sshd answered")
            if time.monotonic() > self._started + limit:
                raise RigError(f"no sshd within {limit:.0f} s")
            time.sleep(0.25)  # a port that does not answer has no event to wait for
        self.up, self.seconds = True, round(time.monotonic() - self._started, 1)

    def panicked(self) -> bool:
        serial = self.where.run / "serial.log"
        with serial.open("rb") as stream:
            stream.seek(self._serial_from)
            return b"Kernel panic" in stream.read()

    def kill(self, reason: str) -> None:
        """Cut the power: nothing is flushed but what the disks had confirmed."""
        if self.process.poll() is None:
            self.reason = reason
            self.process.kill()

    def reset(self) -> None:
        """Press the reset button: QEMU ends (-no-reboot), the keeper starts it again."""
        with Qmp(self.where.run / "qmp.sock") as qmp:
            qmp.command("system_reset")


def copy(source: Path, target: Path) -> None:
    """A copy that shares blocks where the file system can, and keeps holes."""
    done = subprocess.run(["cp", "--reflink=auto", "--sparse=always", source, target], capture_output=True, check=False)
    if done.returncode:
        raise RigError(f"cannot copy {source} to {target}: {done.stderr.decode().strip()}", "is the disk full?")
