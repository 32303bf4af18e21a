# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the caches' agent hears and says. Times are seconds since 1970 (UTC)."""

from __future__ import annotations

from typing import Any

import msgspec

from organism.core._bus import is_identifier

WORK = ("sync", "prewarm")
UP = "gpu.cache.agent.up"
HEARTBEAT = "gpu.cache.heartbeat"
EVENT = "gpu.cache.event"
EVERY = "*"
"""In a request: each GPU of each host that hears it."""


def request_subject(work: str) -> str:
    return f"gpu.cache.{work}"


def outcome_subject(work: str, ok: bool) -> str:
    return f"gpu.cache.{work}.{'done' if ok else 'err'}"


class BadRequest(ValueError):
    """A request that cannot be understood; the text says why."""


class Request(msgspec.Struct, kw_only=True):
    """``{"gpu": "gpu0"}``. A number n means ``gpu<n>``; ``*`` all GPUs, each told of by itself, with one reply a host
    that has the outcomes of its GPUs in ``detail``."""

    gpu: str | int
    version: int = 1


class Outcome(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The end of a request: as the reply, and for all on ``gpu.cache.<work>.done`` or ``.err``.

    ``detail`` is what ``gpucache-ctl --json`` says of the GPU.
    """

    version: int = 1
    host: str
    gpu: str | None
    work: str
    ok: bool
    ts: float
    seconds: float = 0.0
    error: str = ""
    detail: dict[str, Any] = {}


class Event(msgspec.Struct, kw_only=True):
    """A cache's state has changed for the worse, or back (``ok``). ``kind``: ``high``, ``full``, ``no_space`` (a sync
    found no room), ``sync_failed``, ``not_quiescent``, ``off``, ``ok``."""

    version: int = 1
    host: str
    gpu: str
    ts: float
    kind: str
    text: str


def condition(status: dict[str, Any]) -> tuple[str, str]:
    """The kind of event that a cache's status is, the gravest first, and a line for people."""
    last = status.get("last_sync") or {}
    gpu = status["gpu"]
    if not status["overlay"]:
        return "off", f"{gpu} is not mounted"
    if last and not last.get("ok"):
        kind = "no_space" if last.get("no_space") else "sync_failed"
        return kind, f"{gpu}: {last.get('error', 'the last sync failed')}"
    if status["level"] in ("full", "high"):
        return status["level"], f"{gpu} is {status['used_percent']} % full"
    count = last.get("not_quiescent_count", 0)
    if count:
        names = ", ".join(last.get("not_quiescent", ())[:3])
        return "not_quiescent", f"{gpu}: {count} files are mapped for writing ({names}): saved, perhaps torn"
    return "ok", f"{gpu} is well"


class Up(msgspec.Struct, kw_only=True):
    """The agent has started."""

    version: int = 1
    host: str
    ts: float
    gpus: list[str]


class Beat(msgspec.Struct, kw_only=True):
    """A sign of life, and each cache's state as of ``status_age_s`` seconds ago (null: not known yet)."""

    version: int = 1
    host: str
    ts: float
    gpus: list[str]
    status: list[dict[str, Any]]
    status_age_s: float | None
    running: list[str]


_decoder = msgspec.json.Decoder(Request)
encode = msgspec.json.Encoder().encode


def read_request(data: bytes) -> str:
    """The GPU that a request names, or EVERY. Raises BadRequest."""
    try:
        gpu = _decoder.decode(data).gpu
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request is no {{'gpu': 'gpu0'}}: {error}") from None
    name = f"gpu{gpu}" if isinstance(gpu, int) else gpu
    if name != EVERY and not is_identifier(name):
        raise BadRequest(f"{name!r} is no GPU id")
    return name
