# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The conductor on a host: its files, its unit, and what has to be done to have them as wanted.

Stopping a conductor loses nothing: the state of all jobs lies on the bus, SIGTERM hands the lease over, and workers go
on. So an upgrade is a restart, done only when something that the daemon reads at its start has changed.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import _bus, _client_settings, _limits, _maestro_settings, _policy
from ._atomic import write_atomic
from ._difference import ABSENT, Difference
from ._root import Root
from ._runtime import CURRENT, TOP
from ._systemd import UnitState, venv_of

UNIT = "maestro.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
CONFIG = _maestro_settings.DEFAULT_PATH
POLICY = _policy.DEFAULT_PATH
LIMITS = _limits.DEFAULT_PATH
DAEMON = f"{CURRENT}/bin/organism-maestro"
CLIENT = f"{CURRENT}/bin/maestroctl"
USER = "organism"
READ_AT_START = (CONFIG, POLICY, LIMITS, UNIT_FILE)

_MANAGED = "Managed by Ansible (organism.proxmox, maestro_deploy): changes made here are lost."

UNIT_TEXT = f"""\
# {_MANAGED}
# Own settings belong into a drop-in: systemctl edit {UNIT}
[Unit]
Description=Maestro, the conductor of the GPU pool
Wants=network-online.target
After=network-online.target nats-server.service
# it may fail as long as the bus is away, and must never give up
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={DAEMON}
Environment={_maestro_settings.PATH_VARIABLE}={CONFIG}
User={USER}
Group={USER}
Nice=-5
Restart=always
RestartSec=1
WatchdogSec=30
TimeoutStopSec=20
LimitNOFILE=16384
UMask=0077
# state lies on the bus: it needs to write nowhere
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
CapabilityBoundingSet=
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""


class DeployRefusedError(Exception):
    """The conductor cannot be brought to the wanted state; ``reasons`` has a line each, fit to be printed."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("; ".join(self.reasons))


@dataclass(frozen=True)
class File:
    """A file: owner and group are names, mode a number; ``written`` (seconds since 1970) is known of present ones."""

    content: str
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"
    written: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Service:
    """What is true of the unit now; None where it is unknown.

    ``runs`` and ``installed`` are names of the runtime's environments, ``started`` is a time in seconds since 1970.
    """

    unit: UnitState = field(default_factory=lambda: UnitState(UNIT))
    runs: str | None = None
    installed: str | None = None
    started: float | None = None


@dataclass(frozen=True)
class Plan:
    """``restart`` says why the running daemon has to be started anew; empty when it may go on."""

    difference: Difference
    writes: Mapping[str, File]
    removes: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


def render_config(settings: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """The text of ``maestro.conf``, and notices about retired keys. Raises DeployRefusedError naming bad settings."""
    try:
        loaded = _maestro_settings.coerce(settings, "settings")
    except _maestro_settings.SettingsError as error:
        raise DeployRefusedError(error.problems) from None
    return _maestro_settings.SCHEMA.render(loaded.settings, [_MANAGED]), loaded.notices


def render_policy(types: Iterable[str], operators: Iterable[str]) -> str:
    """The text of ``policy.toml``. Raises DeployRefusedError. (A JSON list of plain texts is a TOML list.)"""
    text = (
        f"# {_MANAGED}\n"
        '# Types of job that may run here; "shell" hands users a shell.\n'
        f"[jobs]\ntypes = {json.dumps(sorted(set(types)))}\n\n"
        "# Users who may see and steer everyone's jobs.\n"
        f"[users]\noperators = {json.dumps(sorted(set(operators)))}\n"
    )
    try:
        _policy.parse(text, "policy")
    except _policy.PolicyError as error:
        raise DeployRefusedError(error.problems) from None
    return text


def render_limits(limits: Mapping[str, object]) -> str:
    """The text of ``limits.toml``. Raises DeployRefusedError naming every unfit entry.

    JSON's texts, numbers and lists of them are TOML's. An empty mapping is a file without limits.
    """
    lines = [f"# {_MANAGED}", "# What each user may have: of the user, else of the group, else the default."]
    unfit = []
    tables: list[tuple[str, object]] = [("defaults", limits.get("defaults", {}))]
    for section in ("groups", "users"):
        content = limits.get(section, {})
        if isinstance(content, dict):
            tables += [(f"{section}.{name}", table) for name, table in content.items()]
        else:
            unfit.append(f"limits: {section} must hold a mapping for each name")
    unfit += [f"limits: no section {name}" for name in limits if name not in ("defaults", "groups", "users")]
    for name, table in tables:
        if not isinstance(table, dict):
            unfit.append(f"limits: {name} must be a mapping")
        elif table:
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    text = "\n".join(lines) + "\n"
    if unfit:
        raise DeployRefusedError(unfit)
    try:
        _limits.parse(text, "limits")
    except _limits.LimitsError as error:
        raise DeployRefusedError(error.problems) from None
    return text


def render_context(context: Mapping[str, object]) -> str:
    """The text of a ``client.toml``. Raises DeployRefusedError when no client could use it."""
    keys = [key for key in ("servers", "user", "kind", "nkey_file", "ca_file") if context.get(key)]
    lines = [f"# {_MANAGED}", *(f"{key} = {json.dumps(context[key])}" for key in keys)]
    shard = str(context.get("shard") or _bus.DEFAULT_SHARD)
    if not _bus.is_identifier(shard):
        raise DeployRefusedError([f"{context['path']}: shard {shard!r} must match {_bus.IDENTIFIER.pattern}"])
    if shard != _bus.DEFAULT_SHARD:
        lines.append(f"shard = {json.dumps(shard)}")
    if context.get("kind") not in _client_settings.KINDS:
        raise DeployRefusedError([f"{context['path']}: kind is one of {', '.join(_client_settings.KINDS)}"])
    return "\n".join(lines) + "\n"


def read_files(root: Root, paths: Iterable[str]) -> dict[str, File | None]:
    """The files as they are; owners that have no name are shown as numbers."""
    found: dict[str, File | None] = {}
    for path in paths:
        real = root.path(path)
        if not real.exists():
            found[path] = None
            continue
        status = real.stat()
        found[path] = File(
            content=real.read_text(encoding="utf-8", errors="replace"),
            mode=status.st_mode & 0o7777,
            owner=_name(real, "owner", status.st_uid),
            group=_name(real, "group", status.st_gid),
            written=status.st_mtime,
        )
    return found


def _name(path: Path, kind: str, number: int) -> str:
    try:
        return path.owner() if kind == "owner" else path.group()
    except KeyError:
        return str(number)


def read_service(root: Root, unit: UnitState) -> Service:
    """Adds to a unit's state which environment its process runs from, and which one is installed."""
    running = venv_of(root, unit.main_pid)
    return Service(
        unit,
        runs=running.removeprefix(f"{TOP}/") if running else None,
        installed=root.link_name(CURRENT),
        started=start_time(root, unit.main_pid),
    )


def _newer(file: File, service: Service) -> bool:
    # a second of slack: the start is known to 10 ms, and the clock may have been corrected by a little
    return service.unit.running and service.started is not None and file.written > service.started + 1


def start_time(root: Root, pid: int) -> float | None:
    """When a process started, in seconds since 1970 (proc(5): field 22 of stat, in clock ticks since boot)."""
    text = root.read_or_none(f"/proc/{pid}/stat") if pid > 0 else None
    if text is None:
        return None
    ticks = int(text.rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def plan_present(have: Mapping[str, File | None], want: Mapping[str, File], service: Service) -> Plan:
    """From the present files and unit to the wanted ones, enabled and running."""
    difference = Difference()
    writes: dict[str, File] = {}
    reasons: list[str] = []
    for path, file in want.items():
        present = have.get(path)
        before = Difference()
        before.add(path, present.content if present else ABSENT, file.content)
        if before.changed and path in READ_AT_START:
            reasons.append(f"{path} changed")
        elif present is not None and path in READ_AT_START and _newer(present, service):
            # an earlier run wrote it and was cut short before the restart
            reasons.append(f"{path} was written after it had started")
            before.add(f"{UNIT}: has read {path}", "no", "yes")
        if present is not None:
            before.add(f"{path}: mode", f"{present.mode:04o}", f"{file.mode:04o}")
            before.add(f"{path}: owner", f"{present.owner}:{present.group}", f"{file.owner}:{file.group}")
        if present is None or file != present:
            writes[path] = file
        difference.merge(before)
    if service.unit.running and service.runs and service.installed and service.runs != service.installed:
        reasons.append(f"it runs {service.runs}, installed is {service.installed}")
        difference.add(f"{UNIT}: runtime", service.runs, service.installed)
    difference.add(f"{UNIT}: enabled", service.unit.enabled, True)
    difference.add(f"{UNIT}: state", "running" if service.unit.running else service.unit.active, "running")
    return Plan(difference, writes, restart=tuple(reasons) if service.unit.running else ())


def plan_absent(have: Mapping[str, File | None], service: Service) -> Plan:
    """Stop, disable and remove; what lies on the bus stays there."""
    difference = Difference()
    for path, present in have.items():
        difference.add(path, present.content if present else ABSENT, ABSENT)
    if service.unit.load not in ("not-found", ""):
        difference.add(f"{UNIT}: enabled", service.unit.enabled, False)
        difference.add(f"{UNIT}: state", "running" if service.unit.running else "stopped", "stopped")
    return Plan(difference, {}, removes=tuple(path for path, present in have.items() if present))


def write_files(root: Root, files: Mapping[str, File], ids: Mapping[str, tuple[int, int]]) -> None:
    """Write files whole, each with its owner (``ids``: path -> uid, gid) before it is visible. Raises OSError."""
    for path, file in files.items():
        real = root.path(path)
        real.parent.mkdir(parents=True, exist_ok=True)
        uid, gid = ids[path]
        write_atomic(real, file.content, mode=file.mode, uid=uid, gid=gid)


def remove_files(root: Root, paths: Iterable[str]) -> None:
    """Remove files. Raises OSError."""
    for path in paths:
        root.path(path).unlink()
