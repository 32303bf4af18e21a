# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Debian tree every node is a copy of: built once with mmdebstrap, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from . import host
from .config import SUITE, Settings
from .errors import LabError
from .show import step

PACKAGES = (
    # the system itself
    "systemd", "systemd-sysv", "dbus", "libpam-systemd", "kmod", "procps", "iproute2", "util-linux", "ca-certificates",
    # what Ansible needs on a node
    "openssh-server", "sudo", "python3", "python3-apt", "python3-venv", "acl",
    # what the roles need: a node has no way out of the lab, so everything is baked in
    "python3-cryptography", "rsync", "less", "openssl", "chrony",
)  # fmt: skip
# A tree for tests and demos: documentation and translations stay out (about 100 MB).
_LEFT_OUT = ("doc/*", "man/*", "locale/*", "info/*", "lintian/*")
_STAMP = "organism-lab-tree.json"


def _fields(stanza: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in stanza.splitlines():
        key, separator, value = line.partition(":")
        if separator and not line.startswith(("#", " ", "\t")):
            found[key.strip().lower()] = value.strip()
    return found


def debian_uris(texts: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Find the Debian archive and its security archive in apt's configuration.

    ``texts`` are (file name, content) of sources.list and sources.list.d (one-line and deb822 style, sources.list(5)).
    Gives two URIs, empty where the host has none (an Ubuntu host has neither: its archive carries no Debian suite).
    A Debian archive is recognised by its suites: a Debian code name, or ``stable`` and the like.
    """
    names = "stretch|buster|bullseye|bookworm|trixie|forky|sid|oldstable|stable|testing|unstable"
    archive = security = ""
    entries: list[tuple[str, str, str]] = []
    for name, text in texts:
        if name.endswith(".sources"):
            for stanza in re.split(r"\n\s*\n", text):
                fields = _fields(stanza)
                if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
                    for uri in fields.get("uris", "").split():
                        entries += [(uri, suite, fields.get("components", "")) for suite in fields["suites"].split()]
        else:
            for line in text.splitlines():
                match = re.match(r"\s*deb\s+(?:\[[^]]*]\s+)?(\S+)\s+(\S+)\s*(.*)", line)
                if match:
                    entries.append((match[1], match[2], match[3]))
    for uri, suite, components in entries:
        if "main" not in components.split() or not uri.startswith(("http://", "https://", "file:", "copy:", "mirror+")):
            continue
        if re.fullmatch(rf"({names})(-security|/updates)", suite):
            security = security or uri
        elif re.fullmatch(rf"({names})(-updates)?", suite):
            archive = archive or uri
    return archive, security


def _host_sources() -> list[tuple[str, str]]:
    base = Path("/etc/apt")
    files = [
        base / "sources.list",
        *sorted(base.glob("sources.list.d/*.list")),
        *sorted(base.glob("sources.list.d/*.sources")),
    ]
    return [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in files if path.is_file()]


def sources_list(archive: str, security: str) -> str:
    """The tree's apt sources; empty when the host knows no Debian archive (mmdebstrap then uses Debian's default)."""
    if not archive:
        return ""
    lines = [f"deb {archive} {SUITE} main", f"deb {archive} {SUITE}-updates main"]
    if security:
        lines.append(f"deb {security} {SUITE}-security main")
    return "\n".join(lines) + "\n"


def recipe() -> str:
    """Identifies what the tree is built from; a tree of another recipe is built anew."""
    text = json.dumps([SUITE, PACKAGES, _LEFT_OUT, _CUSTOMIZE])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Runs in the finished tree ($1). Units that would wait for a terminal or for the internet have no place in it.
_CUSTOMIZE = """
chroot "$1" systemctl enable systemd-networkd.service ssh.service
chroot "$1" systemctl mask console-getty.service getty.target apt-daily.timer apt-daily-upgrade.timer \
  e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-firstboot.service
rm -f "$1"/etc/ssh/ssh_host_*_key "$1"/etc/ssh/ssh_host_*_key.pub "$1"/etc/resolv.conf "$1"/etc/hostname
rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/log/apt "$1"/var/log/bootstrap.log "$1"/var/log/dpkg.log
"""


def ready(where: Settings) -> bool:
    """True when a finished tree of the present recipe lies in the cache."""
    try:
        return bool(json.loads((where.tree / "etc" / _STAMP).read_text(encoding="utf-8"))["recipe"] == recipe())
    except (FileNotFoundError, ValueError, KeyError, NotADirectoryError):
        return False


def build(where: Settings) -> None:
    """Build the tree unless a finished one lies in the cache. Takes about half a minute and 250 MB."""
    if ready(where):
        return
    where.shared.mkdir(parents=True, exist_ok=True)
    where.folder.mkdir(parents=True, exist_ok=True)
    where.logs.mkdir(parents=True, exist_ok=True)
    unfinished = where.tree.with_name(f"{where.tree.name}.{os.getpid()}.new")
    log = where.logs / "tree.log"
    archive, security = debian_uris(_host_sources())
    listing = sources_list(archive, security)
    command = [
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--keyring={host.KEYRING}",
        "--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude=/usr/share/{pattern}" for pattern in _LEFT_OUT),
        f"--include={','.join(PACKAGES)}", f"--customize-hook={_CUSTOMIZE}", SUITE, str(unfinished),
        *(["-"] if listing else []),
    ]  # fmt: skip
    try:
        with step(f"building the Debian {SUITE} tree, once (log: {log})", f"Debian {SUITE} tree built"):
            with log.open("w", encoding="utf-8") as output:
                done = subprocess.run(
                    command,
                    input=listing,
                    text=True,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=1500,
                )
            if done.returncode:
                tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-8:])
                raise LabError(
                    f"mmdebstrap ended with {done.returncode}:\n{tail}",
                    f"the whole log is {log}; does `apt-get update` work on this host?",
                )
            stamp = {"recipe": recipe(), "suite": SUITE, "packages": PACKAGES}
            (unfinished / "etc" / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
            if where.tree.exists():
                shutil.rmtree(where.tree)
            unfinished.rename(where.tree)
    finally:
        if unfinished.exists():
            for point in host.mounts_below(unfinished):
                host.run("umount", point)
            shutil.rmtree(unfinished)
