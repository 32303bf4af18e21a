# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recordings of machines: complete enough to plan from, without secrets, and the shapes that lie beside the tests."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.core import _cpu_zones, _topology
from organism.core._root import Root
from organism.host import record

Machines = Callable[[str], Root]
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("fixtures_generate", FIXTURES / "generate.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


SHAPES = sorted(path.stem for path in FIXTURES.glob("*.json"))


def test_the_recordings_are_what_the_generator_writes() -> None:
    made = generator()
    assert set(made.SHAPES) <= set(SHAPES)
    for shape in made.SHAPES:
        assert (FIXTURES / f"{shape}.json").read_text() == made.text(shape), f"run generate.py: {shape}.json is stale"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recording_is_whole(machine: Machines, shape: str) -> None:
    """No link leads nowhere, and what the planner needs is there."""
    root = machine(shape)
    dangling = [str(path) for path in root.top.rglob("*") if path.is_symlink() and not path.exists()]
    assert not dangling
    assert _cpu_zones.plan(_topology.read(root)).host


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recording_of_a_recording_is_the_same_machine(machine: Machines, shape: str, tmp_path: Path) -> None:
    root = machine(shape)
    again = record.record(str(root.top))
    record.unpack(again, tmp_path / "again")
    assert _topology.read(Root(tmp_path / "again")) == _topology.read(root)
    written = record.load(FIXTURES / f"{shape}.json")
    lost = set(written["files"]) - set(again["files"])
    assert not lost, "the recorder leaves out what the tests use"
    assert {name: again["links"].get(name) for name in written["links"]} == written["links"]


@pytest.mark.skipif(sys.platform != "linux", reason="records the /sys of this machine")
def test_this_machine_recorded_gives_the_plan_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    # as it is run on a machine that has nothing but Python: one file, no packages, no environment
    done = subprocess.run(
        [sys.executable, "-I", record.__file__, "-o", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record.unpack(record.load(file), tmp_path / "tree")
    live, recorded = _topology.read(), _topology.read(Root(tmp_path / "tree"))
    assert recorded == live
    assert _cpu_zones.plan(recorded) == _cpu_zones.plan(live)


def secret_machine(top: Path) -> None:
    for name, text in {
        "proc/sys/kernel/hostname": "mina-rig7.example.org",
        "proc/version": "Linux version 6.17 (build@proxmox) on mina-rig7",
        "proc/cmdline": "root=UUID=8f3c9b1e-7c54-4a51-9f0e-1b2c3d4e5f60 ip=10.1.2.3::10.1.2.1 luks.key=/x quiet",
        "proc/cpuinfo": "processor\t: 0\nSerial\t\t: 00000000deadbeef",
        "sys/devices/system/cpu/online": "0",
        "sys/devices/pci0000:00/0000:01:00.0/class": "0x020000",
        "sys/devices/pci0000:00/0000:01:00.0/net/enxa0369fb1c2d3/address": "a0:36:9f:b1:c2:d3",
        "sys/devices/pci0000:00/0000:01:00.0/net/enxa0369fb1c2d3/operstate": "up",
        "sys/devices/virtual/net/lo/address": "00:00:00:00:00:00",
        "sys/devices/virtual/net/vmbr0/address": "a0:36:9f:b1:c2:d3",
        "sys/devices/virtual/net/ib0/address": "80:00:02:08:fe:80:00:00:00:00:00:00:f4:52:14:03:00:7b:cb:a1",
        "etc/os-release": 'NAME="Debian"',
    }.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    for name, target in {
        "sys/class/net/enxa0369fb1c2d3": "../../devices/pci0000:00/0000:01:00.0/net/enxa0369fb1c2d3",
        "sys/class/net/lo": "../../devices/virtual/net/lo",
        "sys/class/net/vmbr0": "../../devices/virtual/net/vmbr0",
        "sys/class/net/ib0": "../../devices/virtual/net/ib0",
        "sys/bus/pci/devices/0000:01:00.0": "../../../devices/pci0000:00/0000:01:00.0",
    }.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def test_nothing_that_names_a_machine_or_a_person_is_recorded(tmp_path: Path) -> None:
    secret_machine(tmp_path)
    tape = record.record(str(tmp_path))
    text = record.render(tape).lower()
    for secret in (
        "mina",
        "rig7",
        "8f3c9b1e",
        "10.1.2",
        "deadbeef",
        "a0:36",
        "a0369f",
        "f4:52:14",
        "/x",
        str(tmp_path),
    ):
        assert secret not in text, secret
    assert tape["files"]["/proc/cmdline"].endswith("ip=redacted luks.key=redacted quiet")
    assert tape["redacted"] == 3  # two hardware addresses and a UUID


def test_relations_survive(tmp_path: Path) -> None:
    """The bridge has its port's address; the address that means nobody stays; PCI addresses are no secrets."""
    secret_machine(tmp_path)
    files = record.record(str(tmp_path))["files"]
    port = files["/sys/devices/pci0000:00/0000:01:00.0/net/enx020000000001/address"]
    assert files["/sys/devices/virtual/net/vmbr0/address"] == port == "02:00:00:00:00:01"
    assert files["/sys/devices/virtual/net/lo/address"] == "00:00:00:00:00:00"
    assert len(files["/sys/devices/virtual/net/ib0/address"]) == 59
    assert files["/sys/devices/pci0000:00/0000:01:00.0/class"] == "0x020000"


def test_a_recording_never_writes_outside_of_its_folder(tmp_path: Path) -> None:
    for evil in ("/../outside", "outside", "/a/../../outside"):
        tape = {"format": 1, "files": {evil: "x"}, "links": {}, "folders": []}
        with pytest.raises(record.RecordError, match="no plain absolute path"):
            record.unpack(tape, tmp_path / "in")
    absolute = {"format": 1, "files": {"/sys/a": "1"}, "links": {"/sys/b": "/sys/a"}, "folders": []}
    record.unpack(absolute, tmp_path / "in")
    assert (tmp_path / "in/sys/b").resolve() == tmp_path / "in/sys/a"


def test_the_command(machine: Machines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = machine("single_core_vm").top
    assert record.main(["--root", str(top), "--about", "a test"]) == 0
    tape = json.loads(capsys.readouterr().out)
    assert (tape["format"], tape["about"]) == (1, "a test")
    assert record.main(["--root", str(top), "-o", str(tmp_path / "x.json")]) == 0
    assert "read it before you send it" in capsys.readouterr().err
    assert record.main(["--unpack", str(tmp_path / "x.json"), "--into", str(tmp_path / "tree")]) == 0
    assert (tmp_path / "tree/sys/devices/system/cpu/online").read_text() == "0\n"
    (tmp_path / "empty").mkdir()
    assert record.main(["--root", str(tmp_path / "empty")]) == 1
    assert record.main(["--unpack", str(top), "--into", str(tmp_path / "y")]) == 1
    (tmp_path / "z.json").write_text('{"format": 9}')
    assert record.main(["--unpack", str(tmp_path / "z.json"), "--into", str(tmp_path / "y")]) == 1
    assert "no recording of format 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        record.main(["--unpack", "x"])
    assert usage.value.code == 2
