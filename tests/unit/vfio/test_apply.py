# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions change hands, on a kernel of the test's own: now, at a boot, and back."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args

from ansible_collections.organism.proxmox.plugins.module_utils._root import Root as ModuleRoot
from ansible_collections.organism.proxmox.plugins.modules import pve_vfio
from organism.core import _vfio_apply, _vfio_files
from organism.core._systemd import CommandError
from organism.core._vfio_plan import VfioRefused

from .host import Host, write

Hosts = Callable[[str], Host]
AMD = {"id": "1002"}
SHARED = ("0000:10:00",)
TWELVE = [f"0000:{3 + number:02x}:00.{function}" for number in range(12) for function in range(2)]
MARK = "/run/organism/reboot-required.d/vfio"
RECORD = "/var/lib/organism/earlier/vfio.json"


def bound(it: Host) -> list[str]:
    return [address for address, driver in it.drivers().items() if driver == "vfio-pci"]


def overridden(it: Host) -> list[str]:
    return [address for address in it.drivers() if it.override(address)]


def test_cards_with_drivers_wait_for_a_boot_and_go_back_without_one(host: Hosts) -> None:
    it = host("pool_host")
    before, drivers = it.state(), it.drivers()
    done = it.have(AMD, exclude=SHARED)
    assert it.drivers() == drivers and not overridden(it)  # nothing is torn from the running host
    assert len(done.waiting) == 24 and "0000:03:00.0 has amdgpu, and vfio-pci" in done.waiting[0]
    assert it.root.read(MARK) == "; ".join(done.waiting)
    assert it.ran == ["update-initramfs -u -k all"]
    again = it.plan(AMD, exclude=SHARED)
    assert not again.difference and again.waiting == done.waiting

    it.boot()
    assert bound(it) == TWELVE == overridden(it)
    after = it.plan(AMD, exclude=SHARED)
    assert not after.difference and not after.waiting
    assert not it.plan({"driver": "amdgpu"}, exclude=SHARED).difference  # what had the driver is still found by it

    done = it.have()
    assert it.drivers() == drivers and not overridden(it) and not done.waiting
    assert not it.root.exists(RECORD)
    left = it.state()
    added = {name: text for name, text in left.items() if before.get(name) != text}
    assert added == {} and set(before) <= set(left)
    assert not it.plan().difference


def test_functions_without_drivers_are_bound_at_once(host: Hosts) -> None:
    it = host("intel_sriov")
    parts = [f"0000:03:00.{number}" for number in (1, 2, 3)]
    plan = it.plan({"id": "8086", "function": "virtual"})
    assert {f"{address} driver" for address in parts} <= {change.name for change in plan.difference.changes}
    done = it.have({"id": "8086", "function": "virtual"})
    assert bound(it) == parts == overridden(it) and not done.waiting and not it.root.exists(MARK)
    assert it.driver("0000:03:00.0") == "xe"
    it.have()
    assert not bound(it) and not overridden(it)
    assert all(it.driver(part) is None for part in parts)  # they had none


def test_now_takes_them_from_their_drivers_unless_somebody_uses_them(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/sys/bus/pci/devices/0000:04:00.0/drm/card1/dev", "226:1")
    it.hold(4242, "/dev/dri/card1", "/usr/bin/Xorg", ":0")
    state = it.state()
    with pytest.raises(VfioRefused, match=r"0000:04:00\.0 VGA .* is in use by Xorg \(process 4242\)"):
        it.have({"address": "04:00"}, bind="now")
    assert it.state() == state
    it.have({"address": "05:00"}, bind="now")
    assert bound(it) == ["0000:05:00.0", "0000:05:00.1"]
    assert it.driver("0000:04:00.0") == "amdgpu"


def test_a_card_of_a_running_vm_is_not_given_back(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"}, bind="now")
    group = it.root.link_name("/sys/bus/pci/devices/0000:05:00.0/iommu_group")
    it.hold(999, f"/dev/vfio/{group}", "/usr/bin/kvm", "-id", "200", "-name", "gpu-pool")
    state = it.state()
    with pytest.raises(VfioRefused, match=r"VM 200 \(process 999\)\. Stop that first; nothing was changed"):
        it.have()
    assert it.state() == state
    later = it.have(bind="boot")  # without touching what runs
    assert it.driver("0000:05:00.0") == "vfio-pci" and "amdgpu from the next boot on" in later.waiting[0]
    assert not overridden(it)


def test_a_selection_that_shrinks_gives_back_the_rest(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"}, {"address": "06:00"}, bind="now")
    it.have({"address": "06:00"}, bind="now")
    assert bound(it) == ["0000:06:00.0", "0000:06:00.1"]
    assert it.driver("0000:05:00.0") == "amdgpu" and not it.override("0000:05:00.0")
    assert "0000:05" not in it.root.read(_vfio_files.RULES)


def test_what_others_have_changed_since_stays(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"}, bind="now")
    write(it.root, "/sys/bus/pci/devices/0000:05:00.0/driver_override", "pci-stub")
    write(it.root, _vfio_files.MODULES, "vfio_pci\nmine")
    plan = it.plan()
    assert plan.kept_by_others["0000:05:00.0 driver_override"] == "pci-stub"
    assert plan.kept_by_others[_vfio_files.MODULES]["lines"] == ["vfio_pci", "mine"]
    it.have()
    assert it.root.read(_vfio_files.MODULES) == "vfio_pci\nmine"
    assert it.override("0000:05:00.0") == "pci-stub"


def test_cards_that_proxmox_had_bound_stay_bound(host: Hosts) -> None:
    """Proxmox VE binds without an override (new_id), and so may an administrator."""
    it = host("pool_host")
    it.have({"address": "05:00"}, bind="now")
    it.root.path(RECORD).unlink()
    for card in ("0000:05:00.0", "0000:05:00.1"):
        write(it.root, f"/sys/bus/pci/devices/{card}/driver_override", "(null)")
    it.have({"address": "05:00"})
    assert overridden(it) == bound(it) == ["0000:05:00.0", "0000:05:00.1"]
    it.have()
    assert bound(it) == ["0000:05:00.0", "0000:05:00.1"] and not overridden(it)


def test_ids_take_the_kind_at_the_next_boot(host: Hosts) -> None:
    it = host("pool_host")
    write(it.root, "/sys/class/net/enp17s0/flags", "0x1002")
    it.have({"id": "1002"}, mode="ids")
    assert not it.root.exists(_vfio_files.RULES)
    it.boot()
    assert {address[:-2] for address in bound(it)} == {address[:-2] for address in TWELVE} | {
        "0000:10:00",
        "0000:11:00",
    }
    assert not it.plan({"id": "1002"}, mode="ids").difference
    it.have()
    assert it.driver("0000:03:00.0") == "amdgpu" and not overridden(it)


def test_another_device_at_the_address_is_left_alone_at_boot(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"})
    write(it.root, "/sys/bus/pci/devices/0000:05:00.0/device", "0x1533")  # a network card came to this place
    it.boot()
    assert it.driver("0000:05:00.0") == "amdgpu" and it.driver("0000:05:00.1") == "vfio-pci"


def test_a_card_that_refuses_is_named_and_can_be_given_back(host: Hosts) -> None:
    it = host("pool_host")
    it.refuse_bind = {"0000:05:00.0"}
    with pytest.raises(_vfio_apply.VfioError, match=r"0000:05:00\.0 was given to vfio-pci and has no driver.*dmesg"):
        it.have({"address": "05:00"}, bind="now")
    assert it.root.exists(RECORD)
    it.refuse_bind = set()
    it.have({"address": "05:00"}, bind="now")
    assert bound(it) == ["0000:05:00.0", "0000:05:00.1"]
    it.have()
    assert it.driver("0000:05:00.0") == "amdgpu"


def test_a_run_that_was_cut_between_two_drivers_is_finished_by_the_next(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"}, bind="now")
    it.write("/sys/bus/pci/devices/0000:05:00.0/driver/unbind", "0000:05:00.0")  # and then the power went
    it.have()
    assert it.driver("0000:05:00.0") == "amdgpu" and not overridden(it)


def test_a_driver_that_does_not_come_back_now_waits_for_a_boot(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"}, bind="now")
    it.refuse_bind = {"0000:05:00.0"}
    done = it.have()
    assert done.waiting == ["amdgpu did not take 0000:05:00.0 back now (dmesg tells why); it gets it at the next boot"]
    assert not overridden(it) and it.driver("0000:05:00.1") == "snd_hda_intel"


def test_a_way_to_reset_is_set_and_taken_back(host: Hosts) -> None:
    it = host("pool_host")
    path = "/sys/bus/pci/devices/0000:05:00.0/reset_method"
    write(it.root, path, "flr bus")
    with pytest.raises(
        VfioRefused, match="cannot be reset by device_specific: the kernel knows bus, flr.*vendor-reset"
    ):
        it.plan({"address": "05:00"}, reset_method="device_specific")
    it.have({"address": "05:00"}, reset_method="bus")
    assert it.root.read(path) == "bus"
    assert 'KERNEL=="0000:05:00.0"' in it.root.read(_vfio_files.RULES)
    assert it.root.read(_vfio_files.RULES).count('ATTR{reset_method}="bus"') == 1  # the card, not its sound
    assert not it.plan({"address": "05:00"}, reset_method="bus").difference
    assert it.plan({"address": "05:00"}, reset_method="flr").resets == {"0000:05:00.0": "flr"}  # still known
    it.have({"address": "05:00"})
    assert it.root.read(path) == "flr bus" and "reset_method" not in it.root.read(_vfio_files.RULES)
    it.have({"address": "05:00"}, reset_method="bus")
    it.have()
    assert it.root.read(path) == "flr bus" and not it.root.exists(RECORD)


def test_an_initramfs_that_failed_is_made_by_the_next_run(host: Hosts) -> None:
    it = host("pool_host")
    it.refuse_command = "update-initramfs"
    with pytest.raises(CommandError, match="no space left"):
        it.have({"address": "05:00"})
    plan = it.plan({"address": "05:00"})
    assert plan.difference.message == "change initramfs: lacks the change -> updated"
    it.refuse_command = ""
    it.have({"address": "05:00"})
    assert not it.plan({"address": "05:00"}).difference


def test_hosts_without_initramfs_tools_get_no_hook(host: Hosts) -> None:
    it = host("pool_host")
    it.root.path("/usr/sbin/update-initramfs").unlink()
    it.have({"address": "05:00"})
    assert not it.root.exists(_vfio_files.HOOK) and it.ran == []


def test_the_hook_is_a_program_and_the_shell_reads_it(host: Hosts) -> None:
    it = host("pool_host")
    it.have({"address": "05:00"})
    hook = it.root.path(_vfio_files.HOOK)
    assert stat.S_IMODE(hook.stat().st_mode) == 0o755
    text = hook.read_text()
    assert text.startswith("#!/bin/sh\n") and f'cp -p {_vfio_files.RULES} "$DESTDIR/etc/udev/rules.d/"' in text


# The module -----------------------------------------------------------------------------------------------------------


class Left(Exception):
    """How a module ended."""


@pytest.fixture
def module(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``module(it, check=..., **arguments)``: run it on that host; its result, with ``failed``."""

    def leave(failed: bool) -> Any:
        def exit_with(_module: basic.AnsibleModule, *_positional: object, **result: Any) -> None:
            raise Left({**result, "failed": failed})

        return exit_with

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", leave(False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", leave(True))

    def run(it: Host, check: bool = False, **arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(pve_vfio, "Root", lambda: ModuleRoot(it.root.top))
        monkeypatch.setattr(pve_vfio, "hands", lambda _root: it)
        with (
            patch_module_args({**arguments, "_ansible_check_mode": check, "_ansible_diff": True}),
            pytest.raises(Left) as end,
        ):
            pve_vfio.main()
        result: dict[str, Any] = end.value.args[0]
        return result

    return run


def test_module_foretells_does_and_takes_back(host: Hosts, module: Callable[..., dict[str, Any]]) -> None:
    it = host("pool_host")
    arguments: dict[str, Any] = {"devices": [{"id": "1002"}], "exclude": ["10:00"], "cards": 12}
    state = it.state()
    foretold = module(it, check=True, **arguments)
    assert it.state() == state and foretold["changed"] and foretold["reboot_required"]
    done = module(it, **arguments)
    assert (done["diff"], done["pending"]) == (foretold["diff"], foretold["pending"])
    assert len(done["gpus"]) == 12 and done["refreshed"] == ["update-initramfs -u -k all"]
    assert not module(it, **arguments)["changed"]
    it.boot()
    after = module(it, **arguments)
    assert not after["changed"] and not after["reboot_required"]
    assert {row["driver"] for row in after["functions"]} == {"vfio-pci"}
    assert {row["driver_before"] for row in after["functions"]} == {"amdgpu", "snd_hda_intel"}
    assert all(row["own_group"] and row["bound"] for row in after["functions"])
    foretold = module(it, check=True, state="absent")
    back = module(it, state="absent")
    assert back["diff"] == foretold["diff"] and back["changed"]
    assert not module(it, state="absent")["changed"]


def test_module_refuses_in_words(host: Hosts, module: Callable[..., dict[str, Any]]) -> None:
    it = host("pool_host")
    state = it.state()
    for arguments, said in (
        ({"devices": []}, "devices is empty"),
        ({"devices": [{"id": "1002"}]}, "IOMMU group"),
        ({"devices": [{"address": "99:00.0"}]}, "Display controllers here"),
        ({"devices": [{"id": "1002"}], "exclude": ["x"]}, "no PCI address"),
    ):
        result = module(it, **arguments)
        assert result["failed"] and said in result["msg"]
    assert it.state() == state
