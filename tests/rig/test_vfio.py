# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cards on a real kernel and udev: refused in a shared group, bound after a boot, each in its group, and given back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from rig.hardware import Machine
from tests.rig.playing import module, play, role

pytestmark = pytest.mark.whole

PCI = "/sys/bus/pci/devices"
RULES = "/etc/udev/rules.d/10-organism-vfio.rules"


def etc(rig: Rig) -> str:
    """Names, modes and digests below /etc, in three processes: an emulated machine takes its time for hundreds."""
    return rig.must(
        "find /etc -printf '%p %y %m %u %g %l\\n' | sort; find /etc -type f -print0 | sort -z | xargs -0 sha256sum"
    )


def _functions(rig: Rig) -> dict[str, dict[str, str]]:
    """Of each of AMD's functions, by tools other than ours: class, group, driver, driver_override."""
    script = f"""cd {PCI}; python3 - <<'END'
import pathlib
for d in sorted(pathlib.Path().iterdir()):
    if (d / "vendor").read_text().strip() == "0x1002":
        driver = (d / "driver").readlink().name if (d / "driver").exists() else "none"
        print(d.name, (d / "class").read_text().strip(), (d / "iommu_group").readlink().name, driver,
              (d / "driver_override").read_text().strip())
END"""
    rows = [line.split() for line in rig.must(script).splitlines()]
    return {row[0]: dict(zip(("class", "group", "driver", "override"), row[1:], strict=True)) for row in rows}


def _shared(rig: Rig) -> tuple[str, str, str]:
    """(slot of the thirteenth card, address of the network card beside it, that card's interface)."""
    groups = rig.must("cd /sys/kernel/iommu_groups; for g in *; do echo $(ls $g/devices); done").splitlines()
    kinds = dict(line.split()[:2] for line in rig.must("lspci -nD").splitlines())
    for members in map(str.split, groups):
        cards = [member for member in members if kinds[member] == "0300:"]
        ports = [member for member in members if kinds[member] == "0200:"]
        if cards and ports:
            interface = rig.must(f"basename {PCI}/{ports[0]}/virtio*/net/*").strip()
            return cards[0].rsplit(".", 1)[0], ports[0], interface
    raise AssertionError("no card shares its group with a network card")


def _cards(**more: Any) -> dict[str, Any]:
    return role("gpu_passthrough", gpu_passthrough_devices=[{"id": "1002:67df"}], gpu_passthrough_cards=12, **more)


def test_a_card_without_a_driver_is_bound_at_once(rig: Rig, tmp_path: Path) -> None:
    before = _functions(rig)
    card = next(iter(sorted(before)))
    done = play(rig, tmp_path, module("pve_vfio", devices=[{"address": card[:-2]}]), result="said")
    assert done.changed == 1 and not done.result["reboot_required"]
    now = _functions(rig)
    assert [now[card]["driver"], now[card[:-1] + "1"]["driver"]] == ["vfio-pci"] * 2
    assert sum(row["driver"] == "vfio-pci" for row in now.values()) == 2
    rig.must(["udevadm", "verify", "--no-style", RULES])
    # while something holds its group, it is not given back
    group = now[card]["group"]
    rig.must(f"systemd-run --unit=holder --quiet sh -c 'exec 9<>/dev/vfio/{group}; exec sleep infinity'")
    opened = f"ls -l /proc/$(systemctl show -P MainPID holder)/fd | grep -q /dev/vfio/{group}"
    rig.must(f"timeout 60 sh -c 'until {opened}; do sleep 0.2; done'")
    try:
        refused = play(rig, tmp_path, module("pve_vfio", state="absent"), fails=True).said
        assert "in use by sleep" in refused and _functions(rig) == now
    finally:
        rig.must("systemctl stop holder")
    play(rig, tmp_path, module("pve_vfio", state="absent"))
    assert _functions(rig) == before


def test_twelve_cards_are_bound_after_a_boot_each_in_its_group_and_given_back(rig: Rig, tmp_path: Path) -> None:
    files, before = etc(rig), _functions(rig)
    wanted = sorted(before)
    assert len(before) == 24 and {row["driver"] for row in before.values()} == {"none"}
    # only at the boot, so that it is udev's rule alone that binds
    boot = _cards(gpu_passthrough_bind="boot")
    foretold = play(rig, tmp_path, boot, check=True)
    assert etc(rig) == files and _functions(rig) == before
    done = play(rig, tmp_path, boot, result="gpu_passthrough_result")
    assert done.changed == foretold.changed > 0
    assert len(done.result["gpus"]) == 12 and done.result["refreshed"] == ["update-initramfs -u -k all"]
    assert _functions(rig) == before
    assert rig.must("cat /run/organism/reboot-required.d/vfio").count("from the next boot on") == 24
    inside = rig.must("lsinitramfs /boot/initrd.img-$(uname -r)")
    assert RULES.lstrip("/") in inside and "vfio-pci.ko" in inside

    rig.reboot()
    now = _functions(rig)
    assert {address: row["driver"] for address, row in now.items()} == dict.fromkeys(wanted, "vfio-pci")
    assert {row["override"] for row in now.values()} == {"vfio-pci"}
    cards = [address for address in wanted if now[address]["class"] == "0x030000"]
    assert len({now[card]["group"] for card in cards}) == 12
    folders = [f"/sys/kernel/iommu_groups/{now[card]['group']}/devices/*" for card in cards]
    names = [line.rsplit("/", 1)[1] for line in rig.must(f"ls -d {' '.join(folders)}").split()]
    assert sorted(names) == wanted  # card and sound, and nothing else
    # vfio agrees that each group can be had: VFIO_GROUP_GET_STATUS says viable
    viable = (
        "import fcntl,os,struct,sys\n"
        "for g in sys.argv[1:]:\n"
        " f=os.open('/dev/vfio/'+g,os.O_RDWR); b=bytearray(struct.pack('II',8,0)); fcntl.ioctl(f,0x3b67,b)\n"
        " assert struct.unpack('II',b)[1]&1, g\n"
    )
    rig.must(["python3", "-c", viable, *(now[card]["group"] for card in cards)])
    again = play(rig, tmp_path, _cards(), result="gpu_passthrough_result")
    assert again.changed == 0 and not again.result["reboot_required"]
    report = json.loads(rig.must("organism-iommu --json"))
    assert report["ready"] and report["active"]
    verdicts = {card["address"]: card["verdict"] for card in report["cards"]}
    assert [verdicts[card] for card in cards] == ["own group"] * 12

    absent = role("gpu_passthrough", gpu_passthrough_state="absent")
    foretold = play(rig, tmp_path, absent, check=True)
    assert _functions(rig) == now
    back = play(rig, tmp_path, absent)
    assert back.changed == foretold.changed > 0
    after = _functions(rig)
    assert {row["driver"] for row in after.values()} == {"none"}  # as it was
    assert {row["override"] for row in after.values()} == {"(null)"}
    assert etc(rig) == files
    rig.restore()


def test_the_thirteenth_card_is_refused_with_its_group(cold_rig: Rig, tmp_path: Path) -> None:
    rig = cold_rig
    thirteenth, neighbour, interface = _shared(rig)
    rig.must(f"ip link add vmbr9 type bridge && ip link set {interface} master vmbr9")
    files, before = etc(rig), _functions(rig)
    try:
        everything = module("pve_vfio", devices=[{"id": "1002:67df"}])
        refused = play(rig, tmp_path, everything, fails=True).said
        assert f"{neighbour} is network port {interface} (port of vmbr9" in refused
        assert f"{thirteenth}.0 VGA [1002:67df]" in refused and f"{thirteenth}.1 audio [1002:aaf0]" in refused
        assert "ACS override" in refused
        assert etc(rig) == files and _functions(rig) == before
        assert rig.must("ls /var/lib/organism/earlier 2>/dev/null; true").strip() == ""
        # without it, the same list is foretold
        twelve = module("pve_vfio", devices=[{"id": "1002:67df"}], exclude=[thirteenth], cards=12)
        foretold = play(rig, tmp_path, twelve, check=True, result="said")
        assert len(foretold.result["gpus"]) == 12 and all(row["own_group"] for row in foretold.result["functions"])
        assert _functions(rig) == before
    finally:
        rig.must("ip link del vmbr9")


@pytest.fixture(scope="module")
def generic_rig(able: None) -> Iterator[Rig]:
    """Two cards and the kernel that has drivers for them; amdgpu tries each for a quarter of a minute."""
    with Rig("generic", Machine(gpus=2, cold=True, flavour="amd64")) as started:
        yield started


def test_cards_leave_their_drivers_at_a_boot_and_get_them_back(generic_rig: Rig, tmp_path: Path) -> None:
    rig = generic_rig
    files, before = etc(rig), _functions(rig)
    cards = [address for address, row in before.items() if row["class"] == "0x030000"]
    sounds = [address for address, row in before.items() if row["class"] == "0x040300"]
    assert len(cards) == len(sounds) == 2
    assert {before[sound]["driver"] for sound in sounds} == {"snd_hda_intel"}
    assert "amdgpu" in rig.must("cut -d' ' -f1 /proc/modules").split()
    assert rig.must("dmesg | grep -c 'amdgpu 0000:'").strip() != "0"  # it had them in its hands
    wanted = module("pve_vfio", devices=[{"id": "1002:67df"}])
    done = play(rig, tmp_path, wanted, result="said")
    # drivers that run are not torn away, and a group goes as a whole
    assert done.result["reboot_required"] and _functions(rig) == before
    rig.reboot()
    now = _functions(rig)
    assert {row["driver"] for row in now.values()} == {"vfio-pci"}
    assert "amdgpu" in rig.must("cut -d' ' -f1 /proc/modules").split()  # it was loaded, and found nothing
    assert rig.ssh("dmesg | grep 'amdgpu 0000:'").stdout == ""
    assert play(rig, tmp_path, wanted).changed == 0
    play(rig, tmp_path, module("pve_vfio", state="absent"))
    assert _functions(rig) == before
    assert etc(rig) == files
