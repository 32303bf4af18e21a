# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose CPUs: given lists, the stored plan, the plan that a check foretells; and what systemd is told."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from unit.steer.trees import write

from organism.core import _cpu_plan, _sdnotify, _steer_zones
from organism.core._root import Root
from organism.core._steer_zones import ZonesMissing


def stored(top: Path) -> Root:
    write(top / _cpu_plan.PATH.lstrip("/"), _cpu_plan.CpuPlan(host=(0, 6), vcpu=(2, 3), io=(1, 7)).text())
    return Root(top)


def test_lists_win_over_the_stored_plan(tmp_path: Path) -> None:
    given = {"host": None, "vcpu": "", "io": "4-5"}
    assert _steer_zones.zones(stored(tmp_path), given, ("host", "io"), check=False) == {
        "host": (0, 6),
        "vcpu": (2, 3),
        "io": (4, 5),
    }


def test_without_a_plan_the_options_are_named_and_enough(tmp_path: Path) -> None:
    with pytest.raises(ZonesMissing, match=r"run level 1 .cpu_plan. first, or give host_cpus, io_cpus"):
        _steer_zones.zones(Root(tmp_path), {}, ("host", "io"), check=False)
    assert _steer_zones.zones(Root(tmp_path), {"io": "1"}, ("io",), check=False) == {"io": (1,)}


def test_a_check_foretells_the_plan_that_is_pending(tmp_path: Path) -> None:
    for cpu in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        for name in ("thread_siblings_list", "core_cpus_list"):
            write(topology / name, str(cpu))
    for name in ("online", "present", "possible"):
        write(tmp_path / f"sys/devices/system/cpu/{name}", "0-7")
    found = _steer_zones.zones(Root(tmp_path), {}, ("host", "io"), check=True)
    assert 0 in found["host"] and found["io"] and not set(found["io"]) & set(found["host"])


def test_systemd_is_told_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not _sdnotify.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "n"))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        assert _sdnotify.notify("READY=1", "STATUS=x")
        assert listener.recv(100) == b"READY=1\nSTATUS=x"
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert _sdnotify.watchdog_interval() is None
    monkeypatch.delenv("WATCHDOG_PID")
    assert _sdnotify.watchdog_interval() == 1.5
