# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host was like before a capability changed it, so that taking the capability back restores exactly that.

One file a capability, ``/var/lib/organism/earlier/<capability>.json``. Each thing that is changed has a key (a path, a
sysctl, a unit) and two values: ``before``, seen the first time and kept ever since, and ``set``, what was last set
there. The file is written and synced *before* the change is made, so a run that is cut short can still be taken back.

Rule of taking back: a thing that still is as it was ``set`` returns to ``before``; a thing that somebody has changed
since is left as it is and named (later edits by others survive).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._atomic import fsync_directory, write_atomic
from ._root import Root

FOLDER = "/var/lib/organism/earlier"
FORMAT = 1


class EarlierStateError(Exception):
    """The record cannot be read: it names the file and what to do."""


@dataclass(frozen=True)
class Kept:
    """``before``: the value of the first time (None: it did not exist). ``set``: what was last set (None: removed)."""

    before: Any
    set: Any


class EarlierState:
    """The record of one capability. Values are JSON values; they are compared as such."""

    def __init__(self, capability: str, root: Root | None = None) -> None:
        if not capability or "/" in capability or capability.startswith("."):
            raise ValueError(f"a capability's name is a file name, not {capability!r}")
        self.capability = capability
        self._path = (root or Root()).path(f"{FOLDER}/{capability}.json")
        self._kept: dict[str, Kept] = self._load()

    def _load(self) -> dict[str, Kept]:
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise EarlierStateError(f"{self._path}: {error}; move it away to go on without it") from error
        try:
            if raw["format"] != FORMAT:
                raise EarlierStateError(f"{self._path}: format {raw['format']}, and this version reads {FORMAT}")
            return {key: Kept(value["before"], value["set"]) for key, value in raw["kept"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise EarlierStateError(f"{self._path}: not a record of earlier state; move it away") from error

    @property
    def kept(self) -> Mapping[str, Kept]:
        return self._kept

    def remember(self, changes: Mapping[str, Kept]) -> None:
        """Record what is about to be changed, durably; call it before the change.

        A key that is already there keeps its ``before`` and takes the new ``set``. Raises OSError.
        """
        merged = dict(self._kept)
        for key, change in changes.items():
            before = merged[key].before if key in merged else change.before
            merged[key] = Kept(before, change.set)
        if merged != self._kept:
            self._kept = merged
            self._save()

    def forget(self, keys: list[str] | None = None) -> None:
        """Drop some keys, or all: then the file goes. Raises OSError."""
        self._kept = {} if keys is None else {key: kept for key, kept in self._kept.items() if key not in set(keys)}
        self._save()

    def to_restore(self, present: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What to set back, and what stays: (key to earlier value, key to the value that somebody else has set).

        ``present``: the values of now, by key; a key that is missing there does not exist now (None).
        """
        back, others = {}, {}
        for key, kept in self._kept.items():
            now = present.get(key)
            if now == kept.before:
                continue
            if now == kept.set:
                back[key] = kept.before
            else:
                others[key] = now
        return back, others

    def _save(self) -> None:
        if not self._kept:
            if self._path.exists():
                self._path.unlink()
                fsync_directory(self._path.parent)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = {key: {"before": value.before, "set": value.set} for key, value in sorted(self._kept.items())}
        document = json.dumps({"format": FORMAT, "capability": self.capability, "kept": kept}, indent=1)
        write_atomic(self._path, document + "\n", mode=0o600)
