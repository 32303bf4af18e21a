# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a storage of Proxmox VE may hold: kinds of content are added, never taken away. And a pool of ZFS as a storage.

The installer's ``local`` has neither ``snippets`` nor, on older nodes, ``import``, and a list of them shows nothing
without an error.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._difference import Difference
from ._pve_client import Pve, PveRefused, PveStaleDigest

STALE_TRIES = 4
_DATASET = re.compile(r"[A-Za-z][\w.:-]*(/[\w.:-]+)*", re.ASCII)  # zpool-create(8), zfs(8)
ZFSPOOL_CONTENT = ("images", "rootdir")  # PVE::Storage::ZFSPoolPlugin, plugindata


@dataclass(frozen=True)
class Outcome:
    """``path``: the folder of a storage that has one, else empty."""

    difference: Difference = field(default_factory=Difference)
    path: str = ""
    content: tuple[str, ...] = ()


def allow(pve: Pve, storage: str, wanted: Sequence[str], *, check: bool) -> Outcome:
    """Raises PveError, PveRefused for files on a storage that has no folder."""
    attempt = 0
    while True:
        attempt += 1
        present = pve.get(f"/storage/{storage}")
        have = [kind for kind in str(present.get("content") or "").split(",") if kind]
        missing = [kind for kind in wanted if kind not in have]
        path = str(present.get("path") or "")
        files = [kind for kind in wanted if kind in ("snippets", "import", "iso")]
        if files and not path and missing:
            raise PveRefused(
                f"storage {storage} ({present.get('type')}) has no folder for {', '.join(files)}; "
                "name one of type dir, nfs, cifs or cephfs"
            )
        outcome = Outcome(Difference(), path, (*have, *missing))
        if not missing:
            return outcome
        outcome.difference.add(f"content of storage {storage}", ",".join(have), ",".join(outcome.content))
        if check:
            return outcome
        try:
            pve.put(f"/storage/{storage}", content=",".join(outcome.content), digest=present.get("digest"))
        except PveStaleDigest:
            if attempt == STALE_TRIES:
                raise
        else:
            return outcome


def offer(pve: Pve, storage: str, pool: str, wanted: Sequence[str], *, sparse: bool, check: bool) -> Outcome:
    """Make the ZFS pool or dataset ``pool`` a storage for ``wanted``; one of that name on the same pool is kept.

    Raises PveError, PveRefused for a storage of that name that is something else.
    """
    if not _DATASET.fullmatch(pool):
        raise PveRefused(f"zfs_pool {pool!r} names no pool and no dataset (zfs list shows those that are)")
    if alien := [kind for kind in wanted if kind not in ZFSPOOL_CONTENT]:
        raise PveRefused(f"a ZFS pool holds {' and '.join(ZFSPOOL_CONTENT)}, and not {', '.join(alien)}")
    present = _find(pve, storage)
    if present is None:
        outcome = Outcome(content=tuple(wanted))
        outcome.difference.add(f"storage {storage}", "none", f"zfspool {pool}")
        if not check:
            made = {"type": "zfspool", "pool": pool, "content": ",".join(wanted), "sparse": sparse}
            pve.post("/storage", storage=storage, **made)
        return outcome
    _same(storage, present, pool)
    outcome = allow(pve, storage, wanted, check=check)
    if bool(int(present.get("sparse") or 0)) != sparse:
        outcome.difference.add(f"sparse volumes of storage {storage}", not sparse, sparse)
        if not check:
            pve.put(f"/storage/{storage}", sparse=sparse)
    return outcome


def withdraw(pve: Pve, node: str, storage: str, pool: str, *, check: bool) -> Outcome:
    """The storage's entry goes, its data never do. Raises PveError, PveRefused while it has volumes."""
    outcome = Outcome()
    present = _find(pve, storage)
    if present is None:
        return outcome
    _same(storage, present, pool)
    held = sorted(str(each["volid"]) for each in pve.get(f"/nodes/{node}/storage/{storage}/content"))
    if held:
        raise PveRefused(f"it holds {', '.join(held[:5])}; move or remove these first, then take it away")
    outcome.difference.add(f"storage {storage}", f"zfspool {pool}", "none")
    if not check:
        pve.delete(f"/storage/{storage}")
    return outcome


def _find(pve: Pve, storage: str) -> Mapping[str, Any] | None:
    # one that is missing is an error 500 when it is asked for by name
    return next((each for each in pve.get("/storage") if each["storage"] == storage), None)


def _same(storage: str, present: Mapping[str, Any], pool: str) -> None:
    if (present.get("type"), present.get("pool")) != ("zfspool", pool):
        there = present.get("pool") or present.get("path") or ""
        raise PveRefused(
            f"storage {storage} is there as {present.get('type')} {there}, and not as zfspool {pool}; choose another"
        )
