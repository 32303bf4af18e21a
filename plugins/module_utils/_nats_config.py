# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole configuration file of nats-server, from a few settings. Pure: settings in, text out.

PRIVATE to the organism.proxmox collection.

Rules and their sources: ``sync_interval: always`` since the default loses every acknowledged message of the last two
minutes at a power cut (measured; nats-server issue 7564); keys and allow-lists only, nobody anonymous; monitoring on
loopback, since it has no authentication; routes between servers authenticated by certificate in both directions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import _bus, _nkey

MAX_PAYLOAD = 8 * _bus.MIB
MIN_FILE_STORE = 256 * _bus.MIB
"""Below this the product's streams cannot hold a day's work of one GPU."""


@dataclass(frozen=True)
class Member:
    """A component and the public half of its key (``U...``)."""

    component: _bus.Component
    public_key: str


@dataclass(frozen=True)
class Tls:
    """PEM files on the server's machine."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True)
class Cluster:
    """``routes`` are the other servers' ``host:port``."""

    name: str
    routes: tuple[str, ...]
    host: str = "0.0.0.0"  # noqa: S104  # the other nodes must reach it; certificates decide who may
    port: int = 6222


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes."""

    server_name: str
    store_dir: str
    max_file_store: int
    members: tuple[Member, ...]
    host: str = "127.0.0.1"
    port: int = 4222
    http_port: int | None = 8222
    """Monitoring, on 127.0.0.1 only; None turns it off."""
    max_payload: int = MAX_PAYLOAD
    max_connections: int = 1024
    tls: Tls | None = None
    cluster: Cluster | None = None
    lame_duck_seconds: int = 30
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further top-level keys of the server's own configuration; none that is set here."""


def members(rows: Iterable[Mapping[str, Any]]) -> tuple[Member, ...]:
    """Members from rows of ``kind``, ``name`` and ``public_key``, sorted. Raises ValueError naming the bad row.

    The same row twice counts once (each node of a cluster tells all it knows); two keys for one component, or one key
    for two components, are refused: the first would let a forgotten key live on, the second let one act as the other.
    """
    found: dict[_bus.Component, str] = {}
    for row in rows:
        try:
            component = _bus.Component(str(row["kind"]), str(row["name"]))
            key = str(row["public_key"])
        except KeyError as error:
            raise ValueError(f"component {dict(row)!r} lacks {error}") from None
        _bus.permissions(component)  # refuses an unknown kind or an unfit name
        if not _nkey.is_public(key):
            raise ValueError(f"{component.label}: {key!r} is not a user's public nkey (56 characters, U first)")
        if found.setdefault(component, key) != key:
            raise ValueError(f"{component.label} has two public keys, {found[component]} and {key}; keep one")
    owners: dict[str, _bus.Component] = {}
    for component, key in found.items():
        other = owners.setdefault(key, component)
        if other != component:
            raise ValueError(f"{component.label} and {other.label} have the same public key {key}; each needs its own")
    return tuple(Member(component, found[component]) for component in sorted(found, key=lambda one: one.label))


def render(settings: Settings) -> str:
    """The text of the configuration file. Raises ValueError when it would be open, clear-text between machines, or
    too small."""
    if not settings.members:
        raise ValueError("no component has a key: such a server would let anybody in")
    if settings.max_file_store < MIN_FILE_STORE:
        raise ValueError(f"max_file_store {settings.max_file_store} is below {MIN_FILE_STORE} bytes")
    if settings.cluster is not None and settings.tls is None:
        raise ValueError("a cluster needs TLS: routes are authenticated by certificate")
    document: dict[str, Any] = {
        "server_name": settings.server_name,
        "host": settings.host,
        "port": settings.port,
        "max_payload": settings.max_payload,
        "max_connections": settings.max_connections,
        "lame_duck_duration": f"{settings.lame_duck_seconds}s",
        "lame_duck_grace_period": "1s",
        # a peer that vanished without a word is noticed within a minute
        "ping_interval": "20s",
        "ping_max": 2,
        "jetstream": {
            "store_dir": settings.store_dir,
            "max_file_store": settings.max_file_store,
            "max_memory_store": 64 * _bus.MIB,
            "sync_interval": "always",
        },
    }
    if settings.http_port is not None:
        document["http"] = f"127.0.0.1:{settings.http_port}"
    if settings.tls is not None:
        document["tls"] = {"cert_file": settings.tls.cert, "key_file": settings.tls.key, "timeout": 5}
    if settings.cluster is not None and settings.tls is not None:
        document["cluster"] = _cluster(settings.cluster, settings.tls)
    taken = sorted(set(settings.extra) & {*document, "authorization", "accounts", "no_auth_user"})
    if taken:
        raise ValueError(f"extra settings may not replace {', '.join(taken)}")
    document.update(settings.extra)
    lines = [
        "# Managed by Ansible (organism.proxmox, role nats): changes made here are lost.",
        *(f"{key}: {json.dumps(value)}" for key, value in document.items()),
        "authorization: {",
        "  timeout: 5",
        "  users: [",
    ]
    for member in settings.members:
        permissions = json.dumps(_bus.permissions(member.component))
        lines.append(f"    # {member.component.label}")
        lines.append(f'    {{"nkey": "{member.public_key}", "permissions": {permissions}}}')
    lines += ["  ]", "}", ""]
    return "\n".join(lines)


def _cluster(cluster: Cluster, tls: Tls) -> dict[str, Any]:
    return {
        "name": cluster.name,
        "host": cluster.host,
        "port": cluster.port,
        "routes": [f"tls://{route}" for route in cluster.routes],
        # clients know all servers from the inventory; gossiped addresses would not match the certificates' names
        "no_advertise": True,
        "tls": {"cert_file": tls.cert, "key_file": tls.key, "ca_file": tls.ca, "verify": True, "timeout": 5},
    }


def replicas_for(servers: int) -> int:
    """Copies of each stream for a cluster of so many servers. Raises ValueError for a size that helps nobody.

    Two servers stop when either is away; more than five only cost.
    """
    if servers in (1, 3, 4, 5):
        return {1: 1, 3: 3, 4: 3, 5: 5}[servers]
    raise ValueError(f"a bus has 1, 3, 4 or 5 servers, not {servers}")


def room(disk_bytes: int, share: float, limits: _bus.Limits | None = None) -> int:
    """``max_file_store`` for a disk of this size: ``share`` of it, and not more than the streams can use.

    A full disk stops the server until it is restarted, so the store's own limit has to be reached first. Raises
    ValueError for a disk that is too small.
    """
    limits = limits or _bus.Limits()
    wanted = min(int(disk_bytes * share), limits.total * 10 // 8)
    if wanted < MIN_FILE_STORE:
        raise ValueError(
            f"{share:.0%} of a disk of {disk_bytes // _bus.MIB} MiB are less than the {MIN_FILE_STORE // _bus.MIB} MiB "
            f"that the bus needs; put its store on a larger one"
        )
    return wanted // _bus.MIB * _bus.MIB


def fitted(limits: _bus.Limits, max_file_store: int) -> _bus.Limits:
    """The limits, all sizes scaled down alike when their sum would not fit into nine tenths of the store.

    The bucket of leases keeps its size: it is small, and no conductor could lead without it. Raises ValueError for a
    store below MIN_FILE_STORE.
    """
    if max_file_store < MIN_FILE_STORE:
        raise ValueError(f"max_file_store {max_file_store} is below {MIN_FILE_STORE} bytes")
    budget = max_file_store * 9 // 10
    if limits.total <= budget:
        return limits
    factor = (budget - limits.control_bytes) / (limits.total - limits.control_bytes)
    if factor <= 0:
        raise ValueError(
            f"control_bytes {limits.control_bytes} alone do not fit into a store of {max_file_store} bytes"
        )
    scaled = {
        name: max(_bus.MIB, int(getattr(limits, name) * factor) // _bus.MIB * _bus.MIB)
        for name in (
            "queue_bytes",
            "results_bytes",
            "events_bytes",
            "dead_bytes",
            "telemetry_bytes",
            "jobs_bytes",
            "logs_bytes",
        )
    }
    return replace(limits, **scaled)
