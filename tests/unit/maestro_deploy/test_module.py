# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module as Ansible runs it, on a folder that stands for the host and with a systemd that keeps its promises."""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible.module_utils.testing import patch_module_args

from ansible_collections.organism.proxmox.plugins.module_utils import _maestro_deploy
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, UnitState
from ansible_collections.organism.proxmox.plugins.modules import maestro_deploy

ME = pwd.getpwuid(os.getuid()).pw_name
MINE = grp.getgrgid(os.getgid()).gr_name


class Left(Exception):
    """How a module ended, in place of the process's end."""

    def __init__(self, failed: bool, result: dict[str, Any]) -> None:
        super().__init__(result)
        self.failed = failed
        self.result = result


class Systemd:
    """One unit, and what was asked of it."""

    def __init__(self) -> None:
        self.unit = UnitState(_maestro_deploy.UNIT)
        self.calls: list[str] = []
        self.fails = ""

    def state(self, _name: str) -> UnitState:
        return self.unit

    def explain(self, _name: str) -> str:
        return "CA_FILE: no such file"

    def call(self, verb: str, *_names: str) -> None:
        self.calls.append(verb)
        if verb == self.fails:
            raise CommandError(f"`systemctl {verb}` ended with 1")
        changes: dict[str, dict[str, Any]] = {
            "start": {"active": "active"},
            "stop": {"active": "inactive"},
            "enable": {"unit_file": "enabled", "load": "loaded"},
            "disable": {"unit_file": "disabled"},
        }
        self.unit = dataclasses.replace(self.unit, **changes.get(verb, {}))


@pytest.fixture
def systemd() -> Systemd:
    return Systemd()


@pytest.fixture
def commands() -> list[list[str]]:
    return []


@pytest.fixture
def host(tmp_path: Path, systemd: Systemd, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    def leave(failed: bool) -> Any:
        def exit_with(_module: basic.AnsibleModule, *_positional: object, **result: Any) -> None:
            raise Left(failed, result)

        return exit_with

    def run(argv: list[str], **_options: Any) -> str:
        commands.append(argv)
        return '{"ok": true, "version": "0.1.0"}'

    monkeypatch.setattr(basic.AnsibleModule, "exit_json", leave(failed=False))
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", leave(failed=True))
    monkeypatch.setattr(maestro_deploy, "Root", lambda: Root(tmp_path))
    monkeypatch.setattr(maestro_deploy, "Systemctl", lambda: systemd)
    monkeypatch.setattr(maestro_deploy, "run_command", run)
    # whoever runs the tests stands for root
    monkeypatch.setattr(
        maestro_deploy, "File", lambda text, mode=0o644, _o="", _g="": _maestro_deploy.File(text, mode, ME, MINE)
    )
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (tmp_path / "opt/organism/venv-1/bin").mkdir(parents=True)
    (tmp_path / "opt/organism/venv-1/bin/organism-maestro").write_text("")
    (tmp_path / "opt/organism/venv").symlink_to("venv-1")
    return tmp_path


CONTEXT = {"path": "/etc/organism/client.toml", "servers": ["tls://a:4222"], "user": "admin", "kind": "operator"}


def deploy(check: bool = False, **arguments: Any) -> Left:
    given = {
        "settings": {"MAX_TEMP_C": 75},
        "contexts": [CONTEXT],
        "health_context": CONTEXT["path"],
        **arguments,
        "_ansible_check_mode": check,
        "_ansible_diff": True,
    }
    with patch_module_args(given), pytest.raises(Left) as end:
        maestro_deploy.main()
    return end.value


def everything(host: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in (host / "etc").rglob("*") if path.is_file()}


def test_a_first_deployment_and_a_second_that_changes_nothing(
    host: Path, systemd: Systemd, commands: list[list[str]]
) -> None:
    first = deploy()
    assert not first.failed, first.result
    assert first.result["changed"] is True
    assert first.result["info"] == {"ok": True, "version": "0.1.0"}
    assert "MAX_TEMP_C=75" in (host / "etc/organism/maestro.conf").read_text()
    assert systemd.calls == ["daemon-reload", "enable", "start"]
    assert commands[0][1:] == ["--check-config"], "the daemon reads the new settings before anything is written"
    before = everything(host)
    second = deploy()
    assert second.result["changed"] is False
    assert second.result["restarted"] == []
    assert systemd.calls == ["daemon-reload", "enable", "start"]
    assert everything(host) == before


def test_a_changed_setting_restarts(host: Path, systemd: Systemd) -> None:
    deploy()
    systemd.calls.clear()
    changed = deploy(settings={"MAX_TEMP_C": 70})
    assert changed.result["restarted"] == ["/etc/organism/maestro.conf changed"]
    assert systemd.calls == ["restart"]


def test_check_mode_predicts_the_same_and_does_nothing(host: Path, systemd: Systemd, commands: list[list[str]]) -> None:
    predicted = deploy(check=True)
    assert predicted.result["changed"] is True
    assert not (host / "etc").exists()
    assert systemd.calls == []
    assert commands == []
    assert deploy().result["diff"] == predicted.result["diff"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"settings": {"MAX_TEMPC": 70}}, "did you mean MAX_TEMP_C"),
        ({"settings": {"HEARTBEAT_TTL_SEC": 2}}, "LEASE_TTL_SEC (6) must not be above HEARTBEAT_TTL_SEC (2)"),
        ({"types": ["Shell!"]}, "does not match"),
        ({"operators": ["a.b"]}, "does not match"),
    ],
)
def test_what_is_refused_is_named_and_changes_nothing(
    host: Path, systemd: Systemd, arguments: dict[str, Any], told: str
) -> None:
    deploy()
    before = everything(host)
    systemd.calls.clear()
    refused = deploy(**arguments)
    assert refused.failed
    assert told in refused.result["msg"]
    assert everything(host) == before
    assert systemd.calls == []


def test_without_the_runtime_it_says_what_to_run_first(host: Path) -> None:
    (host / "opt/organism/venv").unlink()
    refused = deploy()
    assert refused.failed
    assert "run level 7 on this host first" in refused.result["msg"]
    assert not (host / "etc").exists()


def test_a_conductor_that_does_not_start_is_told_with_its_last_words(host: Path, systemd: Systemd) -> None:
    systemd.fails = "start"
    failed = deploy()
    assert failed.failed
    assert "CA_FILE: no such file" in failed.result["msg"]
    systemd.fails = ""
    assert not deploy().failed, "the next run makes it good"
    assert systemd.unit.active == "active"


def test_an_unknown_owner_is_refused_before_anything_is_written(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maestro_deploy, "File", _maestro_deploy.File)
    refused = deploy(contexts=[{**CONTEXT, "owner": "nobody-of-that-name"}])
    assert refused.failed
    assert "create the account" in refused.result["msg"]
    assert not (host / "etc").exists()


def test_absent_removes_everything_and_then_has_nothing_to_do(host: Path, systemd: Systemd) -> None:
    deploy()
    systemd.calls.clear()
    assert deploy(check=True, state="absent").result["changed"] is True
    assert systemd.calls == []
    assert deploy(state="absent").result["changed"] is True
    assert systemd.calls == ["disable", "stop", "daemon-reload"]
    assert everything(host) == {}
    systemd.unit = UnitState(_maestro_deploy.UNIT)
    assert deploy(state="absent").result["changed"] is False
