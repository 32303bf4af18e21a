# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""maestro.conf and policy.toml: what they say, what they used to say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from organism.core import _maestro_settings, _policy
from organism.core._keyvalue import SettingsError
from organism.core._root import Root
from organism.maestro import daemon

FIRST_GENERATION = """
NATS_URL=nats://10.0.0.2:4222
HEARTBEAT_TTL_SEC=15
METRICS_TTL_SEC=15
SCHEDULE_TICK_SEC=0.2
MAX_TEMP_C=78
MAX_BUSY_PERCENT=95
DEFAULT_TIMEOUT_SEC=3600
MAX_RETRIES=2
RETRY_BACKOFF_SEC=2
MAX_QUEUE=10000
SUBMIT_SUBJECT=gpu.task.enqueue
RUN_SUBJECT=gpu.task.run
DONE_SUBJECT=gpu.task.done
ERR_SUBJECT=gpu.task.err
WORKER_HEARTBEAT_SUBJECT=gpu.worker.heartbeat
WORKER_METRICS_SUBJECT=gpu.worker.metrics
MAESTRO_UP_SUBJECT=maestro.up
MAESTRO_HEARTBEAT_SUBJECT=maestro.heartbeat
MAESTRO_STATE_SUBJECT=maestro.state
RESULT_PREFIX=gpu.task.result.
STATE_PREFIX=gpu.task.state.
"""


def test_a_file_of_the_first_generation_is_read_and_each_dead_key_is_named() -> None:
    """S1l-D05: an upgrade neither fails on an old key nor on a missing new one."""
    loaded = _maestro_settings.parse(FIRST_GENERATION, "maestro.conf")
    assert loaded.settings.words("NATS_URL") == ["nats://10.0.0.2:4222"]
    assert loaded.settings.number("RETRY_BACKOFF_SEC") == 2
    assert loaded.settings.number("LEASE_TTL_SEC") == 6
    assert len(loaded.notices) == 12
    assert loaded.notices[0].startswith("maestro.conf:5: SCHEDULE_TICK_SEC is no longer used")


def test_the_documented_defaults() -> None:
    """S1k-002..011, S1l."""
    settings = _maestro_settings.parse("").settings
    expected = {
        "NATS_URL": ["nats://127.0.0.1:4222"],
        "HEARTBEAT_TTL_SEC": 15,
        "METRICS_TTL_SEC": 15,
        "MAX_TEMP_C": 78,
        "MAX_BUSY_PERCENT": 95,
        "DEFAULT_TIMEOUT_SEC": 3600,
        "MAX_RETRIES": 2,
        "RETRY_BACKOFF_SEC": 1,
        "MAX_QUEUE": 10000,
        "MAX_LOST": 5,
        "LEASE_TTL_SEC": 6,
        "SHARD": ["0"],
    }
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("MAX_QUEU=3", "did you mean MAX_QUEUE"),
        ("MAX_QUEUE=0", "least"),
        ("SHARD=a.b", "does not match"),
        ("NATS_URL=http://x:1", "does not match"),
        ("LEASE_TTL_SEC=20", "must not be above HEARTBEAT_TTL_SEC"),
        ("NKEY_FILE=key", "absolute"),
    ],
)
def test_what_is_wrong_is_named(text: str, word: str) -> None:
    with pytest.raises(SettingsError, match=word) as caught:
        _maestro_settings.parse(f"\nSCHEDULE_TICK_SEC=1\n{text}", "conf")
    assert "TTL" in text or caught.value.problems[0].startswith("conf:3:")


@pytest.mark.parametrize(("text", "shards"), [("SHARD=1", ["1"]), ("SHARD=b,a", ["b", "a"])])
def test_shards_keep_their_order(text: str, shards: list[str]) -> None:
    settings = _maestro_settings.parse(text).settings
    assert settings.words("SHARD") == shards
    assert _maestro_settings.parse(_maestro_settings.SCHEMA.render(settings)).settings == settings


@pytest.mark.parametrize("text", ["SHARD=1,0,1", "SHARD="])
def test_there_is_a_shard_and_none_twice(text: str) -> None:
    with pytest.raises(SettingsError, match="at least one shard, and none twice"):
        _maestro_settings.parse(text)


def test_what_is_rendered_is_read_again() -> None:
    settings = _maestro_settings.coerce({"MAX_QUEUE": 5, "NATS_URL": ["tls://a:4222", "tls://b:4222"]}).settings
    assert _maestro_settings.parse(_maestro_settings.SCHEMA.render(settings)).settings == settings


def test_a_worker_must_stop_before_its_job_is_given_away() -> None:
    settings = _maestro_settings.parse("HEARTBEAT_TTL_SEC=10").settings
    assert _maestro_settings.worker_lease(settings) == 6


def test_the_policy_is_safe_without_a_file(tmp_path: Path) -> None:
    policy = _policy.load(Root(tmp_path))
    assert policy.allows("cmd")
    assert policy.allows("noop")
    assert not policy.allows("shell")
    assert policy.is_operator("admin")
    assert "not allowed" in policy.refusal("shell")


def test_the_policy_says_what_may_run_and_who_steers() -> None:
    policy = _policy.parse('[jobs]\ntypes = ["shell"]\n[users]\noperators = []\n')
    assert policy.allows("shell")
    assert not policy.allows("cmd")
    assert not policy.is_operator("admin")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("jobs = 1", "must be a section"),
        ("[job]\n", "unknown section"),
        ("[jobs]\ntype = []", "no key type"),
        ('[jobs]\ntypes = "cmd"', "list of texts"),
        ('[jobs]\ntypes = ["CMD"]', "does not match"),
        ('[users]\noperators = ["a b"]', "does not match"),
        ("[jobs", "not TOML"),
    ],
)
def test_a_policy_with_a_mistake_is_refused(text: str, word: str) -> None:
    with pytest.raises(_policy.PolicyError, match=word):
        _policy.parse(text)


def test_check_config_ends_with_0_or_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf, policy = tmp_path / "maestro.conf", tmp_path / "policy.toml"
    conf.write_text(f"POLICY_FILE={policy}\nNAME=a\n")
    assert daemon.main(["--check-config", "--config", str(conf)]) == 0
    policy.write_text("[jobs]\nkinds = []\n")
    assert daemon.main(["--check-config", "--config", str(conf)]) == 2
    assert "no key kinds" in capsys.readouterr().err
    assert daemon.main(["--check-config", "--config", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
