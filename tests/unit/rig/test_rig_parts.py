# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig's pure parts: its machine, QEMU's words, the functions' configuration space, the boot sector."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rig import acpi, assemble, hardware, launch, state
from rig.config import Settings, settings
from rig.errors import UsageError
from rig.hardware import DISKS, Disk, Machine
from rig.pci_proxy import EXPRESS, MSI, POWER, Space


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 13}, "12 slots"),
        ({"memory": 128}, "128 MiB"),
        ({"shared_group": True}, "need a boot"),
        ({"append": "quiet"}, "need a boot"),
        ({"loader": "lilo", "cold": True}, "no loader 'lilo'"),
        ({"disks": (Disk("a", kind="nvme"), Disk("b", kind="nvme"))}, "one slot"),
        ({"disks": (Disk("a", kind="floppy"),)}, "kind 'floppy'"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Machine(**wrong)  # type: ignore[arg-type]  # that is the point


def test_audio_comes_before_video_in_each_slot() -> None:
    found = hardware.functions(Machine())
    assert [function.id for function in found[:4]] == ["audio0", "gpu0", "audio1", "gpu1"]
    assert len(found) == 24
    assert len(hardware.functions(Machine(cold=True, shared_group=True))) == 26
    assert {function.bus for function in found} == {f"rp{number}" for number in range(12)}


def test_root_ports_leave_room_for_their_windows() -> None:
    ports = hardware.root_ports()
    assert len({(port["chassis"], port["addr"]) for port in ports}) == len(ports) == 16
    reserved = sum(int(port.get("io-reserve", 0)) for port in ports)
    assert reserved <= 48 << 10  # more, and the firmware halts for want of I/O addresses
    largest = max(sum(size for _, size in function.bars) for function in hardware.functions(Machine()))
    assert largest <= 32 << 20


def test_space_says_who_it_is_and_how_large_its_windows_are() -> None:
    video = hardware.gpu(0, "rp0")[0]
    space = Space(video)
    assert space.read(0, 4) == 0x67DF1002
    assert space.read(0x08, 4) == 0x030000E7
    assert space.read(0x0E, 1) == 0x80
    for number, size in video.bars:
        space.write(0x10 + 4 * number, 0xFFFFFFFF, 4)
        assert space.read(0x10 + 4 * number, 4) == -size & 0xFFFFFFFF
    space.write(0x20, 0xFFFFFFFF, 4)
    assert space.read(0x20, 4) == 0xFFFFFF01  # 256 I/O ports
    space.write(0x10, 0xE0000000, 4)
    space.reset()
    assert space.read(0x10, 4) == 0


def test_what_is_read_only_stays() -> None:
    space = Space(hardware.gpu(3, "rp3")[1])
    space.write(0x00, 0, 4)
    space.write(0x08, 0, 4)
    assert (space.read(0, 4), space.read(0x0A, 2)) == (0xAAF01002, 0x0403)
    assert space.read(0xFE, 4) == 0xFFFF0000  # beyond the space there are ones


def test_the_chain_of_capabilities_ends() -> None:
    space = Space(hardware.gpu(0, "rp0")[0])
    seen, at = [], space.read(0x34, 1)
    while at:
        seen.append((at, space.read(at, 1)))
        at = space.read(at + 1, 1)
    assert seen == [(POWER, 0x01), (EXPRESS, 0x10), (MSI, 0x05)]


def test_words_for_qemu_name_each_device_once() -> None:
    machine = Machine(cold=True, shared_group=True)
    functions = hardware.functions(machine)
    sockets = {function.id: 100 + number for number, function in enumerate(functions)}
    words = launch.base(machine, Path("/r/system.qcow2"), Path("/r/rig.aml"), 2222, "tcg,thread=single")
    words += launch.cold(machine, {disk.name: Path(f"/r/{disk.name}.img") for disk in DISKS}, [7, 8, 9, 10], sockets)
    text = " ".join(words)
    ids = [
        word.split("id=")[1].split(",")[0] for word in words if "id=" in word and not word.startswith(("q35", "if="))
    ]
    named = [name for name in ids if name not in ("management", "port0", "shared")]  # back end and card share a name
    assert len(named) == len(set(named))
    assert "fds=7:8:9:10" in text
    assert "hostfwd=tcp:127.0.0.1:2222-:22" in text
    assert text.count("x-pci-proxy-dev") == 26
    assert "cmpxchg16b" not in text and "-cx16" in text
    assert "kernel-irqchip=split" in " ".join(launch.base(machine, Path("s"), Path("t"), 1, "kvm"))


def test_the_thirteenth_gpu_and_its_card_are_behind_one_switch() -> None:
    switch = {str(device["id"]): device for device in hardware.shared_devices()}
    assert {switch["switch0"]["bus"], switch["switch1"]["bus"]} == {"switch"}
    assert switch["shared"]["bus"] == "switch1"
    assert hardware.functions(Machine(cold=True, shared_group=True))[-1].bus == "switch0"


def test_a_processor_for_each_scope_of_the_table() -> None:
    text = acpi.source(12)
    assert text.count("Name (_PSS") == text.count("Name (_CST") == 12
    assert "_SB.CPUS.C00B" in text and "_SB.CPUS.C00C" not in text


def test_grubs_boot_sector_keeps_the_partition_table() -> None:
    boot, mbr = bytes(range(256)) * 2, b"\xee" * 512
    patched = assemble.patch_boot(boot, mbr, 34)
    assert struct.unpack_from("<Q", patched, 0x5C) == (34,)
    assert patched[440:] == b"\xee" * 72
    assert len(patched) == 512


def test_grubs_core_knows_where_its_rest_lies() -> None:
    patched = assemble.patch_core(b"\0" * 1500, 34)
    assert struct.unpack_from("<QHH", patched, 500) == (35, 2, 0x820)
    with pytest.raises(ValueError, match="sectors"):
        assemble.patch_core(b"\0" * (2015 * 512), 34)


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"\0" * (3 << 20) + b"end")
    target.write_bytes(b"\0" * (8 << 20))
    assemble.write_sparse(source, target, 1 << 20)
    assert target.read_bytes()[4 << 20 :][:3] == b"end"


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    where = Settings("here", tmp_path)
    where.run.mkdir(parents=True)
    machine = Machine(
        cold=True, append="quiet", disks=(*DISKS, Disk("mine", path=tmp_path / "mine.img", rotational=True))
    )
    state.save_machine(where, machine)
    assert state.load_machine(where) == machine
    assert state.read(where) is None
    state.write(where.state_file, state.State(phase="up", life=2))
    known = state.read(where)
    assert known is not None and (known.phase, known.life) == ("up", 2)


def test_names_and_folders_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot name a rig"):
        settings("Not A Name")
    monkeypatch.setenv("ORGANISM_CACHE", str(tmp_path / "a b"))
    with pytest.raises(UsageError, match="has a blank"):
        settings()


def test_a_long_folder_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    assert Settings("rig", tmp_path / ("x" * 90)).control_path.parent == Path("/tmp")
    assert Settings("rig", Path("/c")).control_path == Path("/c/rig/run/rig/ssh")
