# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module, run as Ansible runs it, on a folder that stands for the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args

from ansible_collections.organism.proxmox.plugins.module_utils import _levels
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.modules import level_marker


class Left(Exception):
    """How a module ended, in place of the process's end."""

    def __init__(self, failed: bool, result: dict[str, Any]) -> None:
        super().__init__(result)
        self.failed = failed
        self.result = result


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def leave(failed: bool) -> Any:
        def exit_with(_module: basic.AnsibleModule, *_positional: object, **result: Any) -> None:
            raise Left(failed, result)

        return exit_with

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", leave(failed=False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", leave(failed=True))
    monkeypatch.setattr(level_marker, "Root", lambda: Root(tmp_path))
    return tmp_path


def run(check: bool = False, diff: bool = False, **arguments: Any) -> Left:
    with (
        patch_module_args({**arguments, "_ansible_check_mode": check, "_ansible_diff": diff}),
        pytest.raises(Left) as end,
    ):
        level_marker.main()
    return end.value


def test_present_is_recorded_once_and_keeps_its_time(host: Path) -> None:
    first = run(level=0)
    assert first.result["changed"] is True
    written = (host / "etc/organism/levels/0.json").read_text()
    again = run(level=0)
    assert again.result["changed"] is False
    assert again.result["marker"] == first.result["marker"]
    assert (host / "etc/organism/levels/0.json").read_text() == written


def test_another_version_is_recorded_anew(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(level=0)
    monkeypatch.setattr(_levels, "COLLECTION_VERSION", "0.2.0")
    assert run(level=0).result["marker"]["version"] == "0.2.0"
    assert run(level=0).result["changed"] is False


def test_check_mode_predicts_and_writes_nothing(host: Path) -> None:
    predicted = run(level=0, check=True, diff=True)
    assert predicted.result["changed"] is True
    assert '"level": 0' in predicted.result["diff"]["after"]
    assert list(host.iterdir()) == []


def test_required_refuses_then_allows(host: Path) -> None:
    refused = run(level=7, state="required", groups=["bus"])
    assert refused.failed
    assert "--tags level0" in refused.result["msg"]
    run(level=0)
    allowed = run(level=7, state="required", groups=["bus"])
    assert not allowed.failed
    assert allowed.result["changed"] is False


def test_a_level_that_went_before_in_this_run_counts_in_check_mode_only(host: Path) -> None:
    arguments: dict[str, Any] = {"level": 7, "state": "required", "groups": ["bus"], "pending": [0]}
    assert not run(check=True, **arguments).failed
    assert run(check=False, **arguments).failed


def test_a_damaged_marker_proves_nothing(host: Path) -> None:
    run(level=0)
    (host / "etc/organism/levels/0.json").write_text("{")
    assert run(level=7, state="required", groups=["bus"]).failed


def test_a_partial_run_is_not_recorded(host: Path) -> None:
    partial = run(level=7, skipped_tags=["gpucache"])
    assert partial.result["changed"] is False
    assert "gpucache" in partial.result["msg"]
    assert not (host / "etc").exists()


def test_absent_forgets(host: Path) -> None:
    run(level=0)
    assert run(level=0, state="absent", check=True).result["changed"] is True
    assert (host / "etc/organism/levels/0.json").exists()
    assert run(level=0, state="absent").result["changed"] is True
    assert run(level=0, state="absent").result["changed"] is False
    assert run(level=7, state="required", groups=["bus"]).failed


def test_an_unknown_level_is_refused(host: Path) -> None:
    assert "level 5 does not exist" in run(level=5).result["msg"]
