# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Interrupts: whose they are, where they belong, what is written, what is taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unit.steer import trees
from unit.steer.trees import NIC, NVME, SATA, ZONES, Pci, machine, mask

from organism.core import _irq, _irq_apply, _irq_plan
from organism.core._irq_plan import IrqPlanError, IrqWish
from organism.core._root import Root

WISH = IrqWish(ZONES)
RECORD = "var/lib/organism/earlier/irq_affinity.json"


def wanted(top: Path, wish: IrqWish = WISH) -> dict[str, tuple[str, str]]:
    """(CPU list, state) by name."""
    planned = _irq_plan.plan(_irq.observe(Root(top)), wish)
    return {row["name"]: (row["wanted"], row["state"]) for row in (s.row() for s in planned.steerings)}


def test_nic_and_nvme_are_spread_over_the_io_zone_and_the_rest_belongs_to_the_host(tmp_path: Path) -> None:
    plan = wanted(machine(tmp_path, NIC, NVME, SATA))
    # both directions of a queue on one CPU, each queue on another
    assert (plan["virtio2-input.0"], plan["virtio2-output.0"]) == (plan["virtio2-output.0"], plan["virtio2-input.0"])
    assert {plan["virtio2-input.0"][0], plan["virtio2-input.1"][0]} == {"1", "7"}
    assert plan["ahci[0000:00:17.0]"] == ("0,6", "wrong")
    assert plan["acpi"] == ("0,6", "wrong")
    assert plan["nvme0q0"][0] in ("1", "7")
    assert {plan[f"nvme0q{queue}"][1] for queue in (1, 2, 3)} == {"managed"}
    assert plan["timer"][1] == "fixed"
    assert "" not in plan  # a vector that nobody requested is no business of ours


def test_steering_writes_once_keeps_hands_off_managed_vectors_and_goes_back(tmp_path: Path) -> None:
    root = Root(machine(tmp_path, NIC, NVME, SATA))
    foretold = _irq_apply.steer(root, WISH, check=True)
    assert not (tmp_path / RECORD).exists() and mask(tmp_path, 41) == "0-11"
    done = _irq_apply.steer(root, WISH)
    assert done.difference == foretold.difference
    assert done.summary["managed"] == 3 and done.summary["fixed"] == 1 and done.summary["wrong"] == 0
    assert not any(row["ok"] for row in done.rows if row["managed"])
    assert mask(tmp_path, 25) == "0,6" and mask(tmp_path, 31) == "0-11" and mask(tmp_path, 60) == "0-11"
    assert (tmp_path / "proc/irq/default_smp_affinity").read_text() == "41\n"
    assert not _irq_apply.steer(root, WISH).difference
    # somebody moved one meanwhile: that stays
    trees.write(tmp_path / "proc/irq/9/smp_affinity_list", "4")
    back = _irq_apply.restore(root)
    assert back.kept == {"irq:-/0/acpi": "4"}
    assert {mask(tmp_path, number) for number in (25, 30, 41, 42, 43, 44)} == {"0-11"}
    assert (tmp_path / "proc/irq/default_smp_affinity").read_text() == "fff\n"
    assert not (tmp_path / RECORD).exists()
    assert not _irq_apply.restore(root).difference


def test_a_mask_that_waits_for_the_next_interrupt_is_pending_and_not_written_again(tmp_path: Path) -> None:
    root = Root(machine(tmp_path, SATA))
    _irq_apply.steer(root, WISH)  # the tree's effective CPU stays 3, as an IO-APIC's does until it fires
    again = _irq_apply.steer(root, WISH)
    row = next(row for row in again.rows if row["irq"] == 25)
    assert (row["state"], row["ok"], again.difference.changed) == ("pending", False, False)
    trees.write(tmp_path / "proc/irq/25/effective_affinity_list", "6")
    assert next(row for row in _irq_apply.steer(root, WISH).rows if row["irq"] == 25)["ok"]


def test_numbers_change_at_a_reboot_and_the_record_still_fits(tmp_path: Path) -> None:
    root = Root(machine(tmp_path / "one", NIC))
    _irq_apply.steer(root, WISH)
    renumbered = Pci(NIC.address, NIC.kind, {n + 100: name for n, name in NIC.vectors.items()}, NIC.driver, NIC.net)
    top = machine(tmp_path / "two", renumbered)
    (top / "var").symlink_to(tmp_path / "one/var")
    _irq_apply.steer(Root(top), WISH)
    assert mask(top, 141) in ("1", "7")
    _irq_apply.restore(Root(top))
    assert {mask(top, number) for number in range(140, 145)} == {"0-11"}


def test_two_interrupts_of_one_name_are_two(tmp_path: Path) -> None:
    top = machine(tmp_path)
    trees.vector(top, 10, "acpi")
    _irq_apply.steer(Root(top), WISH)
    assert mask(top, 9) == mask(top, 10) == "0,6"
    _irq_apply.restore(Root(top))
    assert mask(top, 9) == mask(top, 10) == "0-11"


def test_a_device_that_went_away_is_no_obstacle_to_the_way_back(tmp_path: Path) -> None:
    _irq_apply.steer(Root(machine(tmp_path / "one", NIC, SATA)), WISH)
    top = machine(tmp_path / "two", SATA)
    (top / "var").symlink_to(tmp_path / "one/var")
    assert not _irq_apply.restore(Root(top)).kept
    assert not (tmp_path / "one" / RECORD).exists()


def test_overrides_by_interface_address_and_action_and_what_they_let_go_returns(tmp_path: Path) -> None:
    top = machine(tmp_path, NIC, NVME, SATA)
    root = Root(top)
    _irq_apply.steer(root, IrqWish(ZONES, {"0000:00:17.0": "io", "acpi": "3", "eno1": "4-5"}))
    assert mask(top, 9) == "3" and mask(top, 25) in ("1", "7")
    assert {mask(top, 41), mask(top, 43)} == {"4", "5"}
    _irq_apply.steer(root, IrqWish(ZONES, {"acpi": "leave", "eno1": "leave"}))
    assert {mask(top, number) for number in (9, 40, 41, 42, 43, 44)} == {"0-11"}
    assert mask(top, 25) == "0,6"
    kept = json.loads((top / RECORD).read_text())["kept"]
    assert not [key for key in kept if "virtio2" in key or "acpi" in key]


def test_a_virtual_function_follows_its_card_unless_it_is_named(tmp_path: Path) -> None:
    functions = [
        Pci("0000:05:00.0", "0x020000", {70: "ens5-TxRx-0"}, net="ens5"),
        Pci("0000:05:10.0", "0x020000", {71: "ens5v0-TxRx-0"}, net="ens5v0", physfn="0000:05:00.0"),
        Pci("0000:05:10.2", "0x020000", {72: "ens5v1-TxRx-0"}, net="ens5v1", physfn="0000:05:00.0"),
        Pci("0000:05:10.4", "0x020000", {73: "vfio-msix[0](0000:05:10.4)"}, driver="vfio-pci"),
    ]
    top = machine(tmp_path, *functions)
    plan = wanted(top, IrqWish(ZONES, {"ens5": "5", "ens5v1": "0"}))
    assert plan["ens5-TxRx-0"][0] == plan["ens5v0-TxRx-0"][0] == "5"
    assert plan["ens5v1-TxRx-0"][0] == "0"
    assert plan["vfio-msix[0](0000:05:10.4)"][0] == "0,6"


def test_a_legacy_line_belongs_to_its_device_and_shared_to_the_nic(tmp_path: Path) -> None:
    sata = Pci("0000:00:17.0", "0x010601", {16: "ahci,eth0"}, line=16)
    nic = Pci("0000:04:00.0", "0x020000", {16: "ahci,eth0"}, net="eth0", line=16)
    found = _irq.observe(Root(machine(tmp_path, sata, nic)))
    shared = next(vector for vector in found.vectors if vector.irq == 16)
    assert shared.device is not None and (shared.device.kind, shared.actions) == ("nic", ("ahci", "eth0"))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (IrqWish(ZONES, {"eno10": "io"}), "no such device: eno10.*eno1"),
        (IrqWish(ZONES, {"eno1": "fast"}), "'fast' is no zone"),
        (IrqWish(ZONES, {"eno1": "12"}), "CPU 12 is not online"),
        (IrqWish({**ZONES, "io": ()}), "the zone io has no CPUs"),
        (IrqWish(ZONES, kinds={"gpu": "io"}), "no such kind of device: gpu"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changed(tmp_path: Path, wish: IrqWish, said: str) -> None:
    top = machine(tmp_path, NIC)
    with pytest.raises(IrqPlanError, match=said):
        _irq_apply.steer(Root(top), wish)
    assert mask(top, 41) == "0-11" and not (top / RECORD).exists()


def test_an_older_kernel_hides_managed_vectors_and_nvme_queues_are_known_anyway(tmp_path: Path) -> None:
    plan = wanted(machine(tmp_path, NVME, modes=False))
    assert plan["nvme0q1"][1] == "managed" and plan["nvme0q0"][1] == "wrong"


def test_debugfs_tells_where_it_is_readable(tmp_path: Path) -> None:
    top = machine(tmp_path, SATA, modes=False)
    flags = "handler:  handle_edge_irq\nstatus:   0x00004000\nddepth:   0\ndstate:   0x31600200\n            "
    trees.write(top / "sys/kernel/debug/irq/irqs/25", flags + "IRQD_AFFINITY_MANAGED\n            IRQD_ACTIVATED")
    trees.write(top / "sys/kernel/debug/irq/irqs/9", flags + "IRQD_ACTIVATED")
    plan = wanted(top)
    assert plan["ahci[0000:00:17.0]"][1] == "managed" and plan["acpi"][1] == "wrong"


def refuse_writes(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    real = Path.write_text

    def guarded(self: Path, *args: object, **kwargs: object) -> int:
        if self.parts[-2:] == (str(number), "smp_affinity_list"):
            raise OSError(code, "refused by the test's kernel")
        return real(self, *args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Path, "write_text", guarded)


@pytest.mark.parametrize("code", [1, 5])
def test_a_refusal_is_a_managed_vector_and_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    root = Root(machine(tmp_path, SATA, modes=False))
    refuse_writes(monkeypatch, 25, code)
    done = _irq_apply.steer(root, WISH)
    row = next(row for row in done.rows if row["irq"] == 25)
    assert (row["state"], row["managed"], row["ok"]) == ("managed", True, False)
    assert "ahci" not in done.difference.message
    assert "ahci" not in (tmp_path / RECORD).read_text()
    # until the next boot nobody has to try again, so a check foretells what a run does
    assert not _irq_apply.steer(root, WISH, check=True).difference
    assert not _irq_apply.steer(root, WISH).difference


def test_another_error_names_the_vector_and_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(machine(tmp_path, SATA))
    refuse_writes(monkeypatch, 25, 28)
    with pytest.raises(_irq_apply.SteeringError, match=r"irq/25/.*ahci.*0,6.*no interrupt vector left"):
        _irq_apply.steer(root, WISH)


def test_queue_numbers_of_the_drivers_that_there_are() -> None:
    def numbers(*names: str) -> list[int]:
        return _irq_plan.queue_numbers(_irq.Vector(n, (name,), (0,)) for n, name in enumerate(names))

    mlx5 = [f"mlx5_{what}@pci:0000:03:00.0" for what in ("async0", "comp0", "comp1")]
    assert numbers(*mlx5) == [
        0,
        0,
        1,
    ]
    assert numbers("eno1", "eno1-TxRx-0", "eno1-TxRx-1") == [0, 0, 1]
    assert numbers("eno1-rx-0", "eno1-tx-0", "eno1") == [0, 0, 0]
    assert numbers("i40e-0000:01:00.0:misc", "i40e-ens1f0-TxRx-0", "i40e-ens1f0-TxRx-1") == [0, 0, 1]
    assert numbers("nvme0q0", "nvme0q1", "nvme0q2") == [0, 0, 1]
    assert numbers("megasas", "megasas", "megasas") == [0, 1, 2]
    assert numbers("ens192-rxtx-0", "ens192-rxtx-1") == [0, 1]


def test_interrupts_are_read_from_proc_where_sysfs_has_no_names() -> None:
    text = (
        "            CPU0       CPU1       \n"
        "   0:         32          0  IR-IO-APIC    2-edge      timer\n"
        "  16:          0          4  IR-IO-APIC   16-fasteoi   i801_smbus, idma64.0\n"
        " 125:          0          0  IR-PCI-MSI 524288-edge      nvme0q0\n"
        " 126:          0          0  PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0\n"
        " 127:          0          0  PCI-MSIX-0000:00:03.0   2-edge\n"
        " NMI:          0          0   Non-maskable interrupts\n"
        " ERR:          0\n"
    )
    assert _irq.parse_interrupts(text) == {
        0: ("timer",),
        16: ("i801_smbus", "idma64.0"),
        125: ("nvme0q0",),
        126: ("virtio2-input.0",),
    }


def test_this_machine_is_read_without_a_write() -> None:
    if not Path("/proc/irq").is_dir():
        pytest.skip("no /proc/irq here")
    found = _irq.observe(Root())
    planned = _irq_plan.plan(found, IrqWish(dict.fromkeys(("host", "vcpu", "io"), found.online)))
    assert {steering.vector.irq for steering in planned.steerings} == {vector.irq for vector in found.vectors}


def test_the_wish_survives_its_file() -> None:
    wish = IrqWish(ZONES, {"eno1": "leave"}, default=False)
    assert IrqWish.from_dict(json.loads(json.dumps(wish.as_dict()))) == wish
