# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan: known machines, properties over generated ones, and lists given by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organism.core import _topology
from organism.core._cpu_list import parse, render
from organism.core._cpu_plan import ZONES, CpuPlan
from organism.core._cpu_zones import PlanRefused, Wishes, plan
from organism.core._root import Root
from organism.core._topology import IoDevice, Topology

Machines = Callable[[str], Root]


def lists(made: CpuPlan) -> tuple[str, str, str]:
    return render(made.host), render(made.vcpu), render(made.io)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("coffee_lake_12_gpus", ("0,6", "2-5,8-11", "1,7")),
        ("amd_apu", ("0,8", "2-7,10-15", "1,9")),
        ("alder_lake_hybrid", ("0-1,17-19", "2-15", "16")),
        ("epyc_two_sockets", ("0-3,32-35", "4-15,20-31,36-47,52-63", "16-19,48-51")),
        ("nvidia_mig", ("0-5", "6-11,18-23", "12-17")),
        ("single_core_vm", ("0", "0", "0")),
    ],
)
def test_known_machines(machine: Machines, shape: str, wanted: tuple[str, str, str]) -> None:
    assert lists(plan(_topology.read(machine(shape)))) == wanted


def test_sizes(machine: Machines) -> None:
    reference = _topology.read(machine("coffee_lake_12_gpus"))
    assert lists(plan(reference, Wishes(host_cores=2, io_cores=2))) == ("0,3,6,9", "4-5,10-11", "1-2,7-8")
    with pytest.raises(PlanRefused, match="3 cores for HOST and 3 for IO leave none of 6"):
        plan(reference, Wishes(host_cores=3, io_cores=3))
    with pytest.raises(PlanRefused, match="1 or more"):
        plan(reference, Wishes(io_cores=0))


def test_boundaries_can_be_chosen(machine: Machines) -> None:
    mig = _topology.read(machine("nvidia_mig"))
    exact = plan(mig, Wishes(boundary="core"))
    assert lists(exact) == ("0", "1-11,13-23", "12")
    assert any(
        "share a last-level cache: CPUs 0-5 (HOST, VCPU); CPUs 12-17 (VCPU, IO)" in said for said in exact.reasons
    )
    with pytest.raises(PlanRefused, match="there are only 2"):
        plan(_topology.read(machine("epyc_two_sockets")), Wishes(boundary="node"))
    with pytest.raises(PlanRefused, match="boundary is auto"):
        plan(mig, Wishes(boundary="socket"))


def test_too_small_a_machine_says_that_it_has_no_zones(machine: Machines) -> None:
    made = plan(_topology.read(machine("single_core_vm")))
    assert made.shared
    assert "1 core, and zones of their own need 3" in made.reasons[0]
    assert not plan(_topology.read(machine("amd_apu"))).shared


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Machines of 1 to 4 nodes, 1 to 4 caches a node, 1 to 6 cores a cache, 1 or 2 threads, numbered in either way."""
    nodes, caches, cores = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    threads, adjacent = draw(st.integers(1, 2)), draw(st.booleans())
    total = nodes * caches * cores

    def numbers(core: int) -> tuple[int, ...]:
        return tuple(core * threads + t if adjacent else core + t * total for t in range(threads))

    def within(first: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in range(first, first + count) for cpu in numbers(core)))

    everything = within(0, total)
    by_node = {node: within(node * caches * cores, caches * cores) for node in range(nodes)}
    by_cache = tuple(within(cache * cores, cores) for cache in range(nodes * caches))
    small: tuple[int, ...] = ()
    if draw(st.booleans()) and total > 1:
        small = within(draw(st.integers(1, total - 1)), 1)
    places = draw(st.lists(st.integers(0, nodes - 1), max_size=3))
    devices = tuple(IoDevice(f"0000:0{n}:00.0", "nvme", at, by_node[at]) for n, at in enumerate(places))
    return Topology(
        online=everything,
        present=everything,
        possible=everything,
        cores=tuple(sorted(numbers(core) for core in range(total))),
        caches=tuple(sorted(by_cache)),
        nodes=by_node,
        efficiency=small,
        devices=devices,
    )


@given(topologies(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["auto", "cache", "core"]))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_a_partition_of_whole_cores_or_no_plan(
    topology: Topology, host_cores: int, io_cores: int, boundary: str
) -> None:
    wishes = Wishes(host_cores=host_cores, io_cores=io_cores, boundary=boundary)
    try:
        made = plan(topology, wishes)
    except PlanRefused:
        # only where the sizes do not fit, or a boundary was demanded that gives too few pieces
        assert boundary == "cache" or host_cores + io_cores + 1 > len(topology.cores)
        return
    if len(topology.cores) < 3:
        assert made.host == made.vcpu == made.io == topology.online
        assert made.reasons
        return
    assert sorted(made.host + made.vcpu + made.io) == list(topology.online)
    assert topology.online[0] in made.host
    for core in topology.cores:
        assert sum(bool(set(core) & set(made.zone(zone))) for zone in ZONES) == 1
    cores_of = {zone: sum(core[0] in made.zone(zone) for core in topology.cores) for zone in ZONES}
    assert cores_of["host"] >= host_cores
    assert cores_of["io"] >= io_cores
    assert cores_of["vcpu"] >= 1


@given(topologies())
@settings(max_examples=100, deadline=None)
def test_what_zones_share_is_said_and_nothing_else(topology: Topology) -> None:
    if len(topology.cores) < 3:
        return
    made = plan(topology)
    for what, groups in (("last-level cache", topology.caches), ("NUMA node", tuple(topology.nodes.values()))):
        shared = [
            group
            for group in groups
            if len(groups) > 1 and sum(bool(set(group) & set(made.zone(z))) for z in ZONES) > 1
        ]
        told = [reason for reason in made.reasons if reason.startswith(f"zones share a {what}")]
        assert len(told) == bool(shared)
        assert all(f"CPUs {render(group)} (" in told[0] for group in shared)


@given(topologies())
@settings(max_examples=100, deadline=None)
def test_with_four_equal_caches_none_is_shared_unless_the_devices_say_so(topology: Topology) -> None:
    """Four pieces always leave VCPU half; only cores of two kinds or devices near to CPU 0's piece stand against it."""
    if len(topology.caches) < 4 or topology.devices or topology.efficiency:
        return
    made = plan(topology)
    for cache in topology.caches:
        assert sum(bool(set(cache) & set(made.zone(zone))) for zone in ZONES) == 1


@given(topologies())
@settings(max_examples=100, deadline=None)
def test_io_is_near_its_devices_whenever_a_core_there_is_free(topology: Topology) -> None:
    if len(topology.cores) < 3 or len({device.cpus for device in topology.devices}) != 1:
        return
    near = set(topology.devices[0].cpus)
    free = [core for core in topology.cores if set(core) & near and topology.online[0] not in core]
    if free:
        assert set(plan(topology).io) & near


@given(topologies())
@settings(max_examples=100, deadline=None)
def test_the_computed_lists_are_accepted_when_given_by_hand(topology: Topology) -> None:
    if len(topology.cores) < 3:
        return
    computed = plan(topology)
    again = plan(topology, Wishes(host=computed.host, vcpu=computed.vcpu, io=computed.io))
    assert lists(again) == lists(computed)


# --- lists given by hand --------------------------------------------------------------------------------------------


def by_hand(topology: Topology, host: str = "", vcpu: str = "", io: str = "", *, force: bool = False) -> CpuPlan:
    return plan(topology, Wishes(host=parse(host), vcpu=parse(vcpu), io=parse(io), force=force))


def test_the_often_seen_split_is_refused_with_each_core_that_it_breaks(machine: Machines) -> None:
    reference = _topology.read(machine("coffee_lake_12_gpus"))
    with pytest.raises(PlanRefused) as refused:
        by_hand(reference, "0-1", "2-9", "10-11")
    assert refused.value.offenders == (
        "the core of CPUs 0,6 is split: 0 in HOST, 6 in VCPU",
        "the core of CPUs 1,7 is split: 1 in HOST, 7 in VCPU",
        "the core of CPUs 4,10 is split: 4 in VCPU, 10 in IO",
        "the core of CPUs 5,11 is split: 5 in VCPU, 11 in IO",
    )
    forced = by_hand(reference, "0-1", "2-9", "10-11", force=True)
    assert lists(forced) == ("0-1", "2-9", "10-11")
    assert sum(reason.startswith("forced: the core") for reason in forced.reasons) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0,6", "vcpu": "2-5,8-11", "io": "1-2,7-8"}, "CPUs 2,8 are in VCPU and in IO"),
        ({"host": "0,6", "io": "12-13"}, "IO: there is no CPU 12-13 (this machine has 0-11)"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_no_force_accepts(machine: Machines, given: dict[str, str], said: str, force: bool) -> None:
    with pytest.raises(PlanRefused) as refused:
        by_hand(_topology.read(machine("coffee_lake_12_gpus")), **given, force=force)
    assert refused.value.offenders == (said,)


def test_cpu_0_belongs_to_host(machine: Machines) -> None:
    reference = _topology.read(machine("coffee_lake_12_gpus"))
    with pytest.raises(PlanRefused, match="CPU 0 is not in HOST"):
        by_hand(reference, host="1,7")
    with pytest.raises(PlanRefused, match="CPU 0 is in VCPU"):
        by_hand(reference, vcpu="0-3,6-9")
    assert lists(by_hand(reference, "1,7", "2-5,8-11", "0,6", force=True)) == ("1,7", "2-5,8-11", "0,6")


def test_offline_cpus_are_named_and_left_out_when_forced(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    root.path("/sys/devices/system/cpu/online").write_text("0-10\n")
    topology = _topology.read(root)
    with pytest.raises(PlanRefused, match="VCPU: CPUs 11 are offline"):
        by_hand(topology, "0,6", "2-5,8-11", "1,7")
    assert lists(by_hand(topology, "0,6", "2-5,8-11", "1,7", force=True)) == ("0,6", "2-5,8-10", "1,7")
    with pytest.raises(PlanRefused, match="IO has no CPU that is online"):
        by_hand(topology, io="11", force=True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"vcpu": "2-5,8-11"}, ("0,6", "2-5,8-11", "1,7")),
        ({"io": "5,11"}, ("0,6", "1-4,7-10", "5,11")),
        ({"host": "0-1,6-7"}, ("0-1,6-7", "3-5,9-11", "2,8")),
        ({"vcpu": "4-5,10-11"}, ("0,2-3,6,8-9", "4-5,10-11", "1,7")),
        ({"host": "0,6", "io": "1,7"}, ("0,6", "2-5,8-11", "1,7")),
    ],
)
def test_zones_without_a_list_get_whole_cores(
    machine: Machines, given: dict[str, str], wanted: tuple[str, str, str]
) -> None:
    assert lists(by_hand(_topology.read(machine("coffee_lake_12_gpus")), **given)) == wanted


def test_cpus_in_no_zone_are_said(machine: Machines) -> None:
    made = by_hand(_topology.read(machine("coffee_lake_12_gpus")), "0,6", "2-4,8-10", "1,7")
    assert "CPUs 5,11 are in no zone: nothing is steered to them" in made.reasons


def test_lists_that_leave_nothing_are_refused(machine: Machines) -> None:
    with pytest.raises(PlanRefused, match="no whole core for IO"):
        by_hand(_topology.read(machine("coffee_lake_12_gpus")), host="0,6", vcpu="1-5,7-11")
