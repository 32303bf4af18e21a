# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The GPU caches as a whole: configuration, units, drop-ins and mounts; the present, the wanted, and the way there.

The unit files come with the role; everything about them that depends on the configuration is a drop-in written here, so
that a changed SYNC_SEC reaches the timers whoever changed it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _gpucache as gpucache
from . import _ramlayer as ramlayer
from ._atomic import write_atomic
from ._difference import Difference
from ._keyvalue import Settings
from ._overlay import LayerError, mount_at, mounts
from ._ramlayer import Layer
from ._root import Root
from ._systemd import CommandError, Systemctl, UnitState, booted

UNITS = "/etc/systemd/system"
AGENT = "gpucache-agent.service"
INTERVAL = f"{UNITS}/gpucache-sync@.timer.d/50-gpucache.conf"
AFFINITY = tuple(f"{UNITS}/gpucache-{work}@.service.d/50-gpucache.conf" for work in ("sync", "prewarm"))
BOOT_SECONDS = 90
_HEADER = "# Written from gpucache.conf by gpucache-ctl and the role gpucache; changes here are lost.\n"


@dataclass(frozen=True)
class Wish:
    """What a unit should be. ``running`` None: it comes and goes (prewarming ends by itself)."""

    enabled: bool
    running: bool | None


def cache_units(gpu: str) -> tuple[str, str, str]:
    """A GPU's cache, its timer and its prewarming, in the order of starting."""
    return f"gpucache@{gpu}.service", f"gpucache-sync@{gpu}.timer", f"gpucache-prewarm@{gpu}.service"


def wishes(settings: Settings, ids: Iterable[str], gone: Iterable[str] = ()) -> dict[str, Wish]:
    """Every unit of the configured GPUs, off for the ``gone`` ones, and the agent."""
    wanted: dict[str, Wish] = {}
    for gpu in ids:
        cache, timer, prewarm = cache_units(gpu)
        wanted[cache] = wanted[timer] = Wish(True, True)
        wanted[prewarm] = Wish(settings.flag("PREWARM_ON_BOOT"), None)
    for gpu in gone:
        # the timer first, so that it does not start a sync of what is being taken down
        cache, timer, prewarm = cache_units(gpu)
        for unit in (timer, prewarm, cache):
            wanted[unit] = Wish(False, False)
    wanted[AGENT] = Wish(settings.flag("NATS_ENABLE"), settings.flag("NATS_ENABLE"))
    return wanted


def dropins(settings: Settings, root: Root) -> dict[str, str | None]:
    """Drop-ins by path; None: there should be none.

    Assigning an empty OnUnitActiveSec= clears every trigger of the timer (systemd.timer(5)), so both are given again.
    """
    interval = f"OnUnitActiveSec={settings.integer('SYNC_SEC')}\n"
    found: dict[str, str | None] = {
        INTERVAL: f"{_HEADER}[Timer]\nOnUnitActiveSec=\nOnBootSec={BOOT_SECONDS}\n{interval}"
    }
    cpus = gpucache.housekeeping_cpus(settings, root)
    text = f"{_HEADER}[Service]\nCPUAffinity={' '.join(map(str, cpus))}\n" if cpus else None
    return found | dict.fromkeys(AFFINITY, text)


@dataclass(frozen=True)
class Facts:
    """The present. ``units`` is None where systemd is not the manager: then layers are mounted without it."""

    config: str | None
    files: Mapping[str, str | None]
    units: Mapping[str, UnitState] | None
    layers: Mapping[str, ramlayer.Presence]


@dataclass
class Plan:
    """Differences, and what to do about them in order."""

    difference: Difference = field(default_factory=Difference)
    files: dict[str, str | None] = field(default_factory=dict)
    units: dict[str, Wish] = field(default_factory=dict)
    mount: list[str] = field(default_factory=list)
    resize: list[str] = field(default_factory=list)
    unmount: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)


def instances(root: Root) -> list[str]:
    """GPUs with an enabled unit of this role, whatever the configuration says now."""
    found = set()
    for link in root.glob(f"{UNITS}/*.wants/gpucache*@*"):
        name = link.rsplit("/", 1)[1].rsplit(".", 1)[0]
        kind, _at, gpu = name.partition("@")
        if gpu and kind in ("gpucache", "gpucache-sync", "gpucache-prewarm"):
            found.add(gpu)
    return sorted(found)


def mounted_gpus(settings: Settings, root: Root) -> list[str]:
    """GPUs with something mounted below the configured directories."""
    roots = {settings.text("RAM_ROOT"), settings.text("MERGE_ROOT")}
    return sorted({Path(m.target).name for m in mounts(root) if str(Path(m.target).parent) in roots})


def gather(settings: Settings, ids: Iterable[str], root: Root, config: str, systemctl: Systemctl) -> Facts:
    """Read the present. Raises CommandError."""
    ids = list(ids)
    names = [unit for gpu in ids for unit in cache_units(gpu)]
    return Facts(
        config=root.read_or_none(config),
        files={path: root.read_or_none(path) for path in (INTERVAL, *AFFINITY)},
        units=systemctl.show([*names, AGENT]) if booted(root) else None,
        layers={gpu: ramlayer.presence(gpucache.layer(settings, gpu), root) for gpu in ids},
    )


def plan(
    facts: Facts, *, wanted: Mapping[str, Wish], files: Mapping[str, str | None], ids: Iterable[str], size_mb: int
) -> Plan:
    """What differs from ``wanted`` units and ``files`` (path to text), with caches of ``size_mb`` for ``ids``. Pure."""
    made = Plan()
    for path, text in files.items():
        before = facts.files.get(path)
        after = None if text is None else text.rstrip("\n")
        made.difference.add(path, before, after)
        if before != after:
            made.files[path] = text
    ids = list(ids)
    for gpu in facts.layers:
        _plan_layer(made, facts, gpu, size_mb if gpu in ids else None)
    if facts.units is None:
        return made
    for name, wish in wanted.items():
        state = facts.units.get(name, UnitState(name))
        present = {"enabled": state.enabled, "running": state.running}
        wanted_state = {"enabled": wish.enabled, "running": state.running if wish.running is None else wish.running}
        made.difference.add(name, present, wanted_state)
        if present != wanted_state:
            made.units[name] = wish
    agent = facts.units.get(AGENT, UnitState(AGENT))
    reread = any(path not in (INTERVAL, *AFFINITY) for path in made.files)
    if reread and agent.running and AGENT not in made.units and wanted.get(AGENT, Wish(False, False)).running:
        made.restart.append(AGENT)
    return made


def _plan_layer(made: Plan, facts: Facts, gpu: str, size_mb: int | None) -> None:
    now = facts.layers[gpu]
    before = {"size_mb": now.size_mb} if now.mounted else None
    after = None if size_mb is None else {"size_mb": size_mb}
    made.difference.add(f"cache of {gpu}", before, after)
    if size_mb is None and (now.mounted or now.ram is not None):
        made.unmount.append(gpu)
    elif size_mb is not None and not now.mounted:
        made.mount.append(gpu)
    elif size_mb is not None and now.size_mb != size_mb:
        made.resize.append(gpu)


def write_files(files: Mapping[str, str | None], root: Root) -> None:
    """Write or remove files; a directory of drop-ins or of ours that is left empty goes as well."""
    for path, text in files.items():
        place = root.path(path)
        if text is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, text)
        elif place.exists():
            place.unlink()
            if place.parent.name.endswith((".d", "gpucache")) and not any(place.parent.iterdir()):
                place.parent.rmdir()


def apply(made: Plan, settings: Settings, root: Root, systemctl: Systemctl) -> list[str]:
    """Do it, and say what was done to the layers. Raises LayerError or CommandError (with the journal)."""
    # what may be refused comes before anything is written
    told = [ramlayer.mount(gpucache.layer(settings, gpu), root) for gpu in made.resize]
    write_files(made.files, root)
    if booted(root) and (made.files or made.units):
        systemctl.call("daemon-reload")
    for name, wish in made.units.items():
        set_unit(systemctl, name, wish)
    for name in made.restart:
        systemctl.call("restart", name)
    # systemd has done these two, unless it does not run here or somebody mounted or unmounted by hand
    told += [_bring_up(gpucache.layer(settings, gpu), root) for gpu in made.mount]
    told += [_take_down(gpucache.layer(settings, gpu), root) for gpu in made.unmount]
    return told


def _bring_up(layer: Layer, root: Root) -> str:
    there = ramlayer.presence(layer, root).mounted
    return f"{layer.name}: mounted" if there else ramlayer.mount(layer, root)


def _take_down(layer: Layer, root: Root) -> str:
    now = ramlayer.presence(layer, root)
    return ramlayer.stop(layer, root) if now.mounted or now.ram is not None else f"{layer.name}: unmounted"


def set_unit(systemctl: Systemctl, name: str, wish: Wish) -> None:
    """Enable or disable a unit, and start or stop it. Raises CommandError with the journal's last lines."""
    try:
        systemctl.call("enable" if wish.enabled else "disable", name)
        if wish.running is not None:
            systemctl.call("start" if wish.running else "stop", name)
    except CommandError as error:
        raise CommandError(f"{error}\n{systemctl.explain(name)}") from None


def moved(old: Settings, new: Settings, ids: Iterable[str], root: Root) -> list[str]:
    """Mounted GPUs whose directories would be others: that must not happen underneath them."""
    paths = ("RAM_ROOT", "MERGE_ROOT", "BASE_ROOT", "PERSIST_ROOT")
    if all(old[name] == new[name] for name in paths):
        return []
    return [gpu for gpu in ids if ramlayer.presence(gpucache.layer(old, gpu), root).ram is not None]


def persistent_gpus(settings: Settings) -> list[str]:
    """GPUs that have generations on disk."""
    place = Path(settings.text("PERSIST_ROOT"))
    if not place.is_dir():
        return []
    return sorted(path.name for path in place.iterdir() if (path / "persist/generations").is_dir())


def purge(layer: Layer, root: Root) -> None:
    """Remove a GPU's persistent content for good. Raises LayerError while it is mounted."""
    now = ramlayer.presence(layer, root)
    if now.mounted or now.ram is not None or mount_at(mounts(root), layer.merged) is not None:
        raise LayerError(f"{layer.name} is still mounted, nothing was removed; stop {layer.unit} first")
    for place in (layer.persist, layer.base, layer.base.parent / "jobs"):
        if place.exists():
            shutil.rmtree(place)
        if place.parent.is_dir() and not any(place.parent.iterdir()):
            place.parent.rmdir()


def overview(settings: Settings, ids: Iterable[str], root: Root, systemctl: Systemctl) -> list[dict[str, Any]]:
    """Each GPU's status with the state of its timer (None where systemd does not run). Raises CommandError."""
    ids = list(ids)
    timers = systemctl.show([cache_units(gpu)[1] for gpu in ids]) if booted(root) else {}
    shown = []
    for gpu in ids:
        found = ramlayer.status(gpucache.layer(settings, gpu), root)
        timer = timers.get(cache_units(gpu)[1])
        shown.append(found | {"timer": timer.active if timer else None})
    return shown
