# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying out a plan of host settings: recorded first, then done in an order that holds, then read back.

Order: units that are to be off, files, kernel modules, live values, the files that set them at boot, units that are to
be on. So nothing undoes a value meanwhile, a value that the kernel refuses never gets into a boot file, and a unit
starts under the settings that it is meant for. Taking back goes the same way.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import _host_files, _kernel_modules, _kernel_value, _sysctl, _unit_state
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._host_settings import BootFiles, Plan, Wish, kind, met, plan, present_value, survey, triggers_udev
from ._kernel_value import KernelRefused, Writer
from ._root import Root
from ._systemd import CommandError, Runner, run_command


class SettingsFailed(Exception):
    """A change that could not be made. ``done``: what had been done before; it is recorded, so it can be taken back."""

    def __init__(self, reason: str, done: list[str]) -> None:
        before = f"done before that: {', '.join(done)}" if done else "nothing had been changed"
        super().__init__(f"{reason} ({before})")
        self.reason = reason
        self.done = done


@dataclass
class Outcome:
    """What a call has found and done; ``settings`` has a row for each thing."""

    difference: Difference
    settings: list[dict[str, Any]]
    unsupported: list[dict[str, str]]
    kept_by_others: list[dict[str, Any]]
    boot_differs: list[str]
    done: list[str] = field(default_factory=list)


def patient(argv: list[str]) -> str:
    """Runs a program and waits ten minutes: switching a full swap off brings all of it back into the memory first."""
    return run_command(argv, timeout=600)


def converge(
    wish: Wish,
    *,
    check: bool,
    root: Root | None = None,
    run: Runner = patient,
    writer: Writer = _kernel_value.write,
) -> Outcome:
    """Bring a host to a wish; a wish of nothing takes the capability back.

    ``check``: only say what would be done. Raises SettingsRefused (nothing changed), SettingsFailed, EarlierStateError,
    CommandError (before anything changed) and OSError.
    """
    root = root or Root()
    earlier = EarlierState(wish.capability, root)
    units = survey(wish, earlier, root, run)
    found = plan(wish, earlier, root, units)
    others = [_other(key, value) for key, value in sorted(found.others.items())]
    if check:
        return Outcome(
            found.difference, found.settings(found.now), found.aims.unsupported, others, found.boot_differs()
        )
    hand = _Hand(found, earlier, root, run, writer)
    rows = hand.carry_out()
    others += hand.left
    return Outcome(found.difference, rows, found.aims.unsupported, others, found.boot_differs(), hand.done)


def _other(key: str, value: Any) -> dict[str, Any]:
    reason = "it is gone" if value is None else "somebody else has changed it since"
    return {"key": key, "now": value, "reason": reason}


class _Hand:
    """Does one plan."""

    def __init__(self, found: Plan, earlier: EarlierState, root: Root, run: Runner, writer: Writer) -> None:
        self.plan, self.earlier, self.root, self.run, self.writer = found, earlier, root, run, writer
        self.done: list[str] = []
        self.left: list[dict[str, Any]] = []

    def carry_out(self) -> list[dict[str, Any]]:
        """All of it; returns the rows of settings as read back. Raises SettingsFailed."""
        try:
            if self.plan.changes:
                self._remember()
                self._change()
            rows = self._read_back()
        except (KernelRefused, CommandError) as error:
            raise SettingsFailed(str(error), self.done) from error
        except OSError as error:
            raise SettingsFailed(f"{error.filename or 'the system'}: {error.strerror or error}", self.done) from error
        if self.plan.forget:
            self.earlier.forget(list(self.earlier.kept) if self._nothing_wanted() else self.plan.forget)
        return rows

    def _nothing_wanted(self) -> bool:
        return not self.plan.aims.values

    def _remember(self) -> None:
        kept = {}
        for key, (before, after) in self.plan.changes.items():
            if key in self.plan.aims.values:
                kept[key] = Kept(before, after)
                half = _sysctl.OTHER_HALF.get(key)
                if half and half not in self.plan.aims.values and self.plan.now.get(half, "0") != "0":
                    kept[half] = Kept(self.plan.now[half], "0")
        for unit in self.plan.wish.units:
            if unit.restart_on:  # so that taking the files back makes the unit start again, too
                kept[f"restart:{unit.name}"] = Kept(list(unit.restart_on), list(unit.restart_on))
        if kept:
            self.earlier.remember(kept)

    def _change(self) -> None:
        changes = self.plan.changes
        boot = BootFiles.of(self.plan.wish)
        boot_files = (boot.sysctl, boot.tmpfiles, boot.modules)
        unit_now = {key: before for key, (before, _after) in changes.items() if kind(key) == "unit"}
        aims = {key.removeprefix("unit:"): changes[key][1] for key in unit_now}
        calls = _unit_state.calls({key.removeprefix("unit:"): value for key, value in unit_now.items()}, aims)
        self._systemctl(calls.first)
        files = [key for key in sorted(changes) if kind(key) == "file"]
        self._files([key for key in files if key not in boot_files])
        self._reload(files)
        self._modules(wanted=True)
        self._values()
        self._files([key for key in files if key in boot_files])
        self._systemctl(self._restarts(calls.last, files))
        self._modules(wanted=False)
        for key in sorted(changes, reverse=True):  # the innermost folder first
            if kind(key) == "folder" and changes[key][1] is None:
                path = key.removeprefix("folder:")
                if _host_files.remove_folder(self.root, path):
                    self.done.append(f"removed {path}")
                else:
                    self.left.append({"key": key, "now": True, "reason": "others have files in it"})

    def _systemctl(self, calls: list[tuple[str, ...]]) -> None:
        for words in calls:
            self.run(["systemctl", "--no-ask-password", *words])
            self.done.append(f"systemctl {' '.join(words)}")

    def _files(self, keys: list[str]) -> None:
        for key in keys:
            value = self.plan.changes[key][1]
            _host_files.write(self.root, key, value)
            self.done.append(f"{'removed' if value is None else 'wrote'} {key}")

    def _reload(self, files: list[str]) -> None:
        """Let systemd and udev read what has changed: /etc/systemd feeds systemd's generators too."""
        if any(key.startswith("/etc/systemd/") for key in files) and self.root.exists("/run/systemd/system"):
            self._systemctl([("daemon-reload",)])
        if not triggers_udev(dict.fromkeys(files)):
            return
        calls = [["udevadm", "control", "--reload"]]
        if self.plan.wish.udev_trigger:
            match = [f"--subsystem-match={name}" for name in self.plan.wish.udev_trigger]
            calls.append(["udevadm", "trigger", "--action=change", "--settle", *match])
        for argv in calls:
            self.run(argv)
            self.done.append(" ".join(argv))

    def _modules(self, *, wanted: bool) -> None:
        for key, (before, after) in sorted(self.plan.changes.items()):
            name = key.removeprefix("module:")
            if kind(key) != "module" or bool(after) is not wanted or before == after:
                continue
            if wanted:
                self.run(["modprobe", "--", name])
            elif _kernel_modules.in_use(self.root, name):
                self.left.append({"key": key, "now": True, "reason": "in use, so it stays loaded until the next boot"})
                continue
            else:
                self.run(["modprobe", "--remove", "--", name])
            self.done.append(f"{'loaded' if wanted else 'unloaded'} module {name}")

    def _values(self) -> None:
        keys = [key for key in self.plan.changes if kind(key) in ("sysctl", "sysfs")]

        def turn(key: str) -> tuple[bool, bool, bool, str]:
            # bytes after the ratio of the same name, which zeroes them; a lower limit that falls before its upper one,
            # which the kernel would keep above it (otherwise "max" is before "min" by name, as rising limits need it)
            falls = _falls(key, *self.plan.changes[key])
            return kind(key) != "sysctl", key.endswith("_bytes"), not falls, key

        for key in sorted(keys, key=turn):
            before, after = self.plan.changes[key]
            if after is None or met(key, present_value(key, self.root, {}), after):
                continue  # a udev rule or a module of this run has set it
            _kernel_value.set_and_verify(self.root, key, after, self.writer)
            self.done.append(f"{key} {before} -> {after}")

    def _restarts(self, calls: list[tuple[str, ...]], files: list[str]) -> list[tuple[str, ...]]:
        """The calls that switch on, and a restart of units that run on and whose files have changed."""
        names = []
        for name, reads in sorted(self.plan.restarts.items()):
            now = self.plan.now.get(f"unit:{name}") or {}
            aim = self.plan.changes.get(f"unit:{name}", (now, now))[1]
            if set(reads) & set(files) and now.get("active") and aim["active"]:
                names.append(name)
        if len(names) < 2:
            return [*calls, ("restart", *names)] if names else calls
        # systemd 257.13 dispatches the restart of a swap again and again while that of the service below it is under
        # way, and gives up at its start limit; stopped and then started they come up
        return [*calls, ("stop", *names), ("start", *names)]

    def _read_back(self) -> list[dict[str, Any]]:
        """Everything once more, as the system has it now. Raises KernelRefused on what is not as it was set."""
        keys = [key for key in {**self.plan.aims.values, **self.plan.changes} if kind(key) != "folder"]
        if not self.plan.changes:
            return self.plan.settings(self.plan.now)
        names = [key.removeprefix("unit:") for key in keys if kind(key) == "unit"]
        units = _unit_state.show(names, self.run)
        now = {key: present_value(key, self.root, units) for key in keys}
        rows = self.plan.settings(now)
        stay = {other["key"] for other in self.left}
        wrong = [row for row in rows if not row["ok"] and f"{row['kind']}:{row['key']}" not in stay]
        if wrong:
            raise KernelRefused("; ".join(_said(row) for row in wrong))
        # a unit that came with a file of this run shows only now how it is enabled
        changed = [key for key in self.plan.changes if kind(key) == "unit" and key in self.plan.aims.values]
        self.earlier.remember({key: Kept(None, now[key]) for key in changed})
        return rows


def _falls(key: str, before: Any, after: Any) -> bool:
    """Is it a lower limit (``min_perf_pct``, ``scaling_min_freq``) that gets smaller?"""
    lower = "min" in key.rsplit("/", 1)[-1].split("_")
    return lower and str(before).isdigit() and str(after).isdigit() and int(after) < int(before)


def _said(row: dict[str, Any]) -> str:
    text = f"{row['kind']} {row['key']} is {_short(row['after'])} although {_short(row['wanted'])} was set"
    if row["kind"] == "unit":
        return f"{text}: see systemctl status {row['key']}"
    return text


def _short(value: Any) -> str:
    if isinstance(value, dict) and "enabled" in value:
        return f"{value['enabled'] or 'not enabled'} and {'active' if value['active'] else 'inactive'}"
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
