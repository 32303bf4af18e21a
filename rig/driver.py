# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rig from the outside: start it, run commands in it, pull its plug, take it down. What tests and the command use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import control, remote, state
from .config import REPO, Settings, settings
from .errors import HangsError, RigError, UsageError
from .hardware import PORT_MAC, Machine, functions
from .qmp import Qmp
from .show import say

PREPARE_SECONDS = 3600.0
WAIT_SECONDS = 1300.0
SSH_SECONDS = 300.0
# Everything plugged in is there, and the clock is right (a snapshot's stands still). The shell alone looks, since
# each new process would cost the emulated processors more than a look. It counts its seconds by that very clock, so
# that setting it adds the snapshot's age to them.
SETTLE = """
date -s @{now} > /dev/null
SECONDS=0
present() {{
  count=0
  for file in /sys/bus/pci/devices/*/vendor; do
    read -r vendor < "$file" && [[ $vendor == 0x1002 ]] && ((count += 1))
  done
  ((count >= {functions})) || return 1
  for serial in {disks}; do
    compgen -G "/dev/disk/by-id/*_$serial" > /dev/null || return 1
  done
  for file in /sys/class/net/*/address; do
    read -r mac < "$file" && [[ $mac == {mac} ]] || continue
    port=${{file%/address}}
    [[ -e /sys/class/net/vmbr0/brif/${{port##*/}} ]] && return 0
    # a kernel that gets too little of the processor answers networkd too late, and that gives up for good
    ((SECONDS - asked < 30)) || {{ asked=$SECONDS; systemctl restart systemd-networkd; }}
  done
  return 1
}}
asked=-20
until present; do
  ((SECONDS < {seconds})) || {{ echo "not all devices came: $count functions, $(ls /dev/disk/by-id)" >&2; exit 1; }}
  sleep 0.5
done
exec udevadm settle --timeout={seconds}
"""
SETTLE_SECONDS = 240
NO_CONNECTION = 255
"""ssh(1): its own failure, here that of a machine too busy to shake hands."""


class Rig:
    """One rig. As a context it is started, and taken down at the end."""

    def __init__(self, name: str = "", machine: Machine | None = None) -> None:
        self.where: Settings = settings(name)
        self.machine = machine or Machine()
        self._keeper: subprocess.Popen[bytes] | None = None  # our child, when we started it

    def __enter__(self) -> Rig:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.down()

    # -- its life ------------------------------------------------------------------------------------------------

    def start(self) -> state.State:
        """Start it (a second or two from the snapshot, half a minute by a boot) and wait until it can be used.

        A rig that runs already stays as it is. Raises `RigError`; what there is of it stays for a look.
        """
        if control.alive(self.where):
            return self.wait()
        self._launch()
        try:
            return self.wait()
        except HangsError as error:  # an emulated machine does so once in a while, a snapshot's as a boot's
            print(f"{error}; starting it once more", file=sys.stderr, flush=True)
        self._launch()
        return self.wait()

    def _launch(self) -> None:
        self.down()
        self.where.run.mkdir(parents=True)
        state.save_machine(self.where, self.machine)
        with (self.where.run / "keeper.log").open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-B", "-m", "rig.keeper", self.where.name],
                cwd=REPO,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "ORGANISM_CACHE": str(self.where.cache), "PYTHONPATH": str(REPO)},
            )
        self._follow(self._keeper)

    def _follow(self, keeper: subprocess.Popen[bytes]) -> None:
        """Show the keeper's progress until it listens."""
        log = self.where.run / "keeper.log"
        shown = 0
        deadline = time.monotonic() + PREPARE_SECONDS
        while True:
            begun = control.alive(self.where) and control.ask(self.where, "status").life > 0
            text = log.read_bytes() if log.exists() else b""
            sys.stderr.write(text[shown:].decode(errors="replace"))
            sys.stderr.flush()
            shown = len(text)
            if begun:
                return
            if keeper.poll() is not None:
                self._failed(state.read(self.where))
            if time.monotonic() > deadline:
                raise RigError(f"rig {self.where.name} was not prepared within an hour", f"see {log}")
            time.sleep(0.2)  # its log is all there is to follow while it builds

    def _failed(self, known: state.State | None) -> None:
        error = known.error if known else ""
        tail = "\n".join((self.where.run / "keeper.log").read_text(errors="replace").splitlines()[-8:])
        raise RigError(
            f"rig {self.where.name} failed: {error or tail}",
            f"see keeper.log, qemu.log, serial.log in {self.where.run}",
        )

    def wait(self, life: int = 0) -> state.State:
        """Wait until it is up in its ``life`` or a later one, with everything plugged in."""
        known = self._ask("wait", timeout=WAIT_SECONDS + 30, life=life, seconds=WAIT_SECONDS)
        if known.phase != "up" or known.life < life:
            self._failed(known)
        self.close()  # a connection to the life before
        disks = " ".join(disk.name for disk in self.machine_now().disks)
        words = {
            "now": int(time.time()),
            "functions": len(functions(self.machine_now())),
            "disks": disks,
            "mac": PORT_MAC,
            "seconds": SETTLE_SECONDS,
        }
        for last in (False, False, True):
            done = self.ssh("bash -s", input=SETTLE.format(**words), timeout=2 * SETTLE_SECONDS)
            if done.returncode != NO_CONNECTION or last:
                break
        if done.returncode == NO_CONNECTION:
            raise HangsError(f"rig {self.where.name} no longer answers: {done.stderr.strip()}", "see ./run rig serial")
        if done.returncode:
            raise HangsError(f"rig {self.where.name} has not settled: {done.stderr.strip()}", "see ./run rig serial")
        return known

    def machine_now(self) -> Machine:
        """What this rig was started as."""
        return state.load_machine(self.where)

    def status(self) -> state.State | None:
        """What is known of it; None when there is no rig of this name."""
        if control.alive(self.where):
            return control.ask(self.where, "status")
        known = state.read(self.where)
        if known is not None and known.phase in ("starting", "up"):
            known.phase, known.error = "failed", "its keeper is gone"
        return known

    def _ask(self, verb: str, timeout: float = 60.0, **more: Any) -> state.State:
        try:
            return control.ask(self.where, verb, timeout, **more)
        except OSError as error:
            raise RigError(
                f"there is no rig {self.where.name!r} running ({error})", "start one with ./run rig"
            ) from error

    def _again(self, verb: str, **more: Any) -> state.State:
        before = self._ask("status").life
        self._ask(verb, **more)
        return self.wait(before + 1)

    def reboot(self) -> state.State:
        """systemctl reboot inside, and wait until it is back (through its boot loader, with its disks as they are)."""
        before = self._ask("status").life
        self.ssh("systemctl reboot")
        return self.wait(before + 1)

    def hard_reset(self, *, power: bool = False) -> state.State:
        """Press the reset button, or cut the ``power`` (kill -9 of QEMU): nothing is synced; the disks are kept.

        What the guest had flushed is on the disks, what it had only written to its memory is lost.
        """
        return self._again("power" if power else "reset")

    def restart(self, *, append: str | None = None, loader: str = "grub") -> state.State:
        """Boot it again with the kernel command line ``append`` (without root=) or another boot loader; syncs first."""
        self.must("sync")
        return self._again("power", append=append, loader=loader)

    def restore(self) -> state.State:
        """Back to what it was at its start: the snapshot, fresh disks (a cold rig boots from a fresh disk)."""
        return self._again("restore")

    def down(self) -> None:
        """End it and remove all of it; nothing is left but the cache. Does nothing when there is none."""
        self.close()
        known = state.read(self.where)
        try:
            control.ask(self.where, "stop")
        except (OSError, RigError):
            if known is not None and _is_keeper(known.keeper, self.where.name):
                os.kill(known.keeper, signal.SIGTERM)
        if known is not None and not _ended(known.keeper, self.where.name, 15):
            os.kill(known.keeper, signal.SIGKILL)  # its QEMU dies with it
            _ended(known.keeper, self.where.name, 15)
        if self._keeper is not None:
            self._keeper.wait(15)
            self._keeper = None
        if self.where.run.exists():
            shutil.rmtree(self.where.run)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        known = state.read(self.where)
        if known is None:
            raise RigError(f"there is no rig {self.where.name!r}", "start one with ./run rig")
        return known.port

    def ssh(
        self, words: Sequence[str] | str, *, input: str | None = None, timeout: float = SSH_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside (a text goes to root's shell as it is, a list is quoted), whatever its exit code."""
        command = remote.command(self.where, self.port, words)
        return subprocess.run(
            command,
            input=input if input is not None else "",
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def must(self, words: Sequence[str] | str, *, input: str | None = None, timeout: float = SSH_SECONDS) -> str:
        """Its output; `RigError` with its complaint when it fails."""
        done = self.ssh(words, input=input, timeout=timeout)
        if done.returncode:
            shown = words if isinstance(words, str) else " ".join(words)
            raise RigError(
                f"in the rig, `{shown[:300]}` ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
            )
        return done.stdout

    def put(self, local: Path | str, far: str) -> None:
        """Copy a file or a folder in, under the name ``far``."""
        self._copy([str(local), f"root@127.0.0.1:{far}"])

    def get(self, far: str, local: Path | str) -> None:
        """Copy a file or a folder out, under the name ``local``."""
        self._copy([f"root@127.0.0.1:{far}", str(local)])

    def _copy(self, words: list[str]) -> None:
        command = ["scp", "-q", "-r", *remote.options(self.where), "-P", str(self.port), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SSH_SECONDS)
        if done.returncode:
            raise RigError(f"copying {' to '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")

    def play(self, playbook: Path | str, *arguments: str, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
        """ansible-playbook on this rig (inventories/rig, group pve)."""
        command = ["ansible-playbook", "-i", str(REPO / "inventories/rig"), str(playbook), *arguments]
        environment = {**os.environ, "ORGANISM_CACHE": str(self.where.cache), "ORGANISM_RIG_NAME": self.where.name}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        environment |= {"PATH": path, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        environment.setdefault("ANSIBLE_COLLECTIONS_PATH", str(self.where.cache / "collections"))
        return subprocess.run(
            command,
            cwd=REPO,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """A command of QEMU's machine protocol, for example query-status."""
        with Qmp(self.where.run / "qmp.sock") as monitor:
            return monitor.command(command, arguments)

    def serial(self) -> str:
        """What the machine wrote to its serial console, of all its lives."""
        return (self.where.run / "serial.log").read_text(errors="replace")

    def close(self) -> None:
        """Close the shared SSH connection."""
        if self.where.control_path.exists():
            command = ["ssh", *remote.options(self.where), "-O", "exit", "127.0.0.1"]
            subprocess.run(command, capture_output=True, check=False)
            self.where.control_path.unlink(missing_ok=True)


def purge(where: Settings) -> None:
    """Remove the cache of all rigs. Raises `UsageError` while one runs."""
    for folder in where.runs.glob("*"):
        if control.alive(where.named(folder.name)):
            raise UsageError(
                f"rig {folder.name} is running", f"take it down first: ./run rig-down --name {folder.name}"
            )
    if where.shared.exists():
        shutil.rmtree(where.shared)
        say(f"removed {where.shared}")


def _is_keeper(process: int, name: str) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"rig.keeper" in words and name.encode() in words


def _ended(process: int, name: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _is_keeper(process, name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)  # not our child once the starter has left, so there is nothing to wait for but its absence
    return True
