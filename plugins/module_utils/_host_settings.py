# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a capability sets on a host, as one wish and one plan: sysctl, sysfs, files, kernel modules, units.

Everything has a key and a JSON value, so that one record (``_earlier``) and one difference hold all of it:

=============================  =================================================  ======================
key                            value                                              None means
=============================  =================================================  ======================
``/proc/sys/...``, ``/sys/..``  the kernel's text in normal form                   not there
``/etc/...``                   content, mode, uid, gid of a whole file             no file
``unit:NAME``                  ``enabled`` (UnitFileState) and ``active``          (not used)
``module:NAME``                is the kernel module loaded?                        (not used)
``folder:/path``               True: a folder that had to be made for a file       no folder
``restart:NAME``               files that the unit reads only when it starts       (not used)
=============================  =================================================  ======================

Values that stay are set twice: live, and in a file that sets them at boot; both are compared each time.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _host_files, _kernel_modules, _kernel_value, _sysctl, _sysfs, _unit_state
from ._difference import Difference
from ._earlier import EarlierState
from ._host_files import FileWish
from ._root import Root
from ._systemd import Runner, UnitState, booted
from ._unit_state import UnitWish

UDEV_RULES = "/etc/udev/rules.d"


class SettingsRefused(Exception):
    """A wish that is not carried out; nothing has been changed. ``problems`` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Wish:
    """What one capability wants. Values are in normal form (``_kernel_value.normal``).

    ``live``: sysfs values without a boot file, because one of ``files`` (a udev rule) sets them then.
    ``udev_trigger``: subsystems whose devices get a change event when a udev rule among ``files`` changes.
    """

    capability: str
    sysctl: Mapping[str, str] = field(default_factory=dict)
    sysctl_file: str = ""
    sysfs: Mapping[str, str] = field(default_factory=dict)
    sysfs_optional: Mapping[str, str] = field(default_factory=dict)
    live: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileWish, ...] = ()
    modules: tuple[str, ...] = ()
    units: tuple[UnitWish, ...] = ()
    udev_trigger: tuple[str, ...] = ()

    @property
    def header(self) -> str:
        return (
            f"# Written by organism.proxmox for its capability {self.capability}; changes made here are overwritten.\n"
        )


@dataclass(frozen=True)
class BootFiles:
    """Where a capability's values are kept for the next boot.

    ``order``: systemd sets sysfs values and loads modules side by side; values of a driver come after its module.
    """

    sysctl: str
    tmpfiles: str
    modules: str
    order: str

    @staticmethod
    def of(wish: Wish) -> BootFiles:
        name = f"organism-{wish.capability}"
        sysctl = wish.sysctl_file or f"/etc/sysctl.d/99-{name}.conf"
        return BootFiles(
            sysctl=sysctl,
            tmpfiles=f"/etc/tmpfiles.d/{name}.conf",
            modules=f"/etc/modules-load.d/{name}.conf",
            order=f"/etc/systemd/system/systemd-tmpfiles-setup.service.d/{name}.conf",
        )


def kind(key: str) -> str:
    """sysctl, sysfs, unit, module, folder, restart or file."""
    before, colon, _name = key.partition(":")
    if colon and before in ("unit", "module", "folder", "restart"):
        return before
    if key.startswith(f"{_sysctl.TOP}/"):
        return "sysctl"
    return "sysfs" if key.startswith(f"{_sysfs.TOP}/") else "file"


@dataclass
class Aims:
    """A wish held against this host: the value for each key, and what the hardware lacks."""

    values: dict[str, Any] = field(default_factory=dict)
    unsupported: list[dict[str, str]] = field(default_factory=list)
    boot_lines: dict[str, tuple[str, str]] = field(default_factory=dict)  # live key -> boot file, line in it


class _Resolver:
    """Builds the aims of a wish; all problems are found before one is told."""

    def __init__(self, wish: Wish, root: Root, units: Mapping[str, UnitState]) -> None:
        self.wish, self.root, self.units = wish, root, units
        self.boot = BootFiles.of(wish)
        self.aims = Aims()
        self.problems: list[str] = []

    def resolve(self) -> Aims:
        self._sysctl()
        boot_sysfs: dict[str, str] = {}
        for values, optional, stays in (
            (self.wish.sysfs, False, True),
            (self.wish.sysfs_optional, True, True),
            (self.wish.live, False, False),
        ):
            usable = {
                path: value for path, value in sorted(values.items()) if self._sysfs(path, value, optional, stays)
            }
            boot_sysfs |= usable if stays else {}
        if boot_sysfs:
            self._file(FileWish(self.boot.tmpfiles, _sysfs.render(boot_sysfs, self.wish.header)))
        if boot_sysfs and self.wish.modules:
            self._file(FileWish(self.boot.order, f"{self.wish.header}[Unit]\nAfter=systemd-modules-load.service\n"))
        self._modules()
        for wish in self.wish.files:
            self._file(wish)
        for unit in self.wish.units:
            self._unit(unit)
        if self.problems:
            raise SettingsRefused(self.problems)
        return self.aims

    def _sysctl(self) -> None:
        paths: dict[str, str] = {}
        for name, value in sorted(self.wish.sysctl.items()):
            try:
                path = _sysctl.path_of(name)
            except ValueError as error:
                self.problems.append(f"sysctl: {error}")
                continue
            why = "" if value else "has no value in this wish"
            why = why or _kernel_value.obstacle(self.root, path) or ""
            if path in paths:
                why = f"is named twice, also as {paths[path]}"
            if why:
                self.problems.append(f"sysctl {name} ({path}) {why}")
                continue
            paths[path] = name
            self.aims.values[path] = value
            self.aims.boot_lines[path] = (self.boot.sysctl, f"{name} = {value}\n")
        if not paths:
            return
        self._file(FileWish(self.boot.sysctl, _sysctl.render(self.wish.sysctl, self.wish.header)))
        known = {name: self.wish.sysctl[name] for name in paths.values()}
        self.problems += [
            f"sysctl: {found} would win over {self.boot.sysctl} at boot: remove that line, "
            "or give sysctl_file a name that comes after it"
            for found in _sysctl.overruled(self.root, self.boot.sysctl, known)
        ]

    def _sysfs(self, path: str, value: str, optional: bool, stays: bool) -> bool:
        """Takes a value in; says whether there is any path to set it at."""
        try:
            _sysfs.check(path)
        except ValueError as error:
            self.problems.append(f"sysfs: {error}")
            return False
        found, why = _sysfs.expand(self.root, path), []
        if not value:
            why.append((path, "has no value in this wish"))
        if not found:
            why.append((path, "matches nothing on this host"))
        usable = []
        for real in found:
            reason = _kernel_value.obstacle(self.root, real) or _kernel_value.not_among(self.root, real, value)
            if reason is None:
                usable.append(real)
            else:
                why.append((real, reason))
        if optional:
            self.aims.unsupported += [{"path": real, "reason": reason} for real, reason in why]
        else:
            self.problems += [f"sysfs {real} {reason}" for real, reason in why]
        for real in usable:
            other = self.aims.values.get(real)
            if other is not None and not _kernel_value.same(other, value):
                self.problems.append(f"sysfs {real} is wanted as {other} and as {value}")
            self.aims.values[real] = value
            if stays:
                self.aims.boot_lines[real] = (self.boot.tmpfiles, _sysfs.line(path, value))
        return bool(usable)

    def _modules(self) -> None:
        for name in self.wish.modules:
            if not _kernel_modules.exists(self.root, name):
                release = self.root.read("/proc/sys/kernel/osrelease")
                self.problems.append(f"kernel module {name} does not exist for the running kernel {release}")
            self.aims.values[f"module:{name}"] = True
            self.aims.boot_lines[f"module:{name}"] = (self.boot.modules, f"{name}\n")
        if self.wish.modules:
            text = self.wish.header + "".join(f"{name}\n" for name in sorted(set(self.wish.modules)))
            self._file(FileWish(self.boot.modules, text))

    def _file(self, wish: FileWish) -> None:
        try:
            _host_files.check(self.root, wish)
        except ValueError as error:
            self.problems.append(f"file {error}")
            return
        if wish.path in self.aims.values:
            self.problems.append(f"file {wish.path} is wanted twice")
        self.aims.values[wish.path] = wish.value
        for folder in _host_files.missing_folders(self.root, wish.path):
            self.aims.values[f"folder:{folder}"] = True

    def _unit(self, wish: UnitWish) -> None:
        state = self.units[wish.name]
        if state.load == "not-found" and wish.optional and not wish.expected:
            self.aims.unsupported.append({"path": wish.name, "reason": "this unit does not exist on this host"})
            return
        why = _unit_state.problem(wish, state) or _unit_state.unmaskable(wish, state, self.root)
        if why:
            self.problems.append(f"unit {wish.name} {why}")
            return
        self.aims.values[f"unit:{wish.name}"] = _unit_state.wanted(wish, state)


@dataclass
class Plan:
    """What is to be done. ``changes``: key to (value of now, value afterwards), all that is set or taken back."""

    wish: Wish
    aims: Aims
    now: dict[str, Any]
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    restarts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # unit -> files that it reads when it starts

    @property
    def difference(self) -> Difference:
        difference = Difference()
        for key, (before, after) in sorted(self.changes.items()):
            if kind(key) == "file":
                difference.add(key, _host_files.shown(before), _host_files.shown(after))
            elif kind(key) != "folder":
                difference.add(key, before, after)
        return difference

    def settings(self, now: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row a thing that is wanted or taken back; ``now``: the values that hold when the rows are read."""
        rows = []
        for key in sorted({*self.aims.values, *self.changes}):
            if kind(key) == "folder":
                continue
            # what is neither wanted nor changed back has no row
            aim = self.aims.values[key] if key in self.aims.values else self.changes[key][1]
            after = now.get(key)
            row = {"kind": kind(key), "key": key.removeprefix("unit:").removeprefix("module:")}
            rows.append(row | {"before": self.now.get(key), "wanted": aim, "after": after, "ok": met(key, after, aim)})
        return rows

    def boot_differs(self) -> list[str]:
        """What is right now and would not be after a boot, or the other way round."""
        found = []
        for key, (file, line) in self.aims.boot_lines.items():
            text = (self.now.get(file) or {}).get("content", "")
            if (line in text.splitlines(keepends=True)) != met(key, self.now.get(key), self.aims.values[key]):
                found.append(key)
        return sorted(found)


def met(key: str, now: Any, aim: Any) -> bool:
    """Is a key's value as wanted?"""
    if kind(key) in ("sysctl", "sysfs") and now is not None and aim is not None:
        return _kernel_value.same(now, aim)
    if kind(key) == "unit" and now is not None and aim is not None:
        return _unit_state.reached(now, aim)
    return bool(now == aim)


def present_value(key: str, root: Root, units: Mapping[str, UnitState]) -> Any:
    """The value of now. Raises OSError on a file that cannot be read."""
    what = kind(key)
    if what == "unit":
        return _unit_state.value(units[key.removeprefix("unit:")])
    if what == "module":
        return _kernel_modules.loaded(root, key.removeprefix("module:"))
    if what == "folder":
        return True if root.path(key.removeprefix("folder:")).is_dir() else None
    if what == "file":
        return _host_files.read(root, key)
    try:
        return _kernel_value.read(root, key)
    except OSError:
        return None  # the device is gone, or its driver


def unit_names(wish: Wish, earlier: EarlierState) -> list[str]:
    """Every unit that the wish or the record names."""
    recorded = [key.partition(":")[2] for key in earlier.kept if kind(key) in ("unit", "restart")]
    return sorted({*(unit.name for unit in wish.units), *recorded})


def survey(wish: Wish, earlier: EarlierState, root: Root, run: Runner) -> dict[str, UnitState]:
    """The units' states, or SettingsRefused where no systemd runs. Raises CommandError."""
    names = unit_names(wish, earlier)
    if names and not booted(root):
        raise SettingsRefused([f"systemd does not run here, so {', '.join(names)} cannot be set"])
    return _unit_state.show(names, run)


def plan(wish: Wish, earlier: EarlierState, root: Root, units: Mapping[str, UnitState]) -> Plan:
    """From what is there, what is wanted and what was there earlier to what is to be done.

    What the record holds and the wish no longer names is taken back; a wish of nothing takes everything back. Raises
    SettingsRefused, OSError.
    """
    aims = _Resolver(wish, root, units).resolve()
    recorded = [key for key in earlier.kept if kind(key) != "restart"]
    restarts = {key: f"unit:{key.partition(':')[2]}" for key in earlier.kept if kind(key) == "restart"}
    keys = {*aims.values, *recorded, *restarts.values()}
    keys |= {half for key in keys if (half := _sysctl.OTHER_HALF.get(key)) and root.exists(half)}
    now = {key: present_value(key, root, units) for key in keys}
    result = Plan(wish, aims, now)
    result.restarts = {
        **{key.partition(":")[2]: tuple(earlier.kept[key].set) for key in restarts},
        **{unit.name: unit.restart_on for unit in wish.units if unit.restart_on},
    }
    for key, aim in aims.values.items():
        if not met(key, now[key], aim):
            result.changes[key] = (now[key], aim)
    dropped = [key for key in recorded if key not in aims.values and not _needed(key, aims)]
    # compared by meaning, as a value may have another spelling than the one that was written
    seen = {key: _as_recorded(key, now[key], earlier) for key in dropped}
    back, others = earlier.to_restore({**{key: kept.before for key, kept in earlier.kept.items()}, **seen})
    for key, value in back.items():
        result.changes[key] = (now[key], value)
    result.others = {key: value for key, value in others.items() if kind(key) != "folder"}
    result.forget = [*dropped, *(key for key, unit in restarts.items() if unit not in aims.values)]
    return result


def _needed(key: str, aims: Aims) -> bool:
    """Is it there for something that is still wanted: a folder for its file, half of a pair for the other half?"""
    if kind(key) == "folder":
        inside = f"{key.removeprefix('folder:')}/"
        return any(wanted.startswith(inside) for wanted in aims.values)
    half = _sysctl.OTHER_HALF.get(key)
    return half is not None and half in aims.values


def _as_recorded(key: str, now: Any, earlier: EarlierState) -> Any:
    kept = earlier.kept[key]
    if kind(key) == "unit" and (
        _unit_state.between(now, kept.before, kept.set) or _unit_state.booted_since(now, kept.set)
    ):
        return kept.set
    for recorded in (kept.before, kept.set):
        if recorded is not None and now is not None and met(key, now, recorded):
            return recorded
    return now


def triggers_udev(changes: Mapping[str, Any]) -> bool:
    return any(posixpath.dirname(key) == UDEV_RULES for key in changes)
