# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that runs: a real process, either QEMU under TCG with a guest of one sector, or a cheap stand-in.

The guest of one sector enables the ACPI power button and switches itself off when it is pressed, so that shutdown is
the real thing. The stand-in is a sleeping process with PVE's name; what a press of its power button does is the
simulator's setting. Either has less memory than its configuration says.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import Died

QEMU = "qemu-system-x86_64"
GUEST_MIB = 32
MAX_THREADS = 4

# 16-bit code at 0x7c00; the PM registers lie at 0x600 after SeaBIOS has set up either chipset (PIIX4, ICH9).
GUEST = bytes.fromhex(
    "fa"  # cli
    "31c0 8ed8"  # xor ax,ax; mov ds,ax
    "ba0206 b80001 ef"  # mov dx,0x602 (PM1_EN); mov ax,0x0100 (PWRBTN_EN); out dx,ax
    "b052 e6e9"  # mov al,'R'; out 0xe9,al: says that it is ready
    # wait:
    "fb f4 fa"  # sti; hlt; cli: the BIOS timer wakes it 18 times a second
    "ba0006 ed"  # mov dx,0x600 (PM1_STS); in ax,dx
    "f6c401 74f4"  # test ah,1; jz wait
    "ba0406 b80020 ef"  # mov dx,0x604 (PM1_CNT); mov ax,0x2000 (SLP_EN, S5); out dx,ax
    "f4 ebfd".replace(" ", "")
)


@dataclass
class Behaviour:
    """What a stand-in's guest does when its power button is pressed. ``delay``: seconds."""

    ignores_power_button: bool = False
    delay: float = 0.05
    fails_to_start: bool = False


class Machine:
    """The process of one running VM."""

    def __init__(
        self,
        vmid: int,
        process: subprocess.Popen[bytes],
        qmp: Path | None,
        behaviour: Behaviour,
        devices: Sequence[str] = (),
    ) -> None:
        self.vmid = vmid
        self.devices = tuple(devices)
        self.process = process
        self.qmp = qmp
        self.behaviour = behaviour
        self.paused = False
        self.since = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def exists(self) -> bool:
        """Whether the kernel still has the process, and with it its devices; without waiting for who reaps it."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")

    def press_power_button(self) -> None:
        if self.qmp is not None:
            command(self.qmp, "system_powerdown")
        elif not self.behaviour.ignores_power_button:
            timer = threading.Timer(self.behaviour.delay, self.terminate)
            timer.daemon = True
            timer.start()

    def resume(self) -> None:
        if self.qmp is not None:
            command(self.qmp, "cont")
        self.paused = False

    def quit(self) -> None:
        if self.qmp is not None:
            command(self.qmp, "quit")
        else:
            self.terminate()

    def terminate(self) -> None:
        if self.running:
            self.process.terminate()

    def kill(self) -> None:
        if self.running:
            self.process.kill()

    def wait(self, timeout: float | None) -> bool:
        """Whether it ended in time."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def start(
    kind: str,
    vmid: int,
    config: Mapping[str, str],
    devices: Sequence[str],
    run: Path,
    log: Path,
    behaviour: Behaviour,
    *,
    paused: bool = False,
) -> Machine:
    """Start a VM's process. ``kind``: ``qemu`` or ``stand-in``. ``devices``: PCI addresses that it gets.

    Raises Died as Proxmox VE does when QEMU fails.
    """
    if behaviour.fails_to_start:
        raise Died("start failed: QEMU exited with code 1")
    name = config.get("name", f"vm{vmid}")
    qmp = None
    if kind == "qemu":
        qmp = run / f"{vmid}.qmp"
        qmp.unlink(missing_ok=True)
        words = _qemu(vmid, name, config, qmp, run, paused=paused)
        program = shutil.which(QEMU) or QEMU
    else:
        # only what is built in is imported: storms start this very often
        words = ["/usr/bin/kvm", "-IS", "-c", "import _signal; _signal.pause()", "-id", str(vmid), "-name", name]
        words += [word for each in devices for word in ("-device", f"vfio-pci,host={each}")]
        program = sys.executable
    if Path("/run/systemd/system").is_dir() and os.geteuid() == 0:
        words = [
            *("systemd-run", "--quiet", "--scope", "--collect", f"--unit={vmid}.scope", "--slice=qemu.slice"),
            *("--property=KillMode=process", "--property=SendSIGKILL=no", f"--description=Proxmox VE VM {vmid}", "--"),
            *(program, *words[1:]),
        ]
        program = "systemd-run"
    with log.open("ab") as out:
        try:
            process = subprocess.Popen(
                words, executable=program, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        except FileNotFoundError as error:
            raise Died(f"start failed: {error.filename}: No such file or directory") from None
    machine = Machine(vmid, process, qmp, behaviour, devices)
    machine.paused = paused
    if qmp is not None:
        _answers(machine, qmp)
    (run / f"{vmid}.pid").write_text(f"{process.pid}\n", encoding="ascii")
    return machine


def _qemu(vmid: int, name: str, config: Mapping[str, str], qmp: Path, run: Path, *, paused: bool) -> list[str]:
    boot = run / "guest.img"
    if not boot.exists():
        sector = GUEST.ljust(510, b"\0") + b"\x55\xaa"
        boot.write_bytes(sector.ljust(1024 * 1024, b"\0"))
    threads = min(int(config.get("cores", 1)) * int(config.get("sockets", 1)), MAX_THREADS)
    machine = "q35" if "q35" in config.get("machine", "") else "pc"
    return [
        QEMU,
        *("-name", f"{name},debug-threads=on", "-machine", f"{machine},accel=tcg", "-m", str(GUEST_MIB)),
        *("-smp", str(threads), "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-drive", f"file={boot},format=raw,if=ide,read-only=off,snapshot=on"),
        *(
            "-chardev",
            f"file,id=console,path={run}/{vmid}.console",
            "-device",
            "isa-debugcon,iobase=0xe9,chardev=console",
        ),
        *("-qmp", f"unix:{qmp},server=on,wait=off"),
        *(("-S",) if paused else ()),
    ]


def _answers(machine: Machine, qmp: Path) -> None:
    """Wait until the monitor answers or QEMU has ended."""
    while machine.process.poll() is None:
        try:
            command(qmp, "query-status")
        except (OSError, ValueError):
            if machine.wait(0.02):
                break
            continue
        return
    raise Died(f"start failed: QEMU exited with code {machine.process.returncode}")


def command(qmp: Path, name: str) -> object:
    """One QMP command on a connection of its own, as PVE does. Raises OSError, ValueError."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(10)
        monitor.connect(str(qmp))
        stream = monitor.makefile("rw", encoding="utf-8")
        stream.readline()
        answer: object = None
        for execute in ("qmp_capabilities", name):
            stream.write(json.dumps({"execute": execute}) + "\n")
            stream.flush()
            while True:
                line = stream.readline()
                if not line:
                    if execute == "quit":
                        return None
                    raise ConnectionResetError(f"the monitor went away during {execute}")
                told = json.loads(line)
                if "return" in told or "error" in told:
                    answer = told
                    break
        return answer
