# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker's settings: ``/etc/organism/gpu-worker.conf``, and over it a GPU's own ``gpu-worker.d/<id>.conf``.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from ._bus import DEFAULT_SHARD, IDENTIFIER, is_identifier
from ._keyvalue import Key, Schema, Settings, SettingsError
from ._root import Root

CONFIG = "/etc/organism/gpu-worker.conf"
CONFIG_OF_GPU = "/etc/organism/gpu-worker.d/{gpu}.conf"
UNIT_OF_GPU = "gpu-worker@{gpu}.service"
DROPIN_OF_GPU = "/etc/systemd/system/gpu-worker@{gpu}.service.d/50-cpuset.conf"
GPU_MAP = "/etc/organism/gpus.json"

_CPULIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_SPEED = r"\d+[KMGT]?"
_SIZE = r"\d+[KMGT]?|\d{1,2}%|infinity"
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def _consistent(settings: Settings) -> Iterable[str]:
    if settings["GPU_WORKER_CPUSET"]:
        try:
            parse_cpulist(settings.text("GPU_WORKER_CPUSET"))
        except ValueError as error:
            yield f"GPU_WORKER_CPUSET {error}"


SCHEMA = Schema(
    "gpu-worker",
    [
        Key("GPU_ID", "text", "", "The GPU that this worker serves; the unit gives it (--gpu %i).",
            pattern=IDENTIFIER.pattern, optional=True),
        Key("NATS_URL", "list", ["nats://127.0.0.1:4222"], "The bus: one URL, or several of one cluster.",
            pattern=r"(nats|tls)://\S+"),
        Key("NKEY_FILE", "path", "/etc/organism/keys/worker-%i.nk",
            "This worker's key on the bus; %i is the GPU's id. Empty: none (a bus for tests).", optional=True),
        Key("CA_FILE", "path", "", "Certificate authority of the bus; empty: no TLS.", optional=True),
        Key("SHARD", "text", DEFAULT_SHARD, "The share of the queue whose jobs run here: its conductors alone use it.",
            pattern=IDENTIFIER.pattern),
        Key("MERGE_ROOT", "path", "/srv/gpucache", "The GPUs' caches as jobs see them, a directory a GPU."),
        Key("BASE_ROOT", "path", "/data/gpucache", "The caches' persistent parts (of gpucache)."),
        Key("RAM_ROOT", "path", "/run/gpucache", "The caches' RAM parts (of gpucache)."),
        Key("WORK_ROOT", "path", "",
            "Where this worker keeps its jobs' directories (tasks/<job>/<attempt>); empty: MERGE_ROOT/<GPU id>.",
            optional=True),
        Key("GPU_MAP", "path", GPU_MAP, "Which device is behind which id."),
        Key("POLICY_FILE", "path", "/etc/organism/policy.toml", "Which types of job this site runs at all."),
        Key("HEARTBEAT_SEC", "number", 5, "Seconds between signs of life.", minimum=0.1, maximum=60),
        Key("METRICS_SEC", "number", 5, "Seconds between readings of the GPU's sensors.", minimum=0.1, maximum=3600),
        Key("TASK_TIMEOUT_DEFAULT", "number", 3600, "Seconds that a job may take when its order names no limit.",
            minimum=1),
        Key("STOP_GRACE_SEC", "number", 20,
            "Seconds that a running job may still take when this worker is told to stop.", minimum=0, maximum=3600),
        Key("KILL_GRACE_SEC", "number", 5, "Seconds between SIGTERM and SIGKILL for a job that has to end.",
            minimum=0, maximum=300),
        Key("GPU_WORKER_CPUSET", "text", "",
            "CPUs of this machine for worker and jobs, as a list (2-3,6); empty: all of them. "
            "Takes effect with `gpu-worker-ctl restart`."),
        Key("LAUNCHER", "choice", "auto",
            "How jobs are contained: `systemd` (a transient unit each), `process` (a process tree, no sandbox), "
            "or `auto` (systemd where it runs and the worker is root).", choices=("auto", "systemd", "process")),
        Key("JOB_USER", "text", "organism-job-%i",
            "Unprivileged user that jobs run as when the worker is root; empty: the worker's own. %i is the GPU's id: "
            "jobs of one user could end each other, and reach each other's files.",
            pattern=r"[a-z_][a-z0-9_-]{0,31}|[a-z_][a-z0-9_-]{0,22}%i", optional=True),
        Key("JOB_PYTHON", "path", "/usr/bin/python3",
            "Interpreter of jobs of type python; empty: this worker offers none. Jobs cannot reach /home and /root.",
            optional=True),
        Key("JOB_CACHE", "choice", "write", "May jobs write into the GPU's cache outside their own directory?",
            choices=("read", "write")),
        Key("JOB_DISK_ABOVE_PERCENT", "number", 85,
            "A new job gets its directory on disk (BASE_ROOT/<GPU id>/jobs) when its GPU's cache is fuller than this.",
            minimum=1, maximum=100),
        Key("JOB_NETWORK", "boolean", False, "May jobs use the network? (launcher systemd)"),
        Key("JOB_MEMORY_MAX", "text", "80%",
            "Memory limit of a job, what it writes into RAM included, such as 8G or 50%; empty: none. "
            "(launcher systemd)", pattern=_SIZE, optional=True),
        Key("JOB_TASKS_MAX", "integer", 4096, "Processes and threads a job may have. (launcher systemd)", minimum=1),
        Key("JOB_CPU_PERCENT", "integer", 0, "CPU limit of a job, 100 is one CPU; 0: none. (launcher systemd)",
            minimum=0),
        Key("JOB_CPU_WEIGHT", "integer", 50,
            "Share of a job of contended CPUs, services have 100; 0: the same. (launcher systemd)",
            minimum=0, maximum=10000),
        Key("JOB_IO_WEIGHT", "integer", 50,
            "Share of a job of contended disks, services have 100; 0: the same. (launcher systemd)",
            minimum=0, maximum=10000),
        Key("JOB_IO_READ_MAX", "text", "",
            "Bytes a second that a job reads from a disk at most, such as 500M; empty: no limit. No effect on ZFS. "
            "(launcher systemd)", pattern=_SPEED, optional=True),
        Key("JOB_IO_WRITE_MAX", "text", "", "The same for writing. (launcher systemd)", pattern=_SPEED, optional=True),
        Key("JOB_TMP_MAX", "text", "25%",
            "Size of a job's own /tmp, /var/tmp and /dev/shm each: RAM, part of JOB_MEMORY_MAX. (launcher systemd)",
            pattern=r"\d+[KMGT]?|\d{1,2}%"),
        Key("JOB_DISK_MAX_MB", "integer", 0,
            "MiB that a job may write into its own directory and its GPU's cache; 0: no limit but the next.",
            minimum=0),
        Key("JOB_DISK_FREE_PERCENT", "number", 5,
            "A job that has taken more than this of the disk or cache that it writes to ends when less than this is "
            "free; 0: never.", minimum=0, maximum=50),
        Key("JOB_ENV_PASS", "list", ["LANG", "TZ"], "Variables of the worker's environment that jobs inherit.",
            pattern=r"[A-Za-z_][A-Za-z0-9_]*"),
        Key("TEXTFILE_COLLECTOR", "path", "/var/lib/prometheus/node-exporter",
            "Where metrics for Prometheus are left, if the directory exists. Empty: nowhere.", optional=True),
        Key("LOG_MAX_MB", "integer", 64, "MiB of stdout and of stderr kept on disk for a job; more is dropped.",
            minimum=1),
        Key("LOG_UPLOAD_MB_SEC", "number", 8,
            "MiB a second at most at which long outputs of ended jobs go to the bus, which keeps them when this worker "
            "is gone; 0: they stay here alone.", minimum=0, maximum=10000),
        Key("KEEP_TASKS", "integer", 200, "Directories of finished jobs that are kept, the newest.", minimum=0),
        Key("KEEP_HOURS", "number", 72, "Hours that the directory of a finished job is kept at most.", minimum=0),
    ],
    checks=[_consistent],
)  # fmt: skip


def parse_cpulist(text: str) -> list[int]:
    """CPU numbers of a list such as ``0-2,5``, the kernel's own notation. Raises ValueError."""
    if not _CPULIST.fullmatch(text):
        raise ValueError(f"expects a CPU list such as 0-2,5, not {text!r}")
    cpus: set[int] = set()
    for part in text.split(","):
        first, _dash, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"has the backward range {part!r}")
        cpus.update(range(low, high + 1))
    return sorted(cpus)


def job_user(pattern: str, gpu: str) -> str:
    """The user of a GPU's jobs: ``%i`` in the pattern is the id, or its digest where no user can have such a name
    (useradd(8): lower case, at most 32 characters)."""
    name = pattern.replace("%i", gpu)
    if _USER.fullmatch(name):
        return name
    return pattern.replace("%i", hashlib.sha256(gpu.encode()).hexdigest()[:8])


def check_cpuset(text: str, root: Root) -> list[int]:
    """The CPUs of a cpuset, all of which this machine has online.

    A worker in a VM sees the VM's CPU numbers, not the host's (S1i-D11: a unit pinned to host CPUs 10 and 11 in a guest
    of four does not start). Raises ValueError that names what is there.
    """
    wanted = parse_cpulist(text)
    online_text = root.read_or_none("/sys/devices/system/cpu/online")
    online = parse_cpulist(online_text.strip()) if online_text else []
    missing = [cpu for cpu in wanted if cpu not in online]
    if missing:
        raise ValueError(
            f"GPU_WORKER_CPUSET={text} names CPU {', '.join(map(str, missing))}, but this machine has "
            f"{online_text or 'no readable list of CPUs'} online (CPUs of the machine that the worker runs in count)"
        )
    return wanted


def load_settings(root: Root, gpu: str, config: str = CONFIG) -> Settings:
    """The settings of one GPU's worker: defaults, the common file, then the GPU's own file; absent files are fine.

    ``%i`` in NKEY_FILE, JOB_USER and WORK_ROOT becomes the id, and an empty WORK_ROOT becomes ``MERGE_ROOT/<id>``.
    Raises SettingsError with file and line, ValueError for an id that cannot be one, OSError for a file that cannot be
    read.
    """
    if not is_identifier(gpu):
        raise ValueError(f"GPU id {gpu!r} must match {IDENTIFIER.pattern}")
    values = dict(SCHEMA.defaults())
    own = CONFIG_OF_GPU.format(gpu=gpu) if config == CONFIG else f"{config.removesuffix('.conf')}.d/{gpu}.conf"
    for path in (config, own):
        if root.exists(path):
            named = _named_keys(root.read(path))
            values.update({name: value for name, value in SCHEMA.load(root, path).items() if name in named})
    if values["GPU_ID"] not in ("", gpu):
        raise SettingsError([f"{config}: GPU_ID={values['GPU_ID']}, but this worker was started for {gpu}"])
    values["GPU_ID"] = gpu
    values["WORK_ROOT"] = str(values["WORK_ROOT"] or f"{values['MERGE_ROOT']}/%i").replace("%i", gpu)
    values["NKEY_FILE"] = str(values["NKEY_FILE"]).replace("%i", gpu)
    values["JOB_USER"] = job_user(str(values["JOB_USER"]), gpu)
    return SCHEMA.coerce(values, config)


def _named_keys(text: str) -> set[str]:
    return {line.partition("=")[0].strip() for line in text.split("\n") if not line.lstrip().startswith(("#", ";"))}


def render_dropin(cpuset: str) -> str:
    """The unit's drop-in that pins a worker (S1j-039): systemd wants its CPU list with blanks or commas."""
    return f"# Made from GPU_WORKER_CPUSET; `gpu-worker-ctl restart` renews it.\n[Service]\nCPUAffinity={cpuset}\n"
