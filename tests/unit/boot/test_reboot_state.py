# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What waits for a reboot, and the proof that it came."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.organism.proxmox.plugins.modules import reboot_state

ENTRY = {"key": "isolcpus", "live": None, "coming": "isolcpus=2"}


@pytest.fixture
def host(tmp_path: Path, module_runner: Any) -> Callable[..., Any]:
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("one\n")
    (tmp_path / "run/organism/reboot-required.d").mkdir(parents=True)
    run = module_runner(reboot_state)

    def go(live: str, files: dict[str, str] | None = None, **arguments: Any) -> Any:
        (tmp_path / "proc/cmdline").write_text(live + "\n")
        for name, text in (files or {}).items():
            (tmp_path / "run/organism/reboot-required.d" / name).write_text(text)
        return run(**arguments)

    return go


def test_nothing_waits(host: Callable[..., Any]) -> None:
    found = host("root=/dev/a").result
    assert (found["changed"], found["required"], found["waiting"], found["boot_id"]) == (False, False, [], "one")


def test_parameters_and_other_reasons_wait_until_the_kernel_has_them(host: Callable[..., Any]) -> None:
    files = {"profile": json.dumps({"format": 1, "pending": [ENTRY]}), "firmware": "a newer BIOS\n", "empty": ""}
    found = host("root=/dev/a", files).result
    assert found["described"] == [
        "empty: asks for a reboot", "firmware: a newer BIOS", "profile: no isolcpus -> isolcpus=2"
    ]  # fmt: skip
    assert [entry["capability"] for entry in host("root=/dev/a isolcpus=2").result["waiting"]] == ["empty", "firmware"]


def test_the_proof(host: Callable[..., Any]) -> None:
    verify = [{"capability": "profile", **ENTRY}, {"capability": "firmware", "reason": "a newer BIOS"}]
    assert not host("root=/dev/a isolcpus=2", verify=verify, boot_id="zero").failed
    same = host("root=/dev/a isolcpus=2", verify=verify, boot_id="one")
    assert same.failed and "has not rebooted" in same.result["msg"]
    lost = host("root=/dev/a isolcpus=3", verify=verify, boot_id="zero")
    assert lost.failed and "isolcpus=2" in lost.result["msg"] and "isolcpus=3" in lost.result["msg"]
