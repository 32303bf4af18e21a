# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The audit of kernel values, files, kernel modules and units, as ``_host_settings`` and ``_owned_files`` record them.

A value in /proc/sys or /sys is wanted as recorded, and as the capability's files for the boot say: what was right
before the first run has no record of its own, and stands in those files all the same.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from . import _host_settings, _kernel_value, _sysctl, _sysfs, _unit_state
from ._earlier import EarlierState, Kept
from ._host_audit import BOOT, NOW, Host, Verdict
from ._root import Root
from ._systemd import CommandError, UnitState, booted

_SILENT = ("folder", "restart")  # a folder is as good as the file in it, a restart is no state


def judge(host: Host, earlier: EarlierState) -> Verdict:
    """One record. What it does not know is skipped by name."""
    verdict = Verdict(earlier.capability)
    units = _units(host, earlier, verdict)
    boot = BootValues.read(host.root, earlier)
    live: dict[str, str] = {}
    for key, kept in sorted(earlier.kept.items()):
        kind = _host_settings.kind(key)
        if kind in _SILENT:
            continue
        if kind == "file" and not (key.startswith("/") and (kept.set is None or _is_file(kept.set))):
            verdict.skip(NOW, key, "the audit cannot read this kind of record")
        elif kind == "unit":
            name = key.removeprefix("unit:")
            if name in units:
                _unit(verdict, name, kept, units[name])
        elif kind == "file":
            _file(host.root, verdict, key, kept)
        elif kind == "module":
            now = _host_settings.present_value(key, host.root, {})
            verdict.judge(NOW, key, now == kept.set, f"loaded: {now}, wanted: {kept.set}")
        else:
            live[key] = str(kept.set)
    for key, value in sorted({**boot.wanted(host.root), **live}.items()):
        _value(host.root, verdict, boot, key, value)
    return verdict


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and "content" in value


def _units(host: Host, earlier: EarlierState, verdict: Verdict) -> dict[str, UnitState]:
    names = [key.removeprefix("unit:") for key in earlier.kept if key.startswith("unit:")]
    if not names:
        return {}
    why = "systemd does not run here"
    try:
        if booted(host.root):
            return _unit_state.show(names, host.run)
    except CommandError as error:
        why = str(error)
    for name in names:
        verdict.skip(NOW, name, why)
    return {}


def _unit(verdict: Verdict, name: str, kept: Kept, state: UnitState) -> None:
    now = _unit_state.value(state)
    runs, wanted = ("running" if each else "stopped" for each in (now["active"], kept.set["active"]))
    failed = f" ({state.result})" if state.result not in ("", "success") else ""
    right = now["active"] == kept.set["active"] or _unit_state.booted_since(now, kept.set)
    verdict.judge(NOW, name, right, f"is {runs}{failed}, wanted {wanted}")
    found = f"is {now['enabled'] or state.load}, wanted {kept.set['enabled']}"
    enabled = _unit_state.reached({**now, "active": True}, {**kept.set, "active": True})
    verdict.judge(BOOT, name, enabled, found)


def _file(root: Root, verdict: Verdict, path: str, kept: Kept) -> None:
    now = _host_settings.present_value(path, root, {})
    if kept.set is None:
        verdict.judge(BOOT, path, now is None, "is there, and was removed")
        return
    if now is None:
        what = "is not there"
    elif now.get("content") != kept.set["content"]:
        what = "has another content"
    else:
        differs = [name for name in kept.set if now.get(name) != kept.set[name]]
        what = ", ".join(f"{name} is {now.get(name)}, wanted {kept.set[name]}" for name in differs)
    verdict.judge(BOOT, path, now == kept.set, what)


class BootValues:
    """What a capability's files set at boot, as they are now and as they were written."""

    def __init__(self) -> None:
        self.sysctl: dict[str, tuple[str, str, str]] = {}  # path -> value, name, file
        self.sysfs: dict[str, str] = {}  # path or pattern -> value
        self.written: dict[str, str] = {}  # the same of both kinds, as it was written
        self.rule = False

    @staticmethod
    def read(root: Root, earlier: EarlierState) -> BootValues:
        boot = BootValues()
        names = _host_settings.BootFiles.of(_host_settings.Wish(earlier.capability))
        files = {names.sysctl: "", names.tmpfiles: ""}
        for key, kept in earlier.kept.items():
            if _host_settings.kind(key) == "file" and _is_file(kept.set):
                files[key] = str(kept.set["content"])
        for path, written in files.items():
            now = root.read_or_none(path) or ""
            if "sysctl.d" in path.split("/"):
                for _number, name, value in _sysctl.lines(now):
                    boot.sysctl[_sysctl.path_of(name)] = (value, name, path)
                boot.written |= {_sysctl.path_of(name): value for _n, name, value in _sysctl.lines(written or now)}
            elif "tmpfiles.d" in path.split("/"):
                boot.sysfs |= _tmpfiles(now)
                boot.written |= _tmpfiles(written or now)
            boot.rule |= path.startswith(_host_settings.UDEV_RULES)
        return boot

    def wanted(self, root: Root) -> dict[str, str]:
        """Existing path to value, patterns resolved."""
        return {
            path: value for pattern, value in self.written.items() for path in _sysfs.expand(root, pattern)
        }  # fmt: skip

    def sysfs_value(self, path: str) -> str | None:
        for pattern, value in self.sysfs.items():
            if pattern == path or (pattern.count("/") == path.count("/") and fnmatch.fnmatchcase(path, pattern)):
                return value
        return None


def _tmpfiles(text: str) -> dict[str, str]:
    """Path (or pattern) to value of the lines that write (``_sysfs.line``)."""
    found = {}
    for line in text.splitlines():
        words = line.split(None, 6)
        if len(words) == 7 and words[0] == "w":
            found[words[1].replace("%%", "%")] = words[6].replace("%%", "%").replace("\\\\", "\\")
    return found


def _value(root: Root, verdict: Verdict, boot: BootValues, path: str, wanted: str) -> None:
    """A kernel value: the live one, and what will set it at boot."""
    now = _host_settings.present_value(path, root, {})
    if now is None and path.startswith("/sys/") and not root.exists(path):
        verdict.skip(NOW, path, "it is not there now: the device or its driver has gone")
        return
    verdict.judge(NOW, path, now is not None and _kernel_value.same(now, wanted), f"is {now}, wanted {wanted}")
    if path.startswith("/proc/sys/"):
        if path not in boot.sysctl and _sysctl.OTHER_HALF.get(path) in boot.sysctl:
            return  # the kernel itself zeroes the other half
        value, name, file = boot.sysctl.get(path, (None, "", ""))
        if value is None:
            verdict.judge(BOOT, path, False, f"no sysctl.d file of this capability sets it, wanted {wanted}")
            return
        verdict.judge(BOOT, path, _kernel_value.same(value, wanted), f"{file} sets {value}, wanted {wanted}")
        for other in _sysctl.overruled(root, file, {name: value}):
            verdict.judge(BOOT, path, False, f"{other} wins over {file} at boot: remove that line")
        return
    at_boot = boot.sysfs_value(path)
    if at_boot is None and boot.rule:
        return  # the udev rule sets it; that file is judged as such
    said = "no tmpfiles.d file of this capability sets it" if at_boot is None else f"the boot sets {at_boot}"
    verdict.judge(
        BOOT, path, at_boot is not None and _kernel_value.same(at_boot, wanted), f"{said}, wanted {wanted}"
    )  # fmt: skip
