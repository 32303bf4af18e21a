# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ids stay with their cards."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core._gpu import Gpu
from organism.core._gpu_map import Entry, MapError, MapPlan, find, parse_map, plan_map, render_map


def gpu(slot: int, uuid: str | None = None, **fields: Any) -> Gpu:
    return Gpu(f"0000:{slot:02x}:00.0", "amd", "amdgpu", "RX 580", uuid=uuid, vram_mb=8192, **fields)


def ids(plan: MapPlan) -> dict[str, str]:
    """Address by id, of what is present."""
    return {entry.id: entry.address[5:7] for entry in plan.entries if entry.present}


def test_new_cards_get_ids_in_the_order_of_their_addresses() -> None:
    plan = plan_map([], [gpu(3), gpu(4), gpu(11)])
    assert ids(plan) == {"gpu0": "03", "gpu1": "04", "gpu2": "0b"}
    assert plan.difference.changed
    again = plan_map(plan.entries, [gpu(3), gpu(4), gpu(11)])
    assert again.entries == plan.entries
    assert not again.difference


def test_a_vanished_card_keeps_its_id_and_gets_it_back() -> None:
    known = plan_map([], [gpu(3), gpu(4), gpu(11)]).entries
    without = plan_map(known, [gpu(3), gpu(11), gpu(12)])
    assert ids(without) == {"gpu0": "03", "gpu2": "0b", "gpu3": "0c"}
    assert [entry.id for entry in without.entries if not entry.present] == ["gpu1"]
    back = plan_map(without.entries, [gpu(3), gpu(4), gpu(11), gpu(12)])
    assert ids(back) == {"gpu0": "03", "gpu1": "04", "gpu2": "0b", "gpu3": "0c"}


def test_cards_with_uuids_are_known_in_any_slot() -> None:
    known = plan_map([], [gpu(3, "a"), gpu(4, "b")]).entries
    swapped = plan_map(known, [gpu(3, "b"), gpu(4, "a")])
    assert ids(swapped) == {"gpu0": "04", "gpu1": "03"}
    # another card in a known slot is another GPU
    replaced = plan_map(known, [gpu(3, "a"), gpu(4, "new")])
    assert ids(replaced) == {"gpu0": "03", "gpu2": "04"}


def test_what_a_card_said_earlier_is_kept_while_its_driver_is_not_ready() -> None:
    known = plan_map([], [gpu(3, "a")]).entries
    unready = Gpu("0000:03:00.0", "amd", "amdgpu", "1002:67df")
    plan = plan_map(known, [unready])
    assert plan.entries == known


def test_what_does_not_belong_to_the_pool_is_named() -> None:
    console = dataclasses.replace(gpu(0), vendor="intel", driver="i915")
    passed_on = dataclasses.replace(gpu(5), driver="vfio-pci")
    plan = plan_map([], [console, gpu(3), gpu(4, "mine"), passed_on], exclude=["0000:03:00.0", "mine"])
    assert plan.entries == []
    assert plan.ignored == {
        "0000:00:00.0": "cards by intel are not wanted",
        "0000:03:00.0": "excluded by the inventory",
        "mine": "excluded by the inventory",
        "0000:05:00.0": "it is reserved for a virtual machine (driver vfio-pci)",
    }


def test_simulated_devices_say_so_and_can_be_taken_back() -> None:
    plan = plan_map([], [], simulated=2, prefix="lab-")
    assert [(entry.id, entry.address, entry.model) for entry in plan.entries] == [
        ("lab-0", "sim:0", "Simulated GPU (no hardware)"),
        ("lab-1", "sim:1", "Simulated GPU (no hardware)"),
    ]
    fewer = plan_map(plan.entries, [], simulated=1, prefix="lab-")
    assert [entry.present for entry in fewer.entries] == [True, False]


def test_a_prefix_that_makes_no_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix 'my\.gpu'"):
        plan_map([], [gpu(3)], prefix="my.gpu")


def test_the_map_reads_what_it_wrote() -> None:
    entries = plan_map([], [gpu(3, "a"), gpu(4)], simulated=1).entries
    assert parse_map(render_map(entries)) == entries
    assert find(entries, "gpu1").address == "0000:04:00.0"
    with pytest.raises(MapError, match=r"no GPU gpu9 .it has gpu0, gpu1, gpu2"):
        find(entries, "gpu9")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "not a GPU map of version 1"),
        ('{"version": 2, "gpus": []}', "not a GPU map of version 1"),
        ('{"version": 1, "gpus": [7]}', r"gpus\[0\] must be an object"),
        ('{"version": 1, "gpus": [{"id": "a.b", "backend": "nvml", "address": "x"}]}', "id 'a.b' must match"),
        ('{"version": 1, "gpus": [{"id": "a", "backend": "cuda", "address": "x"}]}', "backend 'cuda' is none of"),
        ('{"version": 1, "gpus": [{"id": "a", "backend": "nvml"}]}', "address must be of type str"),
        ('{"version": 1, "gpus": [{"id": "a", "backend": "nvml", "address": "x", "vram_mb": "8"}]}', "vram_mb must be"),
        ('{"version": 1, "gpus": [{"id": "a", "backend": "nvml", "address": "x", "vram": 8}]}', "unknown keys: vram"),
    ],
)
def test_a_bad_map_is_refused_with_the_place(text: str, told: str) -> None:
    with pytest.raises(MapError, match=told):
        parse_map(text, "/etc/organism/gpus.json")


def test_ids_must_be_unique() -> None:
    entry = {"id": "gpu0", "backend": "simulated", "address": "sim:0"}
    with pytest.raises(MapError, match="id used twice: gpu0"):
        parse_map(json.dumps({"version": 1, "gpus": [entry, {**entry, "address": "sim:1"}]}))


slots = st.sets(st.integers(0, 7), max_size=6)


@given(history=st.lists(slots, min_size=1, max_size=6))
def test_whatever_comes_and_goes_no_id_changes_its_slot(history: list[set[int]]) -> None:
    known: list[Entry] = []
    owners: dict[str, str] = {}
    for present in history:
        plan = plan_map(known, [gpu(slot) for slot in sorted(present)])
        assert {entry.address for entry in plan.entries if entry.present} == {gpu(slot).address for slot in present}
        for entry in plan.entries:
            assert owners.setdefault(entry.id, entry.address) == entry.address
        assert not plan_map(plan.entries, [gpu(slot) for slot in sorted(present)]).difference
        known = plan.entries
