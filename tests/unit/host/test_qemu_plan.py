# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which CPU each vCPU gets, on the machines that the zones of the field's how-tos get wrong."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core._qemu import IOTHREAD, VCPU, Thread
from organism.core._qemu_plan import PinRefusedError, Zones, assign

# i7-8700K: siblings are N and N+6; core 0 is the host's, core 1 does input and output
COFFEE = Zones(
    vcpu=(2, 3, 4, 5, 8, 9, 10, 11), io=(1, 7), source="test", cores=tuple((n, n + 6) for n in range(6)),
    caches=(tuple(range(12)),), nodes=(tuple(range(12)),),
)  # fmt: skip
# two nodes with two caches of two cores each; core 0 of each node is not in the zone
EPYC = Zones(
    vcpu=tuple(cpu for cpu in range(16) if cpu not in (0, 1, 8, 9)), io=(1, 9), source="test",
    cores=tuple((2 * n, 2 * n + 1) for n in range(8)),
    caches=tuple(tuple(range(4 * n, 4 * n + 4)) for n in range(4)),
    nodes=(tuple(range(8)), tuple(range(8, 16))),
)  # fmt: skip


def guest(count: int, *, threads: int = 1) -> list[Thread]:
    """vCPUs as the monitor names them; Proxmox VE makes guests of one thread a core."""
    return [Thread(1000 + n, f"CPU {n}", VCPU, n, (0, 0, 0, 0, 0, 0, 0, n // threads)) for n in range(count)]


def test_each_vcpu_has_a_cpu_and_cores_are_shared_last() -> None:
    assert assign("VM 100", guest(4), COFFEE, {}) == {0: 2, 1: 3, 2: 4, 3: 5}
    assert assign("VM 100", guest(8), COFFEE, {}) == {0: 2, 1: 3, 2: 4, 3: 5, 4: 8, 5: 9, 6: 10, 7: 11}


def test_threads_of_a_guest_core_are_siblings() -> None:
    chosen = assign("VM 100", guest(8, threads=2), COFFEE, {})
    assert chosen == {0: 2, 1: 8, 2: 3, 3: 9, 4: 4, 5: 10, 6: 5, 7: 11}


def test_other_threads_are_none_of_its_business() -> None:
    assert assign("VM 100", [*guest(1), Thread(1, "io", IOTHREAD)], COFFEE, {}) == {0: 2}


def test_a_second_vm_takes_whole_cores_that_are_left() -> None:
    first = assign("VM 100", guest(2), COFFEE, {})
    second = assign("VM 101", guest(2), COFFEE, {"VM 100": list(first.values())})
    assert second == {0: 4, 1: 5}, "not the siblings of the first one's cores"
    third = assign("VM 102", guest(4), COFFEE, {"VM 100": list(first.values()), "VM 101": list(second.values())})
    assert set(third.values()) == {8, 9, 10, 11}


def test_more_vcpus_than_cpus_are_refused_with_what_to_declare() -> None:
    with pytest.raises(PinRefusedError) as refused:
        assign("VM 101", guest(4), COFFEE, {"VM 100": [2, 3, 4, 5, 8]})
    assert str(refused.value) == (
        "VM 101 has 4 vCPUs and the VCPU zone 2-5,8-11 (test) has 3 of 8 CPUs left (VM 100 holds 2-5,8): "
        "give it fewer vCPUs, enlarge the zone, or declare oversubscribe: 1.13 for it"
    )
    assert len(assign("VM 101", guest(4), COFFEE, {"VM 100": [2, 3, 4, 5, 8]}, 1.13)) == 4


def test_a_declared_ratio_is_a_limit_and_spreads_evenly() -> None:
    chosen = assign("VM 100", guest(16), COFFEE, {}, 2.0)
    assert set(Counter(chosen.values()).values()) == {2}
    with pytest.raises(PinRefusedError, match=r"has 17 vCPUs, and with oversubscribe 2 .* has room for 16 more"):
        assign("VM 100", guest(17), COFFEE, {}, 2.0)


def test_a_restarted_vm_keeps_its_cpus_unless_another_has_them() -> None:
    kept = {0: 11, 1: 10}
    assert assign("VM 100", guest(2), COFFEE, {}, keep=kept) == kept
    assert assign("VM 100", guest(3), COFFEE, {}, keep=kept) == {0: 11, 1: 10, 2: 2}, "a hot-plugged one joins them"
    assert assign("VM 100", guest(2), COFFEE, {"VM 101": [11]}, keep=kept) == {0: 2, 1: 10}
    assert assign("VM 100", guest(2), COFFEE, {}, keep={0: 0, 1: 10}) == {0: 2, 1: 10}, "0 is in no zone any more"


def test_a_vm_stays_within_a_cache_or_a_node_where_it_fits() -> None:
    assert set(assign("VM 100", guest(2), EPYC, {}).values()) == {2, 3}, "the smallest cache with room"
    assert set(assign("VM 100", guest(4), EPYC, {}).values()) == {4, 5, 6, 7}
    assert set(assign("VM 100", guest(6), EPYC, {}).values()) == {2, 3, 4, 5, 6, 7}, "one node"
    assert set(assign("VM 100", guest(6), EPYC, {"VM 101": [2]}).values()) == {10, 11, 12, 13, 14, 15}
    assert len(set(assign("VM 100", guest(12), EPYC, {}).values())) == 12


def test_an_empty_zone_is_refused() -> None:
    with pytest.raises(PinRefusedError, match=r"the VCPU zone \(empty\)"):
        assign("VM 100", guest(1), Zones((), (0,), "test"), {})


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([None, 1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([COFFEE, EPYC]),
    st.sampled_from([1, 2]),
)
def test_no_two_vms_share_a_cpu_unless_declared_and_no_ratio_is_exceeded(
    sizes: list[int], ratio: float | None, zones: Zones, threads: int
) -> None:
    used: dict[str, list[int]] = {}
    for number, size in enumerate(sizes):
        try:
            chosen = assign(f"VM {number}", guest(size, threads=threads), zones, used, ratio)
        except PinRefusedError:
            taken = sum(len(cpus) for cpus in used.values())
            assert taken + size > int(len(zones.vcpu) * (ratio or 1)), "refused though there was room"
            continue
        assert sorted(chosen) == list(range(size))
        used[f"VM {number}"] = list(chosen.values())
    load = Counter(cpu for cpus in used.values() for cpu in cpus)
    assert set(load) <= set(zones.vcpu)
    assert sum(load.values()) <= len(zones.vcpu) * (ratio or 1)
    assert max(load.values(), default=0) <= (1 if ratio is None else -(-int(ratio * 2) // 2))
