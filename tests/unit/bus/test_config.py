# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the server's configuration must never be, and how sizes follow the disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from organism.core import _bus, _nats_config, _nkey

KEY_A = "UAXKO4OZPO7LC4VQFJ5EO4QXPIIW3BLTWXNPYDSA2UAEHY7ZPDW4MPNT"
ROWS = [{"kind": "worker", "name": "gpu0", "public_key": KEY_A}]


def settings(**options: object) -> _nats_config.Settings:
    base = _nats_config.Settings("bus1", "/var/lib/nats", 1024 * _bus.MIB, ())
    return replace(base, **options)  # type: ignore[arg-type]  # keyword arguments of a test


@pytest.fixture(autouse=True)
def any_key_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nkey, "is_public", lambda text: text.startswith("U"))


def test_each_component_gets_its_own_permissions_and_nobody_is_anonymous() -> None:
    text = _nats_config.render(settings(members=_nats_config.members(ROWS)))
    assert 'sync_interval": "always' in text
    assert 'http: "127.0.0.1:8222"' in text
    assert "no_auth_user" not in text
    line = next(line for line in text.splitlines() if KEY_A in line)
    user = json.loads(line)
    assert user["permissions"] == _bus.permissions(_bus.Component("worker", "gpu0"))


def test_a_server_that_would_let_anybody_in_is_not_written() -> None:
    with pytest.raises(ValueError, match="let anybody in"):
        _nats_config.render(settings(members=()))


def test_a_cluster_in_clear_text_is_not_written() -> None:
    members = _nats_config.members(ROWS)
    cluster = _nats_config.Cluster("organism", ("b:6222",))
    with pytest.raises(ValueError, match="needs TLS"):
        _nats_config.render(settings(members=members, cluster=cluster))
    text = _nats_config.render(settings(members=members, cluster=cluster, tls=_nats_config.Tls("c", "k", "a")))
    assert '"verify": true' in text


@pytest.mark.parametrize("key", ["jetstream", "authorization", "no_auth_user", "accounts", "port"])
def test_extra_settings_cannot_undo_what_the_product_needs(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        _nats_config.render(settings(members=_nats_config.members(ROWS), extra={key: {}}))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([*ROWS, {"kind": "worker", "name": "gpu0", "public_key": "U2"}], "two public keys"),
        ([*ROWS, {"kind": "worker", "name": "gpu1", "public_key": KEY_A}], "same public key"),
        ([{"kind": "worker", "name": "a b", "public_key": KEY_A}], "name of a worker"),
        ([{"kind": "king", "name": "a", "public_key": KEY_A}], "unknown kind"),
        ([{"kind": "worker", "name": "gpu0", "public_key": "None"}], "not a user's public nkey"),
        ([{"kind": "worker", "name": "gpu0"}], "lacks 'public_key'"),
    ],
)
def test_bad_rows_are_named(rows: list[dict[str, str]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _nats_config.members(rows)


def test_the_same_row_from_two_hosts_counts_once() -> None:
    assert _nats_config.members([*ROWS, *ROWS]) == _nats_config.members(ROWS)


@pytest.mark.parametrize("kind", _bus.KINDS)
def test_no_kind_may_publish_everything_or_listen_to_everything(kind: str) -> None:
    block = _bus.permissions(_bus.Component(kind, "x1"))
    for side in ("publish", "subscribe"):
        allowed = block[side]["allow"]
        assert allowed, "nats-server takes an empty list for everything"
        assert not {">", "*", "*.>", "_INBOX.>", "$JS.>"} & set(allowed)


@given(st.integers(300 * _bus.MIB, 4 * 1024 * 1024 * _bus.MIB), st.floats(0.1, 0.9))
def test_the_streams_always_fit_into_the_store_and_the_store_into_its_share(disk: int, share: float) -> None:
    if disk * share < _nats_config.MIN_FILE_STORE:
        with pytest.raises(ValueError, match="larger"):
            _nats_config.room(disk, share)
        return
    if int(disk * share) // _bus.MIB * _bus.MIB < _nats_config.MIN_FILE_STORE:
        return
    store = _nats_config.room(disk, share)
    limits = _nats_config.fitted(_bus.Limits(), store)
    assert limits.total <= store <= disk * share
    assert limits.logs_bytes <= limits.queue_bytes
    assert limits.results_age == _bus.Limits().results_age


def test_long_outputs_are_gone_before_an_id_can_come_again_and_never_stop_a_job() -> None:
    streams = _bus.topology().streams
    outputs, results = streams[_bus.STREAM_LOGS], streams[_bus.STREAM_RESULTS]
    assert 0 < outputs["max_age"] < results["max_age"]
    assert (outputs["discard"], outputs["max_msgs_per_subject"]) == ("old", 1)
    assert 0 < outputs["max_bytes"] < results["max_bytes"]


def test_replicas_follow_the_number_of_servers() -> None:
    assert [_nats_config.replicas_for(count) for count in (1, 3, 4, 5)] == [1, 3, 3, 5]
    for count in (0, 2, 6):
        with pytest.raises(ValueError, match="1, 3, 4 or 5"):
            _nats_config.replicas_for(count)
