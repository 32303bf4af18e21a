# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that are whole at every instant: written beside the old one, synced, then renamed over it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable (fsync(2): a renamed file needs its directory synced too)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(
    path: str | os.PathLike[str],
    content: str | bytes,
    *,
    mode: int = 0o644,
    uid: int = -1,
    gid: int = -1,
    durable: bool = True,
) -> None:
    """Replace a file's content in one step; a reader or a crash sees the old file or the new one, never a part.

    ``mode``, ``uid`` and ``gid`` are set before the content is visible under the name (-1 keeps the process's own).
    ``durable`` also survives a power cut. Raises OSError.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            if uid != -1 or gid != -1:
                os.fchown(stream.fileno(), uid, gid)
            stream.write(data)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(target.parent)
