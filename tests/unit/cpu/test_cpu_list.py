# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""CPU sets: the kernel's lists and bitmaps, and the filters over them."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.organism.proxmox.plugins.filter.cpu_list import cpu_list
from ansible_collections.organism.proxmox.plugins.filter.cpu_mask import cpu_mask
from ansible_collections.organism.proxmox.plugins.filter.cpu_numbers import cpu_numbers
from organism.core import _cpu_list

cpus = st.sets(st.integers(0, 300))


@given(cpus)
def test_a_set_survives_both_spellings(chosen: set[int]) -> None:
    wanted = tuple(sorted(chosen))
    assert _cpu_list.parse(_cpu_list.render(chosen)) == wanted
    assert _cpu_list.from_mask(_cpu_list.mask(chosen)) == wanted
    assert _cpu_list.from_mask(_cpu_list.mask(chosen, 301)) == wanted


@given(cpus)
def test_a_mask_is_as_wide_as_the_machine_whatever_it_holds(chosen: set[int]) -> None:
    assert len(_cpu_list.mask(chosen, 301)) == len("1fff,") + 9 * 9 - 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        ("\n", ()),
        ("0", (0,)),
        ("0-3,8", (0, 1, 2, 3, 8)),
        (" 3 , 1-2\n", (1, 2, 3)),
        ("0-15:2/4", (0, 1, 4, 5, 8, 9, 12, 13)),
    ],
)
def test_lists(text: str, wanted: tuple[int, ...]) -> None:
    assert _cpu_list.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3-1", "write 1-3"),
        ("0,,2", "empty part"),
        ("a", "'a' is no CPU number"),
        ("-1", "'-1' is no CPU number"),
        ("^2", "'^2' is no CPU number"),
        ("0-99999999999", "CPU 99999999999 is beyond 8191"),
        ("0-7:3/2", "3 of each 2"),
    ],
)
def test_what_is_no_list_is_named(text: str, said: str) -> None:
    with pytest.raises(_cpu_list.CpuListError, match=said.replace("^", r"\^")):
        _cpu_list.parse(text)


@pytest.mark.parametrize(
    ("chosen", "width", "wanted"),
    [
        ((0, 1, 2, 3), 12, "00f"),  # as /proc/irq/default_smp_affinity of twelve CPUs prints it
        ((0, 1, 2, 3, 8), 36, "0,0000010f"),
        ((), 64, "00000000,00000000"),
        ((63,), 0, "80000000,00000000"),
        ((), 0, "0"),
    ],
)
def test_masks(chosen: tuple[int, ...], width: int, wanted: str) -> None:
    assert _cpu_list.mask(chosen, width) == wanted


def test_masks_that_are_none_are_refused() -> None:
    for text in ("", "xyz", "1,", "1,123456789"):
        with pytest.raises(_cpu_list.CpuListError):
            _cpu_list.from_mask(text)
    with pytest.raises(_cpu_list.CpuListError, match="CPU 12 does not fit"):
        _cpu_list.mask((12,), 12)
    assert _cpu_list.from_mask("0xF00000000") == (32, 33, 34, 35)


def test_equal_sets_have_one_normal_form() -> None:
    assert _cpu_list.normalise("8,0,1-3") == _cpu_list.normalise("0-3,8") == "0-3,8"


def test_filters() -> None:
    assert cpu_list("8,0,1-3") == cpu_list([8, 0, "1-3"]) == cpu_list((0, 1, 2, 3, 8)) == "0-3,8"
    assert cpu_list(4) == "4"
    assert cpu_list([]) == ""
    assert cpu_numbers("0-2") == [0, 1, 2]
    assert cpu_mask("0-3,8", 36) == "0,0000010f"
    for wrong in ("0-", [None], True, None):
        with pytest.raises(AnsibleFilterError, match="cpu_list"):
            cpu_list(wrong)  # type: ignore[arg-type] - templates give anything
    with pytest.raises(AnsibleFilterError, match="cpu_mask: CPU 8 does not fit"):
        cpu_mask("0-3,8", 8)
