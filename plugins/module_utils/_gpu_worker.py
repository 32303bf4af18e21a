# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPU workers of a host: settings, policy, the template unit, pinning drop-ins and one service a GPU.

A worker is restarted only when something that it reads at its start has changed, and one after the other, each ready
before the next goes: the pool shrinks by one GPU at a time, and a running job gets STOP_GRACE_SEC to finish.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from . import _gpu_map, _policy
from . import _worker_settings as worker_settings
from ._difference import ABSENT, Difference
from ._keyvalue import Settings
from ._maestro_deploy import File, read_files, render_policy, start_time, write_files
from ._root import Root
from ._runtime import CURRENT, TOP
from ._systemd import CommandError, Systemctl, UnitState, booted, venv_of

CONFIG = worker_settings.CONFIG
POLICY = _policy.DEFAULT_PATH
UNIT = "gpu-worker@.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
DAEMON = f"{CURRENT}/bin/organism-gpu-worker"
_MANAGED = "Managed by Ansible (organism.proxmox, gpu_worker): changes made here are lost."
_OWN = "A GPU's own settings go to gpu-worker.d/<id>.conf beside this file."


def render_unit(*, stop_seconds: int = 60, memlock: str = "infinity", cache: bool = True) -> str:
    """The template unit.

    ``stop_seconds`` is systemd's patience for a worker that lets its job finish, ``memlock`` the limit of locked memory
    (empty: leave it, where a container refuses a raise), ``cache`` ties a worker to its GPU's cache.
    """
    needs = "Requires=gpucache@%i.service\nAfter=gpucache@%i.service\n" if cache else ""
    limit = f"LimitMEMLOCK={memlock}\n" if memlock else ""
    return f"""\
# {_MANAGED}
# Own settings belong into a drop-in: systemctl edit gpu-worker@ID
[Unit]
Description=Worker of %i
{needs}Wants=network-online.target
After=network-online.target nats-server.service
# it may fail as long as the bus is away, and must never give up
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
Environment=GPU_ID=%i
ExecStartPre={DAEMON} --gpu %i --check
ExecStart={DAEMON} --gpu %i
Restart=always
RestartSec=1
WatchdogSec=30
# only the worker itself is told to stop: it decides what becomes of its job
KillMode=mixed
TimeoutStopSec={stop_seconds}
Nice=-5
OOMScoreAdjust=-500
LimitNOFILE=16384
{limit}# root, because it starts each job as a transient unit of an unprivileged user
ProtectSystem=full
ProtectHome=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictRealtime=yes

[Install]
WantedBy=multi-user.target
"""


UNIT_TEXT = render_unit()


def unit_of(gpu: str) -> str:
    return worker_settings.UNIT_OF_GPU.format(gpu=gpu)


def dropin_of(gpu: str) -> str:
    return worker_settings.DROPIN_OF_GPU.format(gpu=gpu)


def patience(settings: Settings) -> int:
    """Seconds that systemd waits for a stopping worker: its job's grace, the kill, and the last report."""
    return int(settings.number("STOP_GRACE_SEC") + settings.number("KILL_GRACE_SEC") + 30)


def render_config(settings: Settings) -> str:
    return worker_settings.SCHEMA.render(settings, [_MANAGED, _OWN])


def keep_operators(present: str | None, types: Iterable[str]) -> str:
    """The policy's text: our types, and whatever operators the conductor's role has put on the same machine.

    Raises DeployRefusedError for a type that cannot be one.
    """
    operators: Iterable[str] = _policy.DEFAULT_OPERATORS
    if present is not None:
        try:
            operators = sorted(_policy.parse(present).operators)
        except _policy.PolicyError:
            operators = _policy.DEFAULT_OPERATORS  # damaged: it is written anew
    return render_policy(types, operators)


def wanted_files(
    settings: Settings, gpus: Iterable[str], types: Iterable[str], *, memlock: str, cache: bool, root: Root
) -> dict[str, File | None]:
    """Every file as it shall be; None: it shall not be there. Raises ValueError (a cpuset this machine has not)."""
    cpuset = settings.text("GPU_WORKER_CPUSET")
    if cpuset:
        worker_settings.check_cpuset(cpuset, root)
    files: dict[str, File | None] = {
        CONFIG: File(render_config(settings)),
        POLICY: File(keep_operators(root.read_or_none(POLICY), types)),
        UNIT_FILE: File(render_unit(stop_seconds=patience(settings), memlock=memlock, cache=cache)),
    }
    for gpu in gpus:
        files[dropin_of(gpu)] = File(worker_settings.render_dropin(cpuset)) if cpuset else None
    return files


def instances(root: Root) -> list[str]:
    """GPUs with an enabled worker, whatever the map says now."""
    links = root.glob("/etc/systemd/system/*.wants/gpu-worker@*.service")
    return sorted({link.rpartition("@")[2].removesuffix(".service") for link in links} - {""})


def present_gpus(root: Root, path: str) -> list[str]:
    """Ids of the map whose devices are there. Raises MapError or OSError."""
    return [entry.id for entry in _gpu_map.load_map(root, path) if entry.present]


@dataclass(frozen=True)
class Service:
    """One worker's unit now; ``runs`` is the environment that its process came from, ``started`` is Unix time."""

    unit: UnitState
    runs: str | None = None
    started: float | None = None


@dataclass(frozen=True)
class Facts:
    """``services`` is empty and ``systemd`` False where systemd is not the manager."""

    files: Mapping[str, File | None]
    services: Mapping[str, Service]
    installed: str | None
    systemd: bool = True


def gather(root: Root, paths: Iterable[str], gpus: Iterable[str], systemctl: Systemctl) -> Facts:
    """Read the present. Raises CommandError."""
    files = read_files(root, paths)
    installed = root.link_name(CURRENT)
    if not booted(root):
        return Facts(files, {}, installed, systemd=False)
    names = {gpu: unit_of(gpu) for gpu in gpus}
    states = systemctl.show(names.values())
    services = {}
    for gpu, name in names.items():
        state = states.get(name, UnitState(name))
        runs = venv_of(root, state.main_pid)
        services[gpu] = Service(
            state, runs.removeprefix(f"{TOP}/") if runs else None, start_time(root, state.main_pid)
        )  # fmt: skip
    return Facts(files, services, installed)


@dataclass
class Plan:
    """``restart`` says per GPU why; ``start`` and ``stop`` are GPUs, all in the map's order."""

    difference: Difference = field(default_factory=Difference)
    writes: dict[str, File] = field(default_factory=dict)
    removes: list[str] = field(default_factory=list)
    enable: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    restart: dict[str, list[str]] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    reload: bool = False


def plan(facts: Facts, files: Mapping[str, File | None], gpus: Iterable[str], gone: Iterable[str] = ()) -> Plan:
    """From the present to the wanted: ``gpus`` are served, ``gone`` ones no more. Pure."""
    made = Plan()
    gpus, gone = list(gpus), list(gone)
    changed = _plan_files(made, facts, files)
    if not facts.systemd:
        return made
    for gpu in gpus:
        service = facts.services.get(gpu, Service(UnitState(unit_of(gpu))))
        reasons = _reasons(facts, files, service, gpu, changed)
        name = unit_of(gpu)
        made.difference.add(f"{name}: enabled", service.unit.enabled, True)
        made.difference.add(f"{name}: state", "running" if service.unit.running else service.unit.active, "running")
        if not service.unit.enabled:
            made.enable.append(gpu)
        if not service.unit.running:
            made.start.append(gpu)
        elif reasons:
            made.restart[gpu] = reasons
            made.difference.add(f"{name}: restart", "up to date: no", "; ".join(reasons))
    for gpu in gone:
        service = facts.services.get(gpu, Service(UnitState(unit_of(gpu))))
        if service.unit.enabled or service.unit.running:
            made.stop.append(gpu)
            made.difference.add(f"{unit_of(gpu)}: enabled", service.unit.enabled, False)
            made.difference.add(f"{unit_of(gpu)}: state", service.unit.active, "inactive")
    made.reload = made.reload or any(service.unit.needs_reload for service in facts.services.values())
    return made


def _plan_files(made: Plan, facts: Facts, files: Mapping[str, File | None]) -> set[str]:
    """The paths whose content changes."""
    changed: set[str] = set()
    for path, file in files.items():
        present = facts.files.get(path)
        before, after = present.content if present else ABSENT, file.content if file else ABSENT
        made.difference.add(path, before, after)
        if before != after:
            changed.add(path)
            made.reload = made.reload or path.startswith("/etc/systemd/")
        if file is None:
            if present is not None:
                made.removes.append(path)
            continue
        if present is not None:
            made.difference.add(f"{path}: mode", f"{present.mode:04o}", f"{file.mode:04o}")
            made.difference.add(f"{path}: owner", f"{present.owner}:{present.group}", f"{file.owner}:{file.group}")
        if present is None or present != file:
            made.writes[path] = file
    return changed


def _reasons(
    facts: Facts, files: Mapping[str, File | None], service: Service, gpu: str, changed: set[str]
) -> list[str]:
    """Why a running worker has to be started anew."""
    found = []
    for path in (CONFIG, POLICY, UNIT_FILE, dropin_of(gpu)):
        if path not in files:
            continue
        present = facts.files.get(path)
        if path in changed:
            found.append(f"{path} changed")
        elif present is not None and service.started is not None and present.written > service.started + 1:
            # an earlier run wrote it and was cut short before the restart; a second of slack for the clocks
            found.append(f"{path} was written after it had started")
    if service.runs and facts.installed and service.runs != facts.installed:
        found.append(f"it runs {service.runs}, installed is {facts.installed}")
    return found


def apply(made: Plan, root: Root, systemctl: Systemctl) -> list[str]:
    """Do it, and say what was done to the services. Raises CommandError (with the worker's last words) or OSError."""
    # root's files (uid and gid 0) all of them
    write_files(root, made.writes, dict.fromkeys(made.writes, (0, 0)))
    for path in made.removes:
        real = root.path(path)
        real.unlink()
        if real.parent.name.endswith(".d") and not any(real.parent.iterdir()):
            real.parent.rmdir()
    if made.reload:
        systemctl.call("daemon-reload")
    told = []
    for gpu in made.stop:
        systemctl.call("disable", unit_of(gpu))
        systemctl.call("stop", unit_of(gpu))
        told.append(f"{gpu}: stopped")
    if made.enable:
        systemctl.call("enable", *(unit_of(gpu) for gpu in made.enable))
    for gpu in made.start:
        call(systemctl, "start", gpu)
        told.append(f"{gpu}: started")
    for gpu, reasons in made.restart.items():
        call(systemctl, "restart", gpu)
        told.append(f"{gpu}: restarted ({'; '.join(reasons)})")
    return told


def call(systemctl: Systemctl, verb: str, gpu: str) -> None:
    """``start`` or ``restart`` a worker and wait until it is ready. Raises CommandError with its last words."""
    try:
        systemctl.call(verb, unit_of(gpu))
    except CommandError as error:
        words = systemctl.explain(unit_of(gpu))
        raise CommandError(f"{error}\nlast words of {unit_of(gpu)}:\n{words}") from None


def plan_absent(facts: Facts, gpus: Iterable[str]) -> Plan:
    """Stop every worker and remove what is ours; the jobs' directories stay in the caches."""
    return plan(facts, dict.fromkeys(facts.files), (), gpus)
