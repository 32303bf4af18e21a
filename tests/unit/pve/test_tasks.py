# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for tasks: by deadline, with the end of the log, over an API that comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from organism.core._pve_client import PveError, PveForbidden, PveTaskFailed, PveTimeout, PveUnreachable
from organism.core._pve_tasks import is_upid, parse_upid, wait

UPID = "UPID:pve1:0000C0DE:0001E240:6B02B50D:qmstart:100:ansible@pve!t:"
RUNNING = {"status": "running"}
LOG = [{"n": n, "t": f"line {n}"} for n in range(1, 31)]


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def api(*answers: Any) -> Callable[..., Any]:
    """One answer for each question after the status; the last one stays."""
    left = list(answers)

    def get(path: str, **_params: Any) -> Any:
        if path.endswith("/log"):
            return LOG
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return get


def waited(get: Callable[..., Any], timeout: float = 10.0) -> Any:
    clock = Clock()
    return wait(get, UPID, timeout, clock=clock, sleep=clock.sleep)


def stopped(exitstatus: str) -> dict[str, str]:
    return {"status": "stopped", "exitstatus": exitstatus}


def test_the_parts_of_a_upid() -> None:
    upid = parse_upid(UPID)
    assert (upid.node, upid.type, upid.id, upid.user) == ("pve1", "qmstart", "100", "ansible@pve!t")
    assert upid.path == f"/nodes/pve1/tasks/{UPID}"
    assert not upid.only_a_request and parse_upid(UPID.replace("qmstart", "hastart")).only_a_request
    assert is_upid(UPID) and not is_upid("UPID:x") and not is_upid(None)
    with pytest.raises(PveError, match="no task id"):
        parse_upid("OK")


def test_success_and_warnings() -> None:
    assert waited(api(RUNNING, RUNNING, stopped("OK"))).warnings == 0
    warned = waited(api(stopped("WARNINGS: 2")))
    assert warned.warnings == 2 and warned.log[-1] == "line 30"


@pytest.mark.parametrize(
    "exitstatus", ["unexpected status", "start failed: QEMU exited with code 1", "", "WARNINGS: x"]
)
def test_failure_shows_the_end_of_the_log(exitstatus: str) -> None:
    with pytest.raises(PveTaskFailed, match="line 30") as caught:
        waited(api(RUNNING, stopped(exitstatus)))
    assert caught.value.exitstatus == exitstatus
    assert caught.value.log == tuple(f"line {n}" for n in range(19, 31))
    assert "task qmstart 100 on pve1" in str(caught.value)


def test_the_deadline() -> None:
    with pytest.raises(PveTimeout, match="did not end within 10 s") as caught:
        waited(api(RUNNING))
    assert "line 30" in str(caught.value) and "pvesh delete" in str(caught.value)


def test_an_api_that_restarts_is_asked_again() -> None:
    gone = PveUnreachable("pve1:8006 cannot be reached")
    assert waited(api(RUNNING, gone, gone, stopped("OK"))).exitstatus == "OK"
    with pytest.raises(PveTimeout, match="is unknown, for pve1:8006 cannot be reached"):
        waited(api(RUNNING, gone))


def test_other_refusals_end_the_waiting_at_once() -> None:
    with pytest.raises(PveForbidden):
        waited(api(PveForbidden("no")))
