# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ZFS modules for one kernel: Debian has their source only, so DKMS builds them once and the cache keeps them."""

from __future__ import annotations

import shlex
from pathlib import Path

from . import debian
from .config import Settings
from .errors import RigError
from .show import say


def modules(where: Settings, release: str) -> Path:
    """A tar of lib/modules/RELEASE/updates (about 2 MB). Built in about three minutes unless it is in the cache."""
    archive = where.modules / f"{release}.tar"
    if archive.exists():
        return archive
    where.modules.mkdir(parents=True, exist_ok=True)
    where.modules.chmod(0o777)  # the hook runs as the root of a user name space where we are not root
    unfinished = archive.with_suffix(".new")
    say(f"building ZFS for {release} with DKMS, once (about three minutes; log: {where.logs / 'zfs.log'})")
    packages = ["dkms", "zfs-dkms", "gcc", "make", "kmod", "xz-utils", f"linux-headers-{release}"]
    quoted = shlex.quote(release)
    hooks = [
        f'chroot "$1" dkms autoinstall -k {quoted}',
        f'tar -C "$1/usr" -cf {shlex.quote(str(unfinished))} lib/modules/{quoted}/updates',
    ]
    try:
        debian.mmdebstrap(where, "zfs", packages, hooks=hooks)
        if not unfinished.exists() or unfinished.stat().st_size < 100_000:
            raise RigError(f"DKMS built no ZFS for {release}", f"the log is {where.logs / 'zfs.log'}")
        unfinished.rename(archive)
    finally:
        unfinished.unlink(missing_ok=True)
        where.modules.chmod(0o755)
    return archive
