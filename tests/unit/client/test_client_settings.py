# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a client finds the bus: which source wins, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from organism.client import AsyncMaestro, MaestroError
from organism.core._client_settings import ClientSettings, ClientSettingsError, load


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def loaded(tmp_path: Path, system: str = "", user: str = "", environ: dict[str, str] | None = None) -> ClientSettings:
    system_file = str(tmp_path / "etc/client.toml")
    if system:
        written(tmp_path / "etc/client.toml", system)
    if user:
        written(tmp_path / "home/.config/organism/client.toml", user)
    return load(environ=environ or {}, home=tmp_path / "home", system_file=system_file)


def test_later_sources_win_setting_by_setting(tmp_path: Path) -> None:
    settings = loaded(
        tmp_path,
        system='servers = ["tls://bus:4222"]\nuser = "everyone"\nca_file = "/etc/ca.crt"',
        user='user = "alice"\nkind = "operator"',
        environ={"ORGANISM_NKEY_FILE": "/run/key", "ORGANISM_CA_FILE": ""},
    )
    assert settings == ClientSettings(
        servers=("tls://bus:4222",),
        user="alice",
        kind="operator",
        nkey_file="/run/key",
        ca_file="/etc/ca.crt",
        source="ORGANISM_NKEY_FILE",
    )
    assert settings.component.label == "operator.alice"


def test_the_environment_alone_is_enough(tmp_path: Path) -> None:
    settings = loaded(tmp_path, environ={"ORGANISM_BUS_URL": "nats://a:1, nats://b:2", "ORGANISM_USER": "bob"})
    assert settings.servers == ("nats://a:1", "nats://b:2")
    assert (settings.user, settings.kind, settings.nkey_file) == ("bob", "submitter", None)


def test_a_context_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORGANISM_USER", "somebody-else")
    name = written(tmp_path / "lab.toml", 'user = "olga"')
    assert load(name).user == "olga"
    assert load(name).servers == ("nats://127.0.0.1:4222",)


def test_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    name = written(tmp_path / "site/client.toml", 'user = "a"\nnkey_file = "keys/a.nk"\nca_file = "/ca.crt"')
    settings = load(name)
    assert settings.nkey_file == str(tmp_path / "site/keys/a.nk")
    assert settings.ca_file == "/ca.crt"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('servers = "bus:4222"\nuser = "a"', "must look like nats://host:4222"),
        ('servers = []\nuser = "a"', "servers must be a list"),
        ('servers = [1]\nuser = "a"', "servers must be a list"),
        ('server = "nats://bus"\nuser = "a"', "unknown setting 'server'"),
        ("user = 3", "user must be a text"),
        ('user = "a.b"', "user 'a.b' must match"),
        ('user = "a"\nkind = "admin"', "kind must be one of submitter, operator"),
        ("user = ", "is not TOML"),
        ("", "no user is set"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    name = written(tmp_path / "client.toml", text)
    with pytest.raises(ClientSettingsError, match=says) as caught:
        load(name)
    assert name in str(caught.value)


def test_a_missing_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientSettingsError, match=r"cannot read .*nowhere.toml: No such file"):
        load(str(tmp_path / "nowhere.toml"))


def test_without_any_file_the_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ClientSettingsError, match=r"etc/client.toml, .*home/.config/organism/client.toml, ORGANISM_USER"
    ):
        loaded(tmp_path)


def test_a_shard_is_chosen_as_the_other_settings_are(tmp_path: Path) -> None:
    assert loaded(tmp_path, environ={"ORGANISM_USER": "bob"}).shard == "0"
    assert loaded(tmp_path, environ={"ORGANISM_USER": "bob", "ORGANISM_SHARD": "b"}).shard == "b"
    named = tmp_path / "named.toml"
    named.write_text('user = "bob"\nshard = "night"\n')
    assert AsyncMaestro(context=str(named))._link.shard == "night"
    assert AsyncMaestro(context=str(named), shard="1")._link.shard == "1"
    with pytest.raises(MaestroError, match="the argument: shard 'a.b' must match"):
        AsyncMaestro(context=str(named), shard="a.b")
    with pytest.raises(ClientSettingsError, match="ORGANISM_SHARD: shard"):
        loaded(tmp_path, environ={"ORGANISM_USER": "bob", "ORGANISM_SHARD": "a b"})
