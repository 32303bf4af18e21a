# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading a file that programs write: as a whole, or not at all.

A file counts as read when nothing about it has changed meanwhile. Where a change cannot be seen (a program has it
mapped for writing, or it was touched within the clock's tick) it is read twice and has to be the same both times: what
was there between the two readings is then what was read.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection

from ._overlay import Entry, read_entry
from ._ramlayer_copy import digest
from ._ramlayer_seen import SLACK

_TRIES = 4
# it was removed, or another kind of thing took its name
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV)


def settled(
    path: str, read: Callable[[], str], *, mapped: Collection[int], looked: int, known: Entry | None = None
) -> tuple[Entry, str] | None:
    """A file's entry and digest as of one instant, or None when it does not hold still or is gone.

    ``read`` reads it (and copies, perhaps) and returns the digest. ``mapped`` are inodes that were mapped for writing
    at the time ``looked`` (ns since 1970). ``known`` is an entry seen before: when it still holds after the reading,
    nothing has changed in between. Raises OSError for anything but a name that has gone.
    """
    try:
        for attempt in range(_TRIES):
            before = known if known is not None and not attempt else read_entry(path)
            began = time.time_ns()
            if before.kind != "file":
                return None
            found = read()
            after = read_entry(path)
            if _moved(before, after):
                continue
            # a mapping made since is seen by its mark in the time of access
            if after.inode not in mapped and after.atime_ns < looked and after.ctime_ns < began - SLACK:
                return after, found
            if after.ctime_ns >= began - SLACK:
                time.sleep(SLACK / 1e9)  # the clock's tick is over: another change gets another time
            if digest(path) == found and not _moved(after, read_entry(path)):
                return after, found
    except OSError as error:
        if error.errno not in _GONE or _still(path):
            raise
    return None


def _moved(one: Entry, other: Entry) -> bool:
    return one._replace(atime_ns=0) != other._replace(atime_ns=0)


def _still(path: str) -> bool:
    """Whether it is a file yet: then what was missing was something else, on the side that is written to."""
    try:
        return read_entry(path).kind == "file"
    except OSError:
        return False


def forgotten(target: str) -> None:
    """Remove what a reading has left under ``target``; nothing is no error."""
    try:
        os.unlink(target)  # noqa: PTH108 - as text
    except FileNotFoundError:
        return
