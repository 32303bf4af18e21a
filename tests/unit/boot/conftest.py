# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run as Ansible runs them, on a folder that stands for the host, with commands that only take notes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args

from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


class Left(Exception):
    """How a module ended, in place of the process's end."""

    def __init__(self, failed: bool, result: dict[str, Any]) -> None:
        super().__init__(result)
        self.failed = failed
        self.result = result


@pytest.fixture
def module_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Callable[..., Left]]:
    """Given a module, a function that runs it on ``tmp_path`` with arguments, ``check`` and ``diff``."""

    def leave(failed: bool) -> Any:
        def exit_with(_module: basic.AnsibleModule, *_positional: object, **result: Any) -> None:
            raise Left(failed, result)

        return exit_with

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", leave(failed=False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", leave(failed=True))

    def of(module: ModuleType) -> Callable[..., Left]:
        monkeypatch.setattr(module, "Root", lambda: Root(tmp_path))

        def run(check: bool = False, diff: bool = False, **arguments: Any) -> Left:
            with (
                patch_module_args({**arguments, "_ansible_check_mode": check, "_ansible_diff": diff}),
                pytest.raises(Left) as end,
            ):
                module.main()
            return end.value

        return run

    return of


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its path; folders end in a slash."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): "" if path.is_dir() else path.read_text()
        for path in sorted(folder.rglob("*"))
    }
