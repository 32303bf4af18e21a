# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole files of a capability, brought about and taken back by its record of earlier state.

For capabilities that compute their files and change other things in the same step; those that only set files, kernel
values and units use the module ``host_settings``. Keys of the record: a file's path, and ``folder:/path`` for a folder
that had to be made.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import _host_files
from ._difference import Difference
from ._earlier import EarlierState, Kept
from ._host_files import FileWish
from ._root import Root

_FOLDER = "folder:"


@dataclass
class FilePlan:
    """``others``: files (with what they are now) that are not taken back, since somebody has changed them."""

    difference: Difference = field(default_factory=Difference)
    writes: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    remember: dict[str, Kept] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)

    def touches(self, prefix: str) -> bool:
        """Does it write or remove something below a folder?"""
        return any(path.startswith(prefix) for path in self.writes)


def plan(root: Root, earlier: EarlierState, wishes: Iterable[FileWish]) -> FilePlan:
    """What has to change to have just these files of ours. Raises ValueError for a path that cannot be, OSError."""
    made = FilePlan()
    wanted = {wish.path: wish for wish in wishes}
    for path, wish in wanted.items():
        _host_files.check(root, wish)
        before = _host_files.read(root, path)
        if before != wish.value:
            made.difference.add(path, _host_files.shown(before), _host_files.shown(wish.value))
            made.writes[path] = wish.value
            made.remember[path] = Kept(before, wish.value)
            for folder in _host_files.missing_folders(root, path):
                made.remember[_FOLDER + folder] = Kept(None, True)
    ours = [key for key in earlier.kept if key.startswith("/")]
    present = {key: _host_files.read(root, key) for key in ours}
    back, others = earlier.to_restore(present)
    for key in ours:
        if key in wanted:
            continue
        made.forget.append(key)
        if key in others:
            made.others[key] = _host_files.shown(others[key])
        elif key in back:
            made.difference.add(key, _host_files.shown(present[key]), _host_files.shown(back[key]))
            made.writes[key] = back[key]
    needed = {folder for path in wanted for folder in _above(path)}
    made.forget += [key for key in earlier.kept if key.startswith(_FOLDER) and key[len(_FOLDER) :] not in needed]
    return made


def _above(path: str) -> list[str]:
    """The folders above a file."""
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: count + 1]) for count in range(len(parts))]


def apply(root: Root, earlier: EarlierState, made: FilePlan) -> None:
    """Record, write, remove, and forget what was taken back. Raises OSError."""
    earlier.remember(made.remember)
    for path, value in made.writes.items():
        _host_files.write(root, path, value)
    folders = sorted((key[len(_FOLDER) :] for key in made.forget if key.startswith(_FOLDER)), reverse=True)
    for folder in folders:
        _host_files.remove_folder(root, folder)
    if made.forget:
        earlier.forget(made.forget)
