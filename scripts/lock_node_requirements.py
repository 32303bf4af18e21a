# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the hashes into runtime/requirements-node.txt: `.cache/venv/bin/python scripts/lock_node_requirements.py`.

Edit the pins in that file (add what they depend on: nothing is resolved here), then run this. It downloads every file
that a node of Python 3.11 to 3.13 on x86_64 may get, and writes their hashes under each pin.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from organism.core._wheelhouse import PLATFORMS

FILE = Path(__file__).resolve().parents[1] / "runtime" / "requirements-node.txt"
PYTHONS = ("3.11", "3.12", "3.13")


def hashes(pin: str) -> list[str]:
    """sha256 of each file that pip chooses for `pin` on one of the nodes' Pythons."""
    found: set[str] = set()
    for version in PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
            tags += ["--abi", f"cp{version.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"),
                    *("--python-version", version, "--implementation", "cp", *tags, "--dest", folder, pin),
                ],
                check=True,
            )
            found |= {hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}
    return sorted(found)


def main() -> None:
    out: list[str] = []
    for line in FILE.read_text().splitlines():
        if line.lstrip().startswith("--hash"):
            continue
        pin = re.match(r"[A-Za-z0-9._-]+==[^\s\\]+", line)
        if pin is None:
            out.append(line)
            continue
        out.append(pin[0] + "".join(f" \\\n    --hash=sha256:{value}" for value in hashes(pin[0])))
    FILE.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
