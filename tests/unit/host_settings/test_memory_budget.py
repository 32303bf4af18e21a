# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory budget: what counts, what counts once, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from unit.gpu.test_modules import module

from ansible_collections.organism.proxmox.plugins.modules.memory_budget import judge
from organism.core import _memory_budget as budgets
from organism.core._memory_budget import BudgetError, Vm, at_once, make, pool_pages, size_mib, vms_from
from organism.core._root import Root

GIB = 1024


@pytest.mark.parametrize(
    ("text", "mib"),
    [("8G", 8192), ("8GiB", 8192), ("1.5 GB", 1536), (512, 512), ("512", 512), ("30%", 9831), ("1K", 1), ("0", 0)],
)
def test_sizes(text: Any, mib: int) -> None:
    assert size_mib(text, 32 * GIB, "x") == mib


@pytest.mark.parametrize("text", ["", "8X", "-1", "G", True, "8G8", "8,5G"])
def test_what_is_no_size_is_refused_by_its_name(text: Any) -> None:
    with pytest.raises(BudgetError, match="arc_max: .* is not a size like 8G"):
        size_mib(text, 32 * GIB, "arc_max")


def test_more_than_the_memory_does_not_fit() -> None:
    """The numbers of a how-to for 32 GiB: ARC 8, VM 24, RAM layer 8."""
    budget = make(32 * GIB, arc_max=8 * GIB, vms=[Vm("100", 24 * GIB)], layers=[("active", 8 * GIB)], reserve=2 * GIB)
    assert (budget.fits, budget.free) == (False, -10 * GIB)
    assert budget.message() == "42.0 GiB may be claimed at once, and this host has 32.0: 10.0 GiB too much"
    assert budget.table().splitlines() == [
        "what                 GiB  make it less by",
        "ZFS ARC at most      8.0  a lower ARC limit (zfs_arc_max)",
        "VM 100              24.0  less memory, or an exclusive group with another VM",
        "RAM layer active     8.0  a smaller layer, or fewer",
        "the host itself      2.0  nothing: it is what the system needs to live",
        "sum                 42.0",
        "this host has       32.0",
    ]


def test_a_sum_of_just_the_memory_fits() -> None:
    assert make(10, vms=[Vm("a", 8)], reserve=2).fits
    assert not make(10, vms=[Vm("a", 9)], reserve=2).fits


def test_vms_in_a_pool_are_counted_once() -> None:
    vms = [Vm("100", 20 * GIB, hugepages=True), Vm("101", 2 * GIB)]
    assert make(32 * GIB, vms=vms, pool=20 * GIB).total == 22 * GIB
    assert make(32 * GIB, vms=vms).total == 22 * GIB
    with pytest.raises(BudgetError, match="need 20.0 GiB and 10.0 GiB are set aside"):
        make(32 * GIB, vms=vms, pool=10 * GIB)


def test_of_an_exclusive_group_the_largest_counts() -> None:
    vms = [Vm("gpu", 16 * GIB, exclusive="big"), Vm("train", 20 * GIB, exclusive="big"), Vm("small", GIB)]
    assert [vm.name for vm in at_once(vms)] == ["train", "small"]
    budget = make(32 * GIB, vms=vms)
    assert budget.total == 21 * GIB
    assert "VM train, or another of big" in budget.table()


def test_zram_holds_pages_that_are_counted_already() -> None:
    assert make(32 * GIB, zram=10000).total == 200


def test_a_pool_is_made_of_whole_pages() -> None:
    assert pool_pages([Vm("100", 20 * GIB, hugepages=True), Vm("101", GIB)], "2M") == 10240
    assert pool_pages([Vm("100", 20 * GIB, hugepages=True)], "1G") == 20
    with pytest.raises(BudgetError, match="VM 100 is no multiple of 1G"):
        pool_pages([Vm("100", 2500, hugepages=True)], "1G")


def test_a_vm_is_named_once() -> None:
    with pytest.raises(BudgetError, match="VM 100 is named twice"):
        vms_from([{"name": "100", "memory": "1G"}, {"name": 100, "memory": "1G"}], 1)


def test_what_the_kernel_says(tmp_path: Path) -> None:
    root = Root(tmp_path)
    with pytest.raises(BudgetError, match="MemTotal"):
        budgets.memory_mib(root)
    assert budgets.arc_now_mib(root) == 0
    (tmp_path / "proc/spl/kstat/zfs").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       32754432 kB\nMemFree: 1 kB\n")
    (tmp_path / budgets.ARCSTATS.lstrip("/")).write_text(
        "c_min 4 33554432\nc_max                           4    8589934592\n"
    )
    assert (budgets.memory_mib(root), budgets.arc_now_mib(root)) == (31986, 8192)


@pytest.mark.parametrize(
    ("limit", "planned", "counts"),
    [("auto", [], 30), ("auto", ["4G", "8G"], 8), ("6G", ["8G"], 6)],
)
def test_limits_that_the_arc_gets_in_this_run_count_in_place_of_the_one_in_force(
    tmp_path: Path, limit: str, planned: list[str], counts: int
) -> None:
    params = {
        "arc_max": limit, "arc_planned": planned, "vms": [], "hugepages": "none", "hugepage_size": "2M",
        "ram_layers": {}, "zram": "0", "reserve": "0", "memory": "32G",
    }  # fmt: skip
    (tmp_path / "proc/spl/kstat/zfs").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 33554432 kB\n")
    root = Root(tmp_path)
    without_zfs, _ = judge(params, root)
    assert without_zfs.total == (6 * GIB if limit == "6G" else 0)
    (tmp_path / budgets.ARCSTATS.lstrip("/")).write_text(f"c_max 4 {30 << 30}\n")
    assert judge(params, root)[0].total == counts * GIB


def test_the_module_passes_refuses_and_never_changes() -> None:
    good = module("memory_budget", memory="32G", arc_max="4G", vms=[{"name": "100", "memory": "20G"}], zram="30%")
    assert (good["changed"], good["fits"], good["free"]) == (False, True, 32768 - 4096 - 20480 - 197 - 2048)
    assert good["msg"].startswith("26.2 of 32.0 GiB are claimed, 5.8 GiB are left")
    pool = {"name": "100", "memory": "20G", "hugepages": True}
    assert module("memory_budget", memory="32G", vms=[pool], hugepages="pool")["pages"] == {"2M": 10240}
    bad = module("memory_budget", memory="32G", vms=[pool, {"name": "101", "memory": "16G"}], arc_max="auto")
    assert bad["failed"]
    assert "GiB too much\nwhat" in bad["msg"]
    assert "VM 101" in bad["table"]
    assert "reserve: 'x' is not a size" in module("memory_budget", reserve="x")["msg"]
