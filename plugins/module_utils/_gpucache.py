# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPU caches' settings, the GPUs they are for, and whether the machine can afford them.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._bus import IDENTIFIER
from ._keyvalue import Key, Schema, Settings, SettingsError
from ._overlay import holding_mount, mounts
from ._ramlayer import Layer
from ._ramlayer_answers import Habits
from ._root import Root
from ._worker_settings import GPU_MAP, check_cpuset, parse_cpulist

CONFIG = "/etc/gpucache/gpucache.conf"
FOLDERS = ("models", "out")
"""What an application finds in a cache: models to read, and a place for results."""

_PATH = r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+"
_GPU_VENDORS = {"0x1002": "amdgpu", "0x10de": "nvml"}
_DISPLAY = "0x03"


def _consistent(settings: Settings) -> Iterable[str]:
    roots = {name: settings.text(name) for name in ("RAM_ROOT", "MERGE_ROOT", "BASE_ROOT")}
    for one, first in roots.items():
        for other, second in roots.items():
            if one < other and f"{second}/".startswith(f"{first}/"):
                yield f"{other} {second} must not be {one} or lie below it"
            elif one < other and f"{first}/".startswith(f"{second}/"):
                yield f"{one} {first} must not lie below {other} {second}"
    if settings.integer("SPILL_TO_PERCENT") >= settings.integer("SPILL_ABOVE_PERCENT"):
        yield (
            f"SPILL_TO_PERCENT {settings['SPILL_TO_PERCENT']} must be below "
            f"SPILL_ABOVE_PERCENT {settings['SPILL_ABOVE_PERCENT']}"
        )
    doubled = sorted({gpu for gpu in settings.words("GPU_IDS") if settings.words("GPU_IDS").count(gpu) > 1})
    if doubled:
        yield f"GPU_IDS names {', '.join(doubled)} more than once"
    count, named = settings["GPU_COUNT"], len(settings.words("GPU_IDS"))
    if count != "auto" and named and count != named:
        yield f"GPU_COUNT is {count}, GPU_IDS names {named}; leave GPU_COUNT at auto"
    if settings["GPU_WORKER_CPUSET"]:
        try:
            parse_cpulist(settings.text("GPU_WORKER_CPUSET"))
        except ValueError as error:
            yield f"GPU_WORKER_CPUSET {error}"


SCHEMA = Schema(
    "gpucache",
    [
        Key("GPU_COUNT", "integer", "auto",
            "How many GPUs get a cache. auto: those that are present in the host's map of GPUs (GPU_MAP), or,\n"
            "without a map, the AMD and NVIDIA display devices on the PCI bus, as gpu0, gpu1, ...",
            minimum=1, maximum=64, words=("auto",)),
        Key("GPU_IDS", "list", [], "The GPUs' logical ids, comma-separated. Empty: as GPU_COUNT says.",
            pattern=IDENTIFIER.pattern),
        Key("GPU_MAP", "path", GPU_MAP, "Which device is behind which id; written by the module gpu_map."),
        Key("CACHE_MB", "integer", 500, "RAM for each GPU's cache in MiB. 256 suits small machines.",
            minimum=16, maximum=1048576),
        Key("BASE_ROOT", "path", "/data/gpucache",
            "Persistent part: BASE_ROOT/<id>/base holds what a commit has merged and what is put there by hand.",
            pattern=_PATH),
        Key("PERSIST_ROOT", "path", "/data/gpucache",
            "Persistent part: PERSIST_ROOT/<id>/persist holds the generations that each sync saves.", pattern=_PATH),
        Key("RAM_ROOT", "path", "/run/gpucache", "Where the tmpfs of each GPU is mounted.", pattern=_PATH),
        Key("MERGE_ROOT", "path", "/srv/gpucache", "What jobs see: MERGE_ROOT/<id>.", pattern=_PATH),
        Key("SYNC_SEC", "integer", 60, "Seconds between two syncs: what a power cut can cost.",
            minimum=5, maximum=86400),
        Key("KEEP_GENERATIONS", "integer", 3, "Generations kept for each GPU, the current one included.",
            minimum=1, maximum=1000),
        Key("PREWARM_ON_BOOT", "boolean", True, "Bring files of base into RAM when a cache is mounted."),
        Key("PREWARM_MAX_FILE_MB", "integer", 128, "Only files below this many MiB are brought into RAM.", minimum=1),
        Key("PREWARM_PARALLEL", "integer", 4, "Files that are brought into RAM at once.", minimum=1, maximum=64),
        Key("PREWARM_QUOTA_PERCENT", "integer", 50, "Prewarmed files fill at most this share of a cache.",
            minimum=1, maximum=95),
        Key("PIN", "list", [],
            "Shell patterns of paths in a cache (models/base/*) that prewarming brings in first, of any size, and\n"
            "that never leave RAM by a spill."),
        Key("HIGH_WATERMARK_PERCENT", "integer", 85,
            "Prewarming stops here, the status says 'high' above it, and new jobs get a directory on disk.",
            minimum=10, maximum=95),
        Key("SPILL_ABOVE_PERCENT", "integer", 70,
            "A cache that is fuller after a sync is emptied between two jobs: its coldest files go down to base.\n"
            "100: never.", minimum=10, maximum=100),
        Key("SPILL_TO_PERCENT", "integer", 50, "How full a cache may be after that.", minimum=0, maximum=95),
        Key("SPILL_WAIT_SEC", "integer", 30,
            "How long emptying waits for the running job's end; the next job waits for it then. It is tried again\n"
            "after the next sync.", minimum=0, maximum=600),
        Key("TEXTFILE_COLLECTOR", "path", "/var/lib/prometheus/node-exporter",
            "Where each sync leaves its metrics, if the directory exists. Empty: nowhere.", optional=True),
        Key("MEMORY_SHARE_PERCENT", "integer", 50,
            "The caches together may take this share of the machine's memory; more is refused.", minimum=1, maximum=90),
        Key("GPU_WORKER_CPUSET", "text", "",
            "CPUs of this machine that compute, as a list (1-7). The caches' own work keeps off them. Empty: none."),
        Key("NATS_ENABLE", "boolean", True, "Run the agent that tells the bus of the caches and takes its requests."),
        Key("NATS_URL", "list", ["nats://127.0.0.1:4222"], "The bus: one URL, or several of one cluster.",
            pattern=r"(nats|tls)://\S+"),
        Key("NATS_NAME", "text", "", "This host's name on the bus (cache.<name>). Empty: its host name.",
            pattern=IDENTIFIER.pattern, optional=True),
        Key("NATS_NKEY_FILE", "path", "/etc/organism/keys/cache.nk",
            "The agent's key on the bus. Empty: connect without one (a test bus).", optional=True),
        Key("NATS_CA_FILE", "path", "/etc/organism/tls/ca.pem", "Certificate authority of the bus. Empty: no TLS.",
            optional=True),
    ],
    checks=[_consistent],
)  # fmt: skip


@dataclass(frozen=True)
class Gpus:
    """The ids that get a cache, and where they come from (for people)."""

    ids: tuple[str, ...]
    source: str


def load(root: Root, path: str = CONFIG) -> Settings:
    """The settings in force. Raises SettingsError; a missing file is one, and says how to get it."""
    try:
        return SCHEMA.load(root, path)
    except FileNotFoundError:
        raise SettingsError([f"{path} does not exist; run the role gpucache, or give --config"]) from None
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}"]) from None


def read_map(root: Root, path: str) -> list[dict[str, Any]] | None:
    """The entries of the host's map of GPUs, or None without one. Raises SettingsError for a map that is no map."""
    text = root.read_or_none(path)
    if text is None:
        return None
    try:
        found = json.loads(text)["gpus"]
        for entry in found:
            if not IDENTIFIER.fullmatch(entry["id"]):
                raise ValueError(f"{entry['id']!r} is not a GPU's id")
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError([f"{path} is not a map of GPUs ({error}); run the module gpu_map again"]) from None
    return list(found)


def pci_gpus(root: Root) -> list[tuple[str, str]]:
    """``(PCI address, backend)`` of AMD and NVIDIA display devices, in the order of their addresses."""
    found = []
    for address in root.listdir("/sys/bus/pci/devices"):
        place = f"/sys/bus/pci/devices/{address}"
        vendor = _GPU_VENDORS.get(root.read_or_none(f"{place}/vendor") or "")
        if vendor and (root.read_or_none(f"{place}/class") or "").startswith(_DISPLAY):
            found.append((address, vendor))
    return found


def gpus(settings: Settings, root: Root) -> Gpus:
    """The GPUs that get a cache. Raises SettingsError when there is none, and says what to set."""
    named = settings.words("GPU_IDS")
    if named:
        return Gpus(tuple(named), "GPU_IDS")
    if settings["GPU_COUNT"] != "auto":
        return Gpus(tuple(f"gpu{number}" for number in range(settings.integer("GPU_COUNT"))), "GPU_COUNT")
    path = settings.text("GPU_MAP")
    known = read_map(root, path)
    if known is not None:
        ids = tuple(entry["id"] for entry in known if entry.get("present", True))
        if not ids:
            raise SettingsError([f"{path} has no GPU that is present; connect one and run gpu_map, or set GPU_IDS"])
        return Gpus(ids, path)
    count = len(pci_gpus(root))
    if not count:
        raise SettingsError([f"no GPU found: {path} does not exist and the PCI bus has none; set GPU_IDS or GPU_COUNT"])
    return Gpus(tuple(f"gpu{number}" for number in range(count)), "the PCI bus (order of enumeration: write a map)")


def layer(settings: Settings, gpu: str) -> Layer:
    """Where a GPU's cache lives."""
    return Layer(
        name=gpu,
        ram=Path(settings.text("RAM_ROOT")) / gpu,
        base=Path(settings.text("BASE_ROOT")) / gpu / "base",
        persist=Path(settings.text("PERSIST_ROOT")) / gpu / "persist",
        merged=Path(settings.text("MERGE_ROOT")) / gpu,
        size_mb=settings.integer("CACHE_MB"),
        keep=settings.integer("KEEP_GENERATIONS"),
        high_percent=settings.integer("HIGH_WATERMARK_PERCENT"),
        service=f"gpucache@{gpu}.service",
        folders=FOLDERS,
    )


def habits(settings: Settings) -> Habits:
    """How the caches are tended."""
    return Habits(
        largest_mb=settings.integer("PREWARM_MAX_FILE_MB"),
        readers=settings.integer("PREWARM_PARALLEL"),
        quota_percent=settings.integer("PREWARM_QUOTA_PERCENT"),
        pins=tuple(settings.words("PIN")),
        spill_above=settings.integer("SPILL_ABOVE_PERCENT"),
        spill_to=settings.integer("SPILL_TO_PERCENT"),
        spill_wait=settings.integer("SPILL_WAIT_SEC"),
        textfiles=settings.text("TEXTFILE_COLLECTOR"),
    )


@dataclass(frozen=True)
class Budget:
    """Memory that the caches may fill, in MiB."""

    count: int
    each_mb: int
    machine_mb: int
    share_percent: int
    others_mb: int = 0

    @property
    def total_mb(self) -> int:
        return self.count * self.each_mb + self.others_mb

    @property
    def allowed_mb(self) -> int:
        return self.machine_mb * self.share_percent // 100

    @property
    def sum_text(self) -> str:
        others = f" + {self.others_mb} MiB of the host's RAM layer" if self.others_mb else ""
        return (
            f"{self.count} x {self.each_mb} MiB{others} = {self.total_mb / 1024:.1f} GiB of RAM for caches, "
            f"the machine has {self.machine_mb / 1024:.1f} GiB"
        )

    @property
    def refusal(self) -> str | None:
        """Why it is too much and what to do, or None."""
        if self.total_mb <= self.allowed_mb:
            return None
        fit = max(self.allowed_mb - self.others_mb, 0) // max(self.count, 1)
        return (
            f"{self.sum_text}; at most {self.share_percent} % are allowed: lower CACHE_MB to {fit} or raise "
            f"MEMORY_SHARE_PERCENT"
        )

    @property
    def warning(self) -> str | None:
        """A remark when more than half of what is allowed is taken."""
        return self.sum_text if not self.refusal and self.total_mb * 2 > self.allowed_mb else None


def machine_mb(root: Root) -> int:
    """The machine's memory in MiB. Raises SettingsError when it cannot be read."""
    for line in (root.read_or_none("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    raise SettingsError(["/proc/meminfo does not tell MemTotal; RAM layers cannot be checked against it"])


def configured_mb(root: Root, path: str = CONFIG) -> int:
    """MiB that the configured caches may take together; 0 where none are configured. Raises SettingsError."""
    if not root.exists(path):
        return 0
    settings = load(root, path)
    return len(gpus(settings, root).ids) * settings.integer("CACHE_MB")


def budget(settings: Settings, count: int, root: Root, *, others_mb: int = 0) -> Budget:
    """``others_mb``: what other RAM layers of this machine take. Raises SettingsError."""
    each, share = settings.integer("CACHE_MB"), settings.integer("MEMORY_SHARE_PERCENT")
    return Budget(count, each, machine_mb(root), share, others_mb)


def warnings(settings: Settings, found: Gpus, root: Root, *, others_mb: int = 0) -> list[str]:
    """What an operator should know and may accept."""
    told = []
    memory = budget(settings, len(found.ids), root, others_mb=others_mb).warning
    if memory:
        told.append(memory)
    present = mounts(root)
    for path in dict.fromkeys((settings.text("PERSIST_ROOT"), settings.text("BASE_ROOT"))):
        mount = holding_mount(present, path)
        if mount is None or mount.target == "/":
            told.append(f"{path} is on the root file system; mount a disk on /data, so that caches cannot fill /")
        elif mount.kind in ("tmpfs", "ramfs"):
            told.append(f"{path} is on a {mount.kind}: nothing there survives a reboot; mount a disk on /data")
    return told


def check(settings: Settings, found: Gpus, root: Root, *, others_mb: int = 0) -> None:
    """Raises SettingsError for what this machine must not or cannot do; ``others_mb`` as in `budget`."""
    problems = []
    refusal = budget(settings, len(found.ids), root, others_mb=others_mb).refusal
    if refusal:
        problems.append(refusal)
    if settings["GPU_WORKER_CPUSET"]:
        try:
            check_cpuset(settings.text("GPU_WORKER_CPUSET"), root)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError(problems)


def housekeeping_cpus(settings: Settings, root: Root) -> list[int]:
    """CPUs for the caches' own work: those that do not compute; empty means no restriction."""
    if not settings["GPU_WORKER_CPUSET"]:
        return []
    online = root.read_or_none("/sys/devices/system/cpu/online")
    return sorted(set(parse_cpulist(online) if online else ()) - set(parse_cpulist(settings.text("GPU_WORKER_CPUSET"))))


def cpu_caches(root: Root) -> list[dict[str, str]]:
    """The processors' caches, each once: level, type, size and the CPUs that share it (sysfs, as ``lscpu -C``)."""
    found: dict[tuple[str, ...], None] = {}
    for place in root.glob("/sys/devices/system/cpu/cpu[0-9]*/cache/index*"):
        values = [root.read_or_none(f"{place}/{name}") for name in ("level", "type", "size", "shared_cpu_list")]
        if all(values):
            found[tuple(str(value) for value in values)] = None
    return [dict(zip(("level", "type", "size", "cpus"), values, strict=True)) for values in sorted(found)]
