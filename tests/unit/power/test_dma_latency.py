# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper of the wake-up latency: the request itself, the temperature limit, and the process as systemd runs it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from organism.core._root import Root
from organism.host import dma_latency
from organism.host.dma_latency import Keeper, NotHeld, Request

Machines = Callable[[str], Root]
NO_TURBO = "/sys/devices/system/cpu/intel_pstate/no_turbo"


def device(tmp_path: Path) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.write_bytes(b"")
    return path


def warm(root: Root, celsius: int) -> None:
    for path in root.glob("/sys/class/hwmon/hwmon1/temp*_input"):
        root.path(path).write_text(f"{celsius * 1000}\n")


def test_a_request_is_a_signed_number_of_32_bits_for_as_long_as_the_file_is_open(tmp_path: Path) -> None:
    path = device(tmp_path)
    request = Request(str(path), 7)
    assert request.hold() == 7
    assert path.read_bytes() == struct.pack("=i", 7)
    assert str(path) in open_files()
    request.release()
    assert str(path) not in open_files()
    assert not request.held


def open_files(pid: int | None = None) -> set[str]:
    """What a process (this one by default) has open; it may close something while it is looked at."""
    found = set()
    for entry in Path(f"/proc/{pid or 'self'}/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_a_request_that_does_not_count_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: struct.pack("=i", 2000))
    request = Request(str(device(tmp_path)), 0)
    with pytest.raises(NotHeld, match="wrote 0, and the limit that counts is 2000"):
        request.hold()
    assert not request.held


def test_it_lets_go_when_hot_and_holds_again_when_cool(machine: Machines, tmp_path: Path) -> None:
    root = machine("coffee_lake_12_gpus")
    keeper = Keeper(Request(str(device(tmp_path)), 0), root, limit=85)
    assert keeper.start() == "holding 0 us"
    warm(root, 84)
    assert keeper.look() is None and keeper.request.held
    warm(root, 86)
    assert "released: coretemp" in (keeper.look() or "")
    assert not keeper.request.held
    assert root.read(NO_TURBO) == "0"  # turbo is none of its business unless told
    warm(root, 80)
    assert keeper.look() is None and not keeper.request.held
    warm(root, 75)
    assert "holding 0 us again" in (keeper.look() or "")
    assert keeper.request.held


def test_it_starts_released_on_a_hot_machine_and_stays_so_without_sensors(machine: Machines, tmp_path: Path) -> None:
    root = machine("coffee_lake_12_gpus")
    warm(root, 99)
    keeper = Keeper(Request(str(device(tmp_path)), 0), root, limit=85)
    assert "released" in keeper.start()
    root.path("/sys/class/hwmon/hwmon1").unlink()
    assert keeper.look() is None
    assert not keeper.request.held


def test_it_forbids_turbo_while_hot_and_gives_back_what_was(machine: Machines, tmp_path: Path) -> None:
    root = machine("coffee_lake_12_gpus")
    keeper = Keeper(Request(str(device(tmp_path)), 0), root, limit=85, slow_down=True)
    keeper.start()
    warm(root, 90)
    keeper.look()
    assert root.read(NO_TURBO) == "1"
    warm(root, 60)
    keeper.look()
    assert root.read(NO_TURBO) == "0"
    warm(root, 90)
    keeper.look()
    keeper.stop()
    assert root.read(NO_TURBO) == "0" and not keeper.request.held


def test_without_a_limit_sensors_are_never_read(machine: Machines, tmp_path: Path) -> None:
    root = machine("coffee_lake_12_gpus")
    warm(root, 120)
    keeper = Keeper(Request(str(device(tmp_path)), 0), root)
    assert keeper.start() == "holding 0 us"
    assert keeper.look() is None


@pytest.mark.parametrize("limit", [[], ["--release-above", "85", "--every", "0.05"]])
def test_the_process_says_ready_when_it_holds_and_ends_on_sigterm(
    machine: Machines, tmp_path: Path, limit: list[str]
) -> None:
    path = device(tmp_path)
    root = machine("coffee_lake_12_gpus")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        words = ["--device", str(path), "--latency-us", "3", "--root", str(root.top), *limit]
        keeper = subprocess.Popen(
            [sys.executable, "-m", "organism.host.dma_latency", *words],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": ":".join(sys.path)},
            stderr=subprocess.PIPE,
        )
        try:
            assert manager.recv(4096) == b"READY=1\nSTATUS=holding 3 us"
            assert path.read_bytes() == struct.pack("=i", 3)
            assert str(path) in open_files(keeper.pid)
            if limit:
                warm(root, 95)
                assert b"STATUS=released: coretemp" in manager.recv(4096)
            keeper.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            assert keeper.wait(60) == 0
        finally:
            keeper.kill()
            keeper.communicate()


def test_what_cannot_be_held_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    try:
        assert dma_latency.main(["--device", str(tmp_path / "missing"), "--root", str(tmp_path)]) == 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert "No such file or directory" in capsys.readouterr().err
    for wrong in (["--latency-us", "-1"], ["--every", "0"], ["--release-above", "-5"]):
        with pytest.raises(SystemExit) as usage:
            dma_latency.main(wrong)
        assert usage.value.code == 2
