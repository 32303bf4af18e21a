# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's RAM layer as a whole: configuration, units, drop-ins and mounts; the present, the wanted, the way there.

The unit files come with the role; what depends on the configuration is a drop-in written here, so that a changed
SYNC_SEC or MERGED reaches the units whoever changed it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _ramlayer as ramlayer
from . import _ramlayer_host as host
from . import _ramlayer_metrics as metrics
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._gpucache_units import UNITS, Wish, set_unit, write_files
from ._keyvalue import Settings, SettingsError
from ._overlay import LayerError
from ._ramlayer_archive import archived_numbers, dataset_of
from ._root import Root
from ._systemd import Systemctl, UnitState, booted

CAPABILITY = "ramlayer"
SYNC, ARCHIVE, PREWARM = "ram-sync.timer", "ram-archive.timer", "ramlayer-prewarm.service"
BOOT_SECONDS = 60
_HEADER = "# Written from ramlayer.conf by ramlayer and the role ramlayer; changes here are lost.\n"
_NEEDS = f"{UNITS}/{host.SERVICE}.d/50-ramlayer.conf"
_INTERVAL = f"{UNITS}/{SYNC}.d/50-ramlayer.conf"
_TARGET = f"{UNITS}/ram-archive.service.d/50-ramlayer.conf"
DROPINS = (_NEEDS, _INTERVAL, _TARGET)
FOLDER = "directory"


def wishes(settings: Settings, root: Root, *, on: bool) -> dict[str, Wish]:
    """Every unit, in the order of switching: a timer must not start a sync of what is being taken down."""
    if not on:
        return {unit: Wish(False, False) for unit in (SYNC, ARCHIVE, PREWARM, host.SERVICE)}
    archiving = host.no_archive(settings, root) is None
    return {
        host.SERVICE: Wish(True, True),
        SYNC: Wish(True, True),
        ARCHIVE: Wish(archiving, archiving),
        PREWARM: Wish(settings.flag("PREWARM_ON_BOOT"), None),
    }


def dropins(settings: Settings, root: Root) -> dict[str, str | None]:
    """Drop-ins by path; None: there should be none.

    Assigning an empty OnUnitActiveSec= clears every trigger of the timer (systemd.timer(5)), so both are given again.
    RequiresMountsFor= names the layer's own mounts as well: at shutdown they stay until the last sync is done.
    """
    places = " ".join(settings.text(name) for name in ("LOWERDIR", "PERSIST_DIR", "RAMDIR", "MERGED"))
    interval = f"OnUnitActiveSec={settings.integer('SYNC_SEC')}\n"
    target = None
    if host.no_archive(settings, root) is None:
        target = f"{_HEADER}[Unit]\nRequiresMountsFor={settings.text('ARCHIVE_DIR')}\n"
    return {
        _NEEDS: f"{_HEADER}[Unit]\nRequiresMountsFor={places}\n",
        _INTERVAL: f"{_HEADER}[Timer]\nOnUnitActiveSec=\nOnBootSec={BOOT_SECONDS}\n{interval}",
        _TARGET: target,
    }


@dataclass(frozen=True)
class Facts:
    """The present. ``units`` is None where systemd is not the manager: then the layer is mounted without it."""

    files: Mapping[str, str | None]
    units: Mapping[str, UnitState] | None
    layer: ramlayer.Presence


@dataclass
class Plan:
    """Differences, and what to do about them in order."""

    difference: Difference = field(default_factory=Difference)
    files: dict[str, str | None] = field(default_factory=dict)
    units: dict[str, Wish] = field(default_factory=dict)
    mount: bool = False
    resize: bool = False
    unmount: bool = False


def gather(settings: Settings, root: Root, config: str, systemctl: Systemctl) -> Facts:
    """Read the present. Raises CommandError."""
    return Facts(
        files={path: root.read_or_none(path) for path in (config, *DROPINS)},
        units=systemctl.show([host.SERVICE, SYNC, ARCHIVE, PREWARM]) if booted(root) else None,
        layer=ramlayer.presence(host.layer(settings), root),
    )


def plan(
    facts: Facts, *, wanted: Mapping[str, Wish], files: Mapping[str, str | None], size_mb: int | None, merged: str
) -> Plan:
    """What differs from ``wanted`` units, ``files`` (path to text) and a layer of ``size_mb`` (None: none). Pure."""
    made = Plan()
    for path, text in files.items():
        before = facts.files.get(path)
        after = None if text is None else text.rstrip("\n")
        made.difference.add(path, before, after)
        if before != after:
            made.files[path] = text
    now = facts.layer
    made.difference.add(
        f"RAM layer at {merged}",
        {"size_mb": now.size_mb} if now.mounted else None,
        None if size_mb is None else {"size_mb": size_mb},
    )
    made.unmount = size_mb is None and (now.mounted or now.ram is not None)
    made.mount = size_mb is not None and not now.mounted
    made.resize = size_mb is not None and now.mounted and now.size_mb != size_mb
    for name, wish in wanted.items() if facts.units is not None else ():
        state = (facts.units or {}).get(name, UnitState(name))
        present = {"enabled": state.enabled, "running": state.running}
        wanted_state = {"enabled": wish.enabled, "running": state.running if wish.running is None else wish.running}
        made.difference.add(name, present, wanted_state)
        if present != wanted_state:
            made.units[name] = wish
    return made


def apply(made: Plan, settings: Settings, root: Root, systemctl: Systemctl) -> list[str]:
    """Do it, and say what was done to the layer. Raises LayerError or CommandError (with the journal)."""
    layer = host.layer(settings)
    # what may be refused comes before anything is written
    told = [ramlayer.mount(layer, root)] if made.resize else []
    write_files(made.files, root)
    if booted(root) and (made.files or made.units):
        systemctl.call("daemon-reload")
    for name, wish in made.units.items():
        set_unit(systemctl, name, wish)
    # systemd has done these two, unless it does not run here or somebody mounted or unmounted by hand
    if made.mount:
        there = ramlayer.presence(layer, root).mounted
        told.append(f"{layer.name}: mounted" if there else ramlayer.mount(layer, root))
    if made.unmount:
        now = ramlayer.presence(layer, root)
        told.append(ramlayer.stop(layer, root) if now.mounted or now.ram is not None else f"{layer.name}: unmounted")
    return told


# ---- what was there before ------------------------------------------------------------------------------------------


def new_folders(settings: Settings, root: Root) -> list[str]:
    """Directories that mounting will make, the outermost first."""
    found: dict[str, None] = {}
    for name in ("RAMDIR", "MERGED", "PERSIST_DIR"):
        place = settings.text(name)
        for above in [*reversed(Path(place).parents), Path(place)]:
            if not root.path(str(above)).exists():
                found[str(above)] = None
    return list(found)


def remember(earlier: EarlierState, made: Plan, facts: Facts, settings: Settings, root: Root, config: str) -> None:
    """Note what the configuration was and which directories are about to be made. Raises OSError."""
    changes = {folder: Kept(None, FOLDER) for folder in new_folders(settings, root)}
    if config in made.files:
        changes[config] = Kept(facts.files.get(config), (made.files[config] or "").rstrip("\n"))
    earlier.remember(changes)


def remove_folders(earlier: EarlierState, config: str, root: Root) -> None:
    """Directories that were made for the layer and are empty go, the innermost first. Raises OSError."""
    for folder in sorted((key for key in earlier.kept if key != config), key=len, reverse=True):
        place = root.path(folder)
        if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()


def moved(old: Settings, new: Settings, root: Root) -> list[str]:
    """Settings of places that would change underneath a layer that is up."""
    if ramlayer.presence(host.layer(old), root).ram is None:
        return []
    return [key for key in ("LOWERDIR", "RAMDIR", "MERGED", "PERSIST_DIR", "STATE_DIR") if old[key] != new[key]]


def existing(root: Root, path: str) -> Settings | None:
    """The settings of a file that is there and can be read, else None."""
    try:
        return host.load(root, path)
    except SettingsError:
        return None


def purge(settings: Settings, root: Root) -> bool:
    """Remove what the layer saved for good; base stays. False when there was nothing. Raises LayerError."""
    layer = host.layer(settings)
    if ramlayer.presence(layer, root).ram is not None:
        raise LayerError(f"{layer.name} is still mounted, nothing was removed; stop {layer.unit} first")
    if not layer.persist.exists():
        return False
    for place in (layer.store.folder, layer.store.pointer):
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
    if not any(layer.persist.iterdir()):
        layer.persist.rmdir()
    return True


def overview(settings: Settings, root: Root, systemctl: Systemctl) -> dict[str, Any]:
    """The layer's status with its timers (None where systemd does not run) and its archive. Raises CommandError."""
    layer = host.layer(settings)
    found = ramlayer.status(layer, root)
    found["layer"] = found.pop("gpu", layer.name)
    timers = systemctl.show([SYNC, ARCHIVE]) if booted(root) else {}
    reason = host.no_archive(settings, root)
    memory = host.budget(settings, root)
    return found | {
        "timers": {name: timers[name].active if name in timers else None for name in (SYNC, ARCHIVE)},
        "archive": {
            "folder": settings.text("ARCHIVE_DIR"),
            "reason": reason,
            "generations": [] if reason else archived_numbers(Path(settings.text("ARCHIVE_DIR"))),
        },
        "zfs": dataset_of(root, layer.persist),
        "counters": metrics.counters(layer),
        "memory": {"layers_mb": memory.total_mb, "allowed_mb": memory.allowed_mb, "machine_mb": memory.machine_mb},
    }
