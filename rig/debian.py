# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Debian's packages for the rig: where they come from, which kernel is current, and how a tree is made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab.tree import debian_uris

from .config import SUITE, Settings
from .errors import RigError, Unavailable

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_ARCHIVE = ("http://deb.debian.org/debian", "http://deb.debian.org/debian-security")
# documentation and translations stay out (about 100 MB)
LEFT_OUT = ("doc/*", "man/*", "locale/*", "info/*", "lintian/*")
BUILD_SECONDS = 3000
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "sfdisk": "fdisk",
    "iasl": "acpica-tools",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


def search_path() -> str:
    """PATH with sbin, which a plain user's lacks on Debian."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def require_tools() -> None:
    """Raise `Unavailable`, naming the packages, when a tool is missing."""
    missing = {name: package for name, package in TOOLS.items() if not shutil.which(name, path=search_path())}
    if not KEYRING.exists():
        missing[KEYRING.name] = "debian-archive-keyring"
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise Unavailable(
            f"the rig lacks {', '.join(sorted(missing))}", f"apt-get install {packages} (./run setup does)"
        )


def sources(suite: str = SUITE, components: str = "main contrib") -> str:
    """Lines of a sources.list for ``suite`` from the archive that this host itself uses (contrib holds ZFS)."""
    base = Path("/etc/apt")
    files = [
        base / "sources.list",
        *sorted(base.glob("sources.list.d/*.list")),
        *sorted(base.glob("sources.list.d/*.sources")),
    ]
    texts = [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in files if path.is_file()]
    archive, security = debian_uris(texts)
    archive, security = archive or DEFAULT_ARCHIVE[0], security or (DEFAULT_ARCHIVE[1] if not archive else "")
    signed = f"[signed-by={KEYRING}]"
    lines = [f"deb {signed} {archive} {suite}{kind} {components}" for kind in ("", "-updates")]
    if security:
        lines.append(f"deb {signed} {security} {suite}-security {components}")
    return "\n".join(lines) + "\n"


def kernel_release(flavour: str, suite: str = SUITE) -> str:
    """The kernel that linux-image-FLAVOUR of ``suite`` stands for now, like 6.12.63+deb13-cloud-amd64.

    Asks the archive with an apt of its own (no root, nothing of the host's apt is touched).
    """
    with tempfile.TemporaryDirectory(prefix="organism-rig-apt-") as folder:
        place = Path(folder)
        for name in ("lists/partial", "cache/archives/partial", "etc/preferences.d", "etc/apt.conf.d"):
            (place / name).mkdir(parents=True)
        (place / "sources.list").write_text(sources(suite), encoding="utf-8")
        (place / "status").touch()
        options = {
            "Dir::Etc": place / "etc",
            "Dir::Etc::sourcelist": place / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": place / "lists",
            "Dir::State::status": place / "status",
            "Dir::Cache": place / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        _quiet(["apt-get", "-q", *flags, "update"])
        shown = _quiet(["apt-cache", *flags, "depends", f"linux-image-{flavour}"])
    found = re.search(r"Depends: linux-image-(\d\S+)", shown)
    if found is None:
        raise RigError(
            f"the archive of {suite} names no kernel for linux-image-{flavour}:\n{shown}", "does apt-get update work?"
        )
    return found[1]


def mmdebstrap(
    where: Settings,
    name: str,
    packages: Sequence[str],
    *,
    suite: str = SUITE,
    variant: str = "minbase",
    hooks: Sequence[str] = (),
    target: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """Install ``packages`` into a tree and run ``hooks`` on it (shell; $1 is the tree; as root of its name space).

    The tree is thrown away unless ``target`` names a folder for it. The log is ``NAME.log`` of the rig's log folder.
    As root mmdebstrap works directly, else in a user name space (newuidmap and a range in /etc/subuid are needed then).
    """
    where.logs.mkdir(parents=True, exist_ok=True)
    log = where.logs / f"{name}.log"
    mode = "root" if os.geteuid() == 0 else "unshare"
    command = ["mmdebstrap", f"--mode={mode}", f"--variant={variant}", f"--format={'directory' if target else 'null'}"]
    command += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io", *options]
    command += [f"--dpkgopt=path-exclude=/usr/share/{pattern}" for pattern in LEFT_OUT]
    command += [f"--include={','.join(packages)}", *(f"--customize-hook={hook}" for hook in hooks)]
    command += [suite, str(target) if target else "/dev/null", "-"]
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8"}
    with log.open("w", encoding="utf-8") as output:
        work = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            work.communicate(sources(suite), timeout=BUILD_SECONDS)
        except BaseException:
            work.terminate()  # it cleans up after itself, which it could not if it were killed
            work.wait()
            raise
    if work.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise RigError(f"mmdebstrap ({name}) ended with {work.returncode}:\n{tail}", f"the whole log is {log}")


def _quiet(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RigError(
            f"{command[0]} {command[-1]} ended with {done.returncode}:\n{done.stderr[-1500:]}", "is the network up?"
        )
    return done.stdout
