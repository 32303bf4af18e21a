# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a storage of Proxmox VE may hold: kinds of content are added, never taken away.

The installer's ``local`` has neither ``snippets`` nor, on older nodes, ``import``, and a list of them shows nothing
without an error.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ._difference import Difference
from ._pve_client import Pve, PveRefused, PveStaleDigest

STALE_TRIES = 4


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
