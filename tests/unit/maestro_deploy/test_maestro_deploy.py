# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deploying the conductor: what is refused, what restarts it, and what is left alone."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from organism.core import _client_settings, _maestro_deploy, _maestro_settings, _policy
from organism.core._maestro_deploy import CONFIG, POLICY, UNIT, UNIT_FILE, DeployRefusedError, File, Service
from organism.core._root import Root
from organism.core._systemd import Systemctl, UnitState, parse_show

RUNNING = UnitState(UNIT, load="loaded", active="active", sub="running", unit_file="enabled", main_pid=77)


def wanted(**settings: object) -> dict[str, File]:
    return {
        CONFIG: File(_maestro_deploy.render_config(settings)[0]),
        POLICY: File(_maestro_deploy.render_policy(["cmd"], ["admin"])),
        UNIT_FILE: File(_maestro_deploy.UNIT_TEXT),
    }


def present(files: dict[str, File], written: float = 100.0) -> dict[str, File | None]:
    return {path: dataclasses.replace(file, written=written) for path, file in files.items()}


def running(**facts: object) -> Service:
    return dataclasses.replace(Service(RUNNING, "venv-1", "venv-1", 200.0), **facts)  # type: ignore[arg-type] # facts are fields


def test_the_daemon_reads_what_is_rendered() -> None:
    text, notices = _maestro_deploy.render_config({"MAX_TEMP_C": 70, "NATS_URL": ["tls://a:4222", "tls://b:4222"]})
    settings = _maestro_settings.parse(text).settings
    assert settings["MAX_TEMP_C"] == 70
    assert settings.words("NATS_URL") == ["tls://a:4222", "tls://b:4222"]
    assert notices == ()


def test_every_bad_setting_is_named_and_nothing_is_rendered() -> None:
    with pytest.raises(DeployRefusedError) as refusal:
        _maestro_deploy.render_config({"MAX_TEMPC": 70, "MAX_QUEUE": 0})
    told = str(refusal.value)
    assert "MAX_TEMPC; did you mean MAX_TEMP_C?" in told
    assert "MAX_QUEUE is 0, the least is 1" in told


def test_a_setting_of_the_first_generation_is_noticed_and_not_refused() -> None:
    _, notices = _maestro_deploy.render_config({"STREAM_WQ": "ORG_WQ"})
    assert len(notices) == 1
    assert "STREAM_WQ is no longer used" in notices[0]


def test_the_policy_that_is_rendered_is_the_policy_that_is_read() -> None:
    policy = _policy.parse(_maestro_deploy.render_policy(["cmd", "shell"], ["ann", "bob"]))
    assert policy.allows("shell")
    assert not policy.allows("noop")
    assert policy.is_operator("bob")
    with pytest.raises(DeployRefusedError, match="does not match"):
        _maestro_deploy.render_policy(["rm -rf"], [])


def test_clients_read_the_context_that_is_rendered(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    context = {
        "path": str(path), "servers": ["tls://a:4222"], "user": "admin", "kind": "operator",
        "nkey_file": "/etc/organism/keys/operator-admin.nk", "ca_file": None,
    }  # fmt: skip
    path.write_text(_maestro_deploy.render_context(context))
    read = _client_settings.load(str(path))
    assert (read.servers, read.user, read.kind) == (("tls://a:4222",), "admin", "operator")
    assert read.nkey_file == "/etc/organism/keys/operator-admin.nk"
    assert read.ca_file is None


def test_a_context_names_its_shard_only_where_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "client.toml"
    given = {"path": str(path), "servers": ["tls://a:4222"], "user": "bob", "kind": "submitter"}
    for shard, shown in (("0", False), ("night", True)):
        path.write_text(_maestro_deploy.render_context({**given, "shard": shard}))
        assert ("shard" in path.read_text()) is shown  # an older client refuses what it does not know
        assert _client_settings.load(str(path)).shard == shard
    with pytest.raises(_maestro_deploy.DeployRefusedError, match="shard 'a.b' must match"):
        _maestro_deploy.render_context({**given, "shard": "a.b"})


def test_a_first_deployment_creates_and_starts_without_calling_it_a_restart() -> None:
    want = wanted()
    plan = _maestro_deploy.plan_present(dict.fromkeys(want), want, Service())
    assert set(plan.writes) == set(want)
    assert plan.restart == ()
    assert f"change {UNIT}: state: inactive -> running" in plan.difference.message


def test_a_second_run_changes_nothing() -> None:
    want = wanted()
    plan = _maestro_deploy.plan_present(present(want), want, running())
    assert not plan.difference
    assert plan.writes == {}
    assert plan.restart == ()


def test_a_changed_setting_restarts_with_the_reason() -> None:
    plan = _maestro_deploy.plan_present(present(wanted()), wanted(MAX_TEMP_C=70), running())
    assert set(plan.writes) == {CONFIG}
    assert plan.restart == (f"{CONFIG} changed",)


def test_another_runtime_restarts_with_the_reason() -> None:
    want = wanted()
    plan = _maestro_deploy.plan_present(present(want), want, running(installed="venv-2"))
    assert plan.writes == {}
    assert plan.restart == ("it runs venv-1, installed is venv-2",)
    assert plan.difference.changed


def test_a_run_cut_short_between_writing_and_restarting_is_made_good() -> None:
    want = wanted()
    plan = _maestro_deploy.plan_present(present(want, written=300.0), want, running())
    assert plan.writes == {}
    assert len(plan.restart) == 3
    assert plan.difference.changed


def test_a_changed_context_needs_no_restart() -> None:
    want = {**wanted(), "/etc/organism/client.toml": File("new")}
    have = present({**wanted(), "/etc/organism/client.toml": File("old")})
    plan = _maestro_deploy.plan_present(have, want, running())
    assert set(plan.writes) == {"/etc/organism/client.toml"}
    assert plan.restart == ()


def test_a_wrong_mode_or_owner_is_put_right() -> None:
    want = wanted()
    have = present(want)
    have[CONFIG] = dataclasses.replace(want[CONFIG], mode=0o666, owner="organism")
    plan = _maestro_deploy.plan_present(have, want, running())
    assert set(plan.writes) == {CONFIG}
    assert "0666 -> 0644" in plan.difference.message
    assert plan.restart == ()


def test_absent_stops_disables_and_removes_then_has_nothing_to_do() -> None:
    plan = _maestro_deploy.plan_absent(present(wanted()), running())
    assert set(plan.removes) == {CONFIG, POLICY, UNIT_FILE}
    assert "running -> stopped" in plan.difference.message
    assert not _maestro_deploy.plan_absent(dict.fromkeys(wanted()), Service()).difference


def test_files_are_read_and_written_whole(tmp_path: Path) -> None:
    root = Root(tmp_path)
    owner = Path(tmp_path).stat()
    file = File("text\n", 0o640)
    _maestro_deploy.write_files(root, {CONFIG: file}, {CONFIG: (owner.st_uid, owner.st_gid)})
    found = _maestro_deploy.read_files(root, [CONFIG, POLICY])
    assert found[POLICY] is None
    read = found[CONFIG]
    assert read is not None
    assert (read.content, read.mode) == ("text\n", 0o640)
    _maestro_deploy.remove_files(root, [CONFIG])
    assert not root.exists(CONFIG)


def test_what_systemctl_shows_is_understood() -> None:
    shown = (
        "Id=maestro.service\nLoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\n"
        "MainPID=77\nNeedDaemonReload=no\nResult=success\n\nId=x.service\nLoadState=not-found\nActiveState=inactive\n"
        "SubState=dead\nUnitFileState=\nMainPID=0\nNeedDaemonReload=yes\nResult=success\n"
    )
    first, second = parse_show(shown)
    assert first == RUNNING
    assert (second.enabled, second.running, second.needs_reload) == (False, False, True)
    asked: list[list[str]] = []

    def run(argv: list[str]) -> str:
        asked.append(argv)
        return shown if argv[1] == "show" else "maestro.service loaded active running Maestro\n"

    assert Systemctl(run).matching(["maestro*"])["maestro.service"] == RUNNING
    assert asked[0][1] == "list-units"
    assert asked[1][-1] == "maestro.service"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    # the daemon itself is not installed on the machine that tests
    text = _maestro_deploy.UNIT_TEXT.replace(f"ExecStart={_maestro_deploy.DAEMON}", "ExecStart=/bin/true")
    assert "ExecStart=/bin/true" in text
    unit = tmp_path / UNIT
    unit.write_text(text)
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, check=False, timeout=60)
    ours = [line for line in done.stderr.splitlines() if UNIT in line]
    assert ours == []
