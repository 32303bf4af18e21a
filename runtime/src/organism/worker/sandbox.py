# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a job may see, use and reach: the settings of its transient unit.

The words are those of systemd.exec(5), systemd.kill(5) and systemd.resource-control(5). Each line is held by a unit
test, and its effect by the hostile jobs of the rig tier, since containers do not enforce limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from organism.worker.launch import Launch
from organism.worker.process import JobUser

HIDDEN = (
    "/etc/organism/keys",
    "/var/lib/nats",  # everyone's jobs and results
    "/run/dbus",  # the system's services listen there, and a socket in a directory needs no network
    "/run/systemd/private",
)
"""Never visible to a job, whatever its user may read."""
DENIED_CALLS = "@clock @cpu-emulation @module @mount @obsolete @raw-io @reboot @swap"
"""No job has use for them; without capabilities most would fail anyway."""


@dataclass(frozen=True)
class SystemdLimits:
    """Limits of a job's unit; empty or 0 means none."""

    memory_max: str = ""
    tasks_max: int = 4096
    cpu_percent: int = 0
    cpu_weight: int = 0
    io_weight: int = 0
    io_read_max: str = ""
    """Bytes a second from each disk, such as 200M."""
    io_write_max: str = ""
    tmp_max: str = "25%"
    """Size of the job's /tmp, of its /var/tmp and of its /dev/shm: memory, which counts as the job's own."""
    network: bool = False
    cpuset: str = ""
    cache_writable: bool = True
    kill_grace: float = 5


def properties(
    launch: Launch,
    limits: SystemdLimits,
    *,
    user: JobUser | None,
    groups: list[str],
    bind_to: str,
    status: Path,
    disks: tuple[Path, ...] = (),
    hidden: tuple[str, ...] = HIDDEN,
) -> list[str]:
    """The unit's settings, ``Name=value`` each. ``status`` is the file that takes the exit status, ``bind_to`` the
    worker's own unit (empty when it runs by hand), ``disks`` a path on each disk that a job can reach."""
    return [
        *_life(limits, launch, bind_to, status),
        *_identity(launch, user, groups),
        *_resources(limits, disks),
        *_files(launch, limits, status, hidden),
        *_no_way_up(),
        *_devices(launch),
        *_network(limits),
    ]


def _life(limits: SystemdLimits, launch: Launch, bind_to: str, status: Path) -> list[str]:
    return [
        *([f"BindsTo={bind_to}", f"After={bind_to}"] if bind_to else []),
        # the whole tree ends with the job, whoever left its session or its parent
        "KillMode=control-group",
        "SendSIGKILL=yes",
        "OOMPolicy=kill",
        f"TimeoutStopSec={limits.kill_grace:g}",
        f"RuntimeMaxSec={launch.limit:g}",
        # systemd counts an end by SIGTERM as success; a job's exact end is therefore written down. This runs as root
        # and with the unit's environment, which must therefore never be the job's (LD_PRELOAD)
        'ExecStopPost=+:/bin/sh -c \'echo "$SERVICE_RESULT $EXIT_CODE $EXIT_STATUS" >"$1"\' status '
        + quote(str(status)),
    ]


def _identity(launch: Launch, user: JobUser | None, groups: list[str]) -> list[str]:
    return [
        *([f"User={user.name}"] if user else []),
        *([f"SupplementaryGroups={' '.join(groups)}"] if groups and launch.nodes else []),
        "UMask=0022",
        "KeyringMode=private",
        "PrivateIPC=yes",
        *(["RemoveIPC=yes"] if user else []),
        "ProtectProc=invisible",
    ]


def _resources(limits: SystemdLimits, disks: tuple[Path, ...]) -> list[str]:
    speeds = (("IOReadBandwidthMax", limits.io_read_max), ("IOWriteBandwidthMax", limits.io_write_max))
    return [
        "OOMScoreAdjust=500",
        "LimitCORE=0",
        f"TasksMax={limits.tasks_max}",
        # swap as well would double the limit, and slow down everyone else first
        *([f"MemoryMax={limits.memory_max}", "MemorySwapMax=0"] if limits.memory_max else []),
        *([f"CPUQuota={limits.cpu_percent}%"] if limits.cpu_percent else []),
        *([f"CPUWeight={limits.cpu_weight}"] if limits.cpu_weight else []),
        # the affinity is where a job starts; it could widen that itself, but not its control group's set
        *([f"CPUAffinity={limits.cpuset}", f"AllowedCPUs={limits.cpuset}"] if limits.cpuset else []),
        *([f"IOWeight={limits.io_weight}"] if limits.io_weight else []),
        *(f"{name}={disk} {speed}" for name, speed in speeds if speed for disk in disks),
    ]


def _files(launch: Launch, limits: SystemdLimits, status: Path, hidden: tuple[str, ...]) -> list[str]:
    """The system, read-only; of the caches just this GPU's, of the jobs' directories just the job's own."""
    cache, tasks = launch.cache, launch.cache / "tasks"
    # PrivateTmp= would be a directory on the system's own disk, without a limit
    own = f"rw,mode=1777,nosuid,nodev,size={limits.tmp_max}"
    return [
        "ProtectSystem=strict",
        "ProtectHome=yes",
        # ProtectSystem= leaves it out once /proc is the unit's own (systemd 257), and anyone may write to /run/lock
        "ReadOnlyPaths=-/run",
        *(f"TemporaryFileSystem={path}:{own}" for path in ("/tmp", "/var/tmp", "/dev/shm")),  # noqa: S108 - the job's own
        *(f"InaccessiblePaths=-{path}" for path in hidden),
        *([f"TemporaryFileSystem={cache.parent}:ro"] if len(cache.parts) > 2 else []),
        f"{'BindPaths' if limits.cache_writable else 'BindReadOnlyPaths'}={cache}",
        f"TemporaryFileSystem={tasks}:ro",
        *(f"TemporaryFileSystem={top}:ro" for top in launch.hidden if top != tasks),
        f"BindPaths={launch.work}",
        # root's, mode 0700; ExecStopPost= sees the unit's own mounts, whatever its prefix
        f"BindPaths={status.parent}",
    ]


def _no_way_up() -> list[str]:
    return [
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "AmbientCapabilities=",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "SystemCallArchitectures=native",
        f"SystemCallFilter=~{DENIED_CALLS}",
        "SystemCallErrorNumber=EPERM",
    ]


def _devices(launch: Launch) -> list[str]:
    if launch.nodes:
        return ["DevicePolicy=closed", *(f"DeviceAllow={node} rw" for node in launch.nodes)]
    return ["PrivateDevices=yes", "DevicePolicy=closed"]


def _network(limits: SystemdLimits) -> list[str]:
    if limits.network:
        return []
    return [
        "PrivateNetwork=yes",
        "IPAddressDeny=any",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    ]


def quote(text: str) -> str:
    """One word of a systemd command line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
