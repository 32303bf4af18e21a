# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which hostpciN carries which mapping: stable, and never one of somebody else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _pve_gpus, _pve_vm_plan
from organism.core._pve_vm_check import PciMapping
from organism.core._pve_vm_plan import WishRefused

KNOWN = {f"gpu-{n:02}": PciMapping(((f"0000:{n:02x}:00",),)) for n in range(20)}


def indices(config: dict[str, str], wanted: list[str], prefix: str = "gpu-") -> dict[str, str]:
    """hostpciN -> text after the plan was carried out."""
    wishes = _pve_gpus.plan(config, wanted, {"pcie": "1"}, prefix, KNOWN)
    made = _pve_vm_plan.plan(config, wishes)
    return {option: text for option, text in config.items() if option not in made.deletes} | made.sets


def test_twelve_cards_fill_the_first_twelve() -> None:
    wanted = [f"gpu-{n:02}" for n in range(1, 13)]
    after = indices({}, wanted)
    assert list(after) == [f"hostpci{n}" for n in range(12)]
    assert after["hostpci11"] == "mapping=gpu-12,pcie=1"
    assert indices(after, wanted[::-1]) == after


def test_a_raw_entry_of_the_same_card_is_converted_in_its_place() -> None:
    after = indices({"hostpci3": "0000:02:00,rombar=0", "hostpci4": "05:00.0"}, ["gpu-01", "gpu-02"])
    assert after == {
        "hostpci3": "rombar=0,mapping=gpu-02,pcie=1",
        "hostpci4": "05:00.0",
        "hostpci0": "mapping=gpu-01,pcie=1",
    }


def test_the_same_mapping_twice_becomes_one() -> None:
    config = {"hostpci1": "mapping=gpu-01,pcie=1", "hostpci0": "mapping=gpu-01,pcie=1"}
    assert indices(config, ["gpu-01"]) == {"hostpci0": "mapping=gpu-01,pcie=1"}


@pytest.mark.parametrize(
    ("config", "wanted", "told"),
    [
        ({}, [f"gpu-{n:02}" for n in range(17)], "17 mappings, and a VM has 16 hostpci"),
        ({f"hostpci{n}": f"mapping=x{n}" for n in range(16)}, ["gpu-01"], "do not fit"),
        ({}, ["gpu-01", "gpu-01"], "mappings named twice: gpu-01"),
        ({}, ["gpu-99"], "there is no PCI mapping gpu-99"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, str], wanted: list[str], told: str) -> None:
    with pytest.raises(WishRefused) as caught:
        indices(config, wanted)
    assert told in str(caught.value)


@given(
    st.lists(st.sampled_from(sorted(KNOWN)), unique=True, max_size=8),
    st.dictionaries(
        st.integers(0, 15).map("hostpci{}".format),
        st.one_of(st.sampled_from(sorted(KNOWN)), st.just("foreign")).map("mapping={}".format),
        max_size=6,
    ),
)
def test_every_card_once_foreign_ones_untouched_and_nothing_moves(wanted: list[str], config: dict[str, str]) -> None:
    after = indices(config, wanted)
    texts = [text.split(",")[0].removeprefix("mapping=") for text in after.values()]
    assert sorted(name for name in texts if name != "foreign") == sorted(wanted)
    assert {o: t for o, t in after.items() if "foreign" in t} == {o: t for o, t in config.items() if "foreign" in t}
    places = {}
    for option in sorted(config, key=lambda each: int(each[7:])):
        places.setdefault(config[option].removeprefix("mapping="), option)
    for name in wanted:
        if name in places:
            assert after[places[name]].startswith(f"mapping={name}")
    assert indices(after, wanted) == after
