# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a client finds the bus and who it is: ``client.toml`` and the environment.

    servers = ["tls://bus.example.org:4222"]
    user = "admin"                    # the name that the key was issued for
    kind = "operator"                 # or "submitter" (default)
    nkey_file = "admin.nk"            # relative to this file's directory; leave out where the bus asks for no key
    ca_file = "/etc/organism/ca.crt"  # leave out for a bus without TLS
    shard = "0"                       # the share of the queue to work with; leave out where there is one

Later sources win, setting by setting: ``/etc/organism/client.toml``, ``~/.config/organism/client.toml``, then the
environment (``ORGANISM_BUS_URL`` with commas between several, ``ORGANISM_USER``, ``ORGANISM_KIND``,
``ORGANISM_NKEY_FILE``, ``ORGANISM_CA_FILE``, ``ORGANISM_SHARD``). A file named with ``--context`` is read alone:
what it says is meant.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import _bus

SYSTEM_FILE = "/etc/organism/client.toml"
USER_FILE = ".config/organism/client.toml"
DEFAULT_SERVER = "nats://127.0.0.1:4222"
KINDS = ("submitter", "operator")
ENVIRONMENT = {
    "ORGANISM_BUS_URL": "servers",
    "ORGANISM_USER": "user",
    "ORGANISM_KIND": "kind",
    "ORGANISM_NKEY_FILE": "nkey_file",
    "ORGANISM_CA_FILE": "ca_file",
    "ORGANISM_SHARD": "shard",
}
SCHEMES = ("nats", "tls", "ws", "wss")


class ClientSettingsError(ValueError):
    """Settings that cannot be used; the text names the file or variable and what to write there."""


@dataclass(frozen=True)
class ClientSettings:
    """Checked settings. ``source`` says for people where the last of them came from."""

    servers: tuple[str, ...] = (DEFAULT_SERVER,)
    user: str = ""
    kind: str = "submitter"
    nkey_file: str | None = None
    ca_file: str | None = None
    shard: str = _bus.DEFAULT_SHARD
    source: str = "the defaults"

    @property
    def component(self) -> _bus.Component:
        """Whose permissions the connection has; its label gives the private inbox."""
        return _bus.Component(self.kind, self.user)


def load(
    context: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    home: Path | None = None,
    system_file: str = SYSTEM_FILE,
) -> ClientSettings:
    """The settings in force. Raises ClientSettingsError.

    ``context`` is the path of a file to be read alone; ``environ``, ``home`` and ``system_file`` are for tests.
    """
    settings = ClientSettings()
    if context is not None:
        return _complete(_merge(settings, _read(Path(context)), context), [context])
    environ = os.environ if environ is None else environ
    home = Path.home() if home is None else home
    looked_at = [system_file, str(home / USER_FILE)]
    for name in looked_at:
        path = Path(name)
        if path.exists():
            settings = _merge(settings, _read(path), name)
    for variable, key in ENVIRONMENT.items():
        text = environ.get(variable)
        if text:
            value: object = [part.strip() for part in text.split(",")] if key == "servers" else text
            settings = _merge(settings, {key: value}, variable)
    return _complete(settings, [*looked_at, "ORGANISM_USER"])


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ClientSettingsError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClientSettingsError(f"{path} is not TOML: {error}") from error


def _merge(settings: ClientSettings, given: Mapping[str, object], source: str) -> ClientSettings:
    changes: dict[str, object] = {}
    for key, value in given.items():
        if key == "servers":
            changes[key] = _servers(value, source)
        elif key not in ("user", "kind", "nkey_file", "ca_file", "shard"):
            raise ClientSettingsError(
                f"{source}: unknown setting {key!r}; known: servers, user, kind, nkey_file, ca_file, shard"
            )
        elif not isinstance(value, str) or not value:
            raise ClientSettingsError(f"{source}: {key} must be a text, not {value!r}")
        elif key.endswith("_file"):
            changes[key] = _path(value, source)
        else:
            changes[key] = value
    if not changes:
        return settings
    return replace(settings, **changes, source=source)  # type: ignore[arg-type]  # the keys are the fields' names


def _servers(value: object, source: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(url, str) for url in value):
        raise ClientSettingsError(f'{source}: servers must be a list such as ["nats://127.0.0.1:4222"], not {value!r}')
    for url in value:
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in SCHEMES or not rest:
            raise ClientSettingsError(f"{source}: server {url!r} must look like nats://host:4222 or tls://host:4222")
    return tuple(value)


def _path(value: str, source: str) -> str:
    path = Path(value).expanduser()
    if not path.is_absolute() and source not in ENVIRONMENT:
        path = Path(source).absolute().parent / path
    return str(path)


def _complete(settings: ClientSettings, looked_at: list[str]) -> ClientSettings:
    if not settings.user:
        raise ClientSettingsError(f'no user is set: looked at {", ".join(looked_at)}; write user = "NAME" there')
    if not _bus.is_identifier(settings.user):
        raise ClientSettingsError(f"{settings.source}: user {settings.user!r} must match {_bus.IDENTIFIER.pattern}")
    if settings.kind not in KINDS:
        raise ClientSettingsError(f"{settings.source}: kind must be one of {', '.join(KINDS)}, not {settings.kind!r}")
    return in_shard(settings, settings.shard, settings.source)


def in_shard(settings: ClientSettings, shard: str, source: str) -> ClientSettings:
    """The same settings for another shard. Raises ClientSettingsError for one that can be none."""
    if not _bus.is_identifier(shard):
        raise ClientSettingsError(f"{source}: shard {shard!r} must match {_bus.IDENTIFIER.pattern}")
    return replace(settings, shard=shard)
