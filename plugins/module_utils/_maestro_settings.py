# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conductor's settings file ``maestro.conf``: one schema for the daemon, the module and the role.

A file of the first generation (core NATS, fixed subjects) is still read: what the bus declaration replaced is accepted
and named in a notice, so that an upgrade neither stops with an unknown key nor ignores one in silence.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import _bus
from ._keyvalue import Key, Schema, Settings, SettingsError

DEFAULT_PATH = "/etc/organism/maestro.conf"
PATH_VARIABLE = "MAESTRO_CONF"
"""Environment variable that names another file."""

LEASE_SHARE = 0.6
"""Part of HEARTBEAT_TTL_SEC that a worker's lease lasts; the rest is its time to stop a job before it is given away."""

_SUBJECTS = "subjects and streams are fixed in the bus declaration (organism-bus streams)"
RETIRED = {
    "SCHEDULE_TICK_SEC": "the scheduler acts on events and has no tick",
    "SUBMIT_SUBJECT": _SUBJECTS,
    "RUN_SUBJECT": _SUBJECTS,
    "DONE_SUBJECT": _SUBJECTS,
    "ERR_SUBJECT": _SUBJECTS,
    "WORKER_HEARTBEAT_SUBJECT": _SUBJECTS,
    "WORKER_METRICS_SUBJECT": _SUBJECTS,
    "MAESTRO_UP_SUBJECT": _SUBJECTS,
    "MAESTRO_HEARTBEAT_SUBJECT": _SUBJECTS,
    "MAESTRO_STATE_SUBJECT": _SUBJECTS,
    "RESULT_PREFIX": _SUBJECTS,
    "STATE_PREFIX": _SUBJECTS,
    "STREAM_WQ": _SUBJECTS,
    "STREAM_EVENTS": _SUBJECTS,
    "ENQ_SUBJECT": _SUBJECTS,
    "RUN_SUBJECT_PREFIX": _SUBJECTS,
    "CONSUMER_ENQ": "the conductor tails the stream and needs no durable consumer",
    "MAESTRO_UP": _SUBJECTS,
    "MAESTRO_HEARTBEAT": _SUBJECTS,
}
"""Keys of earlier versions -> what took their place."""


def _consistent(settings: Settings) -> Iterable[str]:
    shards = settings.words("SHARD")
    if not shards or len(set(shards)) != len(shards):
        yield f"SHARD ({','.join(shards)}) must name at least one shard, and none twice"
    ttl, lease = settings.number("HEARTBEAT_TTL_SEC"), settings.number("LEASE_TTL_SEC")
    if lease > ttl:
        # a standby must take over before the workers' leases end, or each takeover would stop running jobs
        yield f"LEASE_TTL_SEC ({lease:g}) must not be above HEARTBEAT_TTL_SEC ({ttl:g})"


SCHEMA = Schema(
    "maestro",
    [
        Key(
            "NATS_URL",
            "list",
            ["nats://127.0.0.1:4222"],
            "Servers of the bus, comma-separated.",
            pattern=r"(nats|tls)://[A-Za-z0-9_.:\[\]-]+",
        ),
        Key(
            "NKEY_FILE",
            "path",
            "",
            "Seed of the conductor's key; empty: the bus asks for none (lab only).",
            optional=True,
        ),
        Key("CA_FILE", "path", "", "Certificate authority of the bus; empty: no TLS.", optional=True),
        Key(
            "NAME",
            "text",
            "",
            "Name of this conductor, as in its credentials; empty: the host's name.",
            pattern=_bus.IDENTIFIER.pattern,
            optional=True,
        ),
        Key(
            "SHARD",
            "list",
            [_bus.DEFAULT_SHARD],
            "Which shares of the queue to conduct, comma-separated: the first as soon as nobody does, each further one "
            "when it has been without a conductor for a while.",
            pattern=_bus.IDENTIFIER.pattern,
        ),
        Key(
            "LEASE_TTL_SEC", "number", 6.0, "A standby takes over after this silence, seconds.", minimum=1, maximum=600
        ),
        Key(
            "HEARTBEAT_TTL_SEC",
            "number",
            15.0,
            "A worker silent for this long is dead and its job is given to another GPU, seconds.",
            minimum=1,
            maximum=3600,
        ),
        Key(
            "METRICS_TTL_SEC",
            "number",
            15.0,
            "Metrics older than this are stale: 30 points worse, seconds.",
            minimum=1,
            maximum=3600,
        ),
        Key("MAX_TEMP_C", "number", 78.0, "A hotter GPU gets no new job, degrees Celsius.", minimum=1, maximum=150),
        Key("MAX_BUSY_PERCENT", "number", 95.0, "A busier GPU gets no new job, percent.", minimum=0, maximum=100),
        Key(
            "DEFAULT_TIMEOUT_SEC",
            "number",
            3600.0,
            "Time limit of a job that names none, seconds.",
            minimum=1,
            maximum=30 * 86400,
        ),
        Key(
            "TIMEOUT_GRACE_SEC",
            "number",
            60.0,
            "A worker that has not ended a job this long after its time limit is overruled, seconds.",
            minimum=1,
            maximum=86400,
        ),
        Key("MAX_RETRIES", "integer", 2, "Further tries of a failed job that names no number.", minimum=0, maximum=100),
        Key(
            "MAX_LOST",
            "integer",
            5,
            "A job lost with its worker more often than this is dead.",
            minimum=0,
            maximum=1000,
        ),
        Key(
            "RETRY_BACKOFF_SEC",
            "number",
            1.0,
            "Wait before the first retry, seconds; doubled for each further one.",
            minimum=0,
            maximum=3600,
        ),
        Key(
            "AGING_PER_HOUR",
            "number",
            0.0,
            "Points of priority that an hour of waiting is worth; 0: priorities are strict.",
            minimum=0,
            maximum=1000,
        ),
        Key(
            "FAIR_SHARE_HALF_LIFE_SEC",
            "number",
            3600.0,
            "Among equal priorities users who have used less go first; use counts half after so many seconds. 0: off.",
            minimum=0,
            maximum=30 * 86_400,
        ),
        Key(
            "RETRY_BACKOFF_MAX_SEC",
            "number",
            300.0,
            "Longest wait before a retry, seconds.",
            minimum=0,
            maximum=86_400,
        ),
        Key("MAX_QUEUE", "integer", 10000, "Unfinished jobs; more are refused.", minimum=1, maximum=10_000_000),
        Key(
            "WAIT_GPU_SEC",
            "number",
            5.0,
            "A job that waits longer for a busy GPU is announced as waiting_gpu, seconds.",
            minimum=0,
            maximum=3600,
        ),
        Key(
            "POLICY_FILE",
            "path",
            "/etc/organism/policy.toml",
            "What may run and who may steer; safe defaults when absent.",
        ),
        Key("LIMITS_FILE", "path", "/etc/organism/limits.toml", "What each user may have; no limits when absent."),
        Key(
            "METRICS_PORT",
            "integer",
            0,
            "Port of 127.0.0.1 with metrics for Prometheus at /metrics; 0: none.",
            minimum=0,
            maximum=65535,
        ),
        Key("LOG_FORMAT", "choice", "text", "How to write the log.", choices=("text", "json")),
        Key("LOG_LEVEL", "choice", "info", "What to log.", choices=("debug", "info", "warning", "error")),
    ],
    checks=[_consistent],
)

_RETIRED_LINE = re.compile(rf"\s*({'|'.join(RETIRED)})=")


@dataclass(frozen=True)
class Loaded:
    """Settings, and a line for people about each key that no longer does anything."""

    settings: Settings
    notices: tuple[str, ...] = ()


def parse(text: str, where: str = DEFAULT_PATH) -> Loaded:
    """The settings in a file's text. Raises SettingsError that names every bad line."""
    kept: list[str] = []
    notices: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        match = _RETIRED_LINE.match(line)
        if match is None:
            kept.append(line)
            continue
        kept.append("")  # keeps the line numbers of the errors right
        notices.append(f"{where}:{number}: {match[1]} is no longer used: {RETIRED[match[1]]}; remove the line")
    return Loaded(SCHEMA.parse("\n".join(kept), where), tuple(notices))


def coerce(given: Mapping[str, object], where: str = "settings") -> Loaded:
    """The same from a mapping such as a role's variable. Raises SettingsError."""
    notices = tuple(f"{where}: {name} is no longer used: {why}" for name, why in RETIRED.items() if name in given)
    settings = SCHEMA.coerce({name: value for name, value in given.items() if name not in RETIRED}, where)
    return Loaded(settings, notices)


def worker_lease(settings: Settings) -> float:
    """Seconds that the answer to a heartbeat lets a worker run jobs."""
    return settings.number("HEARTBEAT_TTL_SEC") * LEASE_SHARE


__all__ = [
    "DEFAULT_PATH",
    "PATH_VARIABLE",
    "RETIRED",
    "SCHEMA",
    "Loaded",
    "SettingsError",
    "coerce",
    "parse",
    "worker_lease",
]
