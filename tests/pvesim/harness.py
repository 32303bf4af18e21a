# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A simulated node for a test: `Sim` starts the server's process and ends it, with all its VMs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from .schema import VARIABLE
from .service import SOCKET, ask

HANG_S = 60.0
TESTS = Path(__file__).resolve().parents[1]


class Sim:
    """``with Sim() as sim: ...``. ``top``: the node's files; without it a folder of its own that goes with it.

    ``options``: of ``python -m pvesim`` (``qemu=True``, ``lock_timeout=1``, ``node="pve2"``).
    """

    def __init__(self, top: Path | None = None, **options: Any) -> None:
        # unix sockets' paths are short, and a test's own folder may not be
        self._own = tempfile.TemporaryDirectory(prefix="pvesim-") if top is None else None
        self.top = Path(self._own.name) if self._own is not None else Path(top or "")
        self.options = options
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        self.node = str(options.get("node", "pve1"))

    # ---- the process -------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        words = [sys.executable, "-m", "pvesim", "--dir", str(self.top), "--port", "0"]
        for name, value in self.options.items():
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONDONTWRITEBYTECODE": "1"}
        self.top.mkdir(parents=True, exist_ok=True)
        with (self.top / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"pvesim does not start:\n{(self.top / 'server.log').read_text()}")
        self.port = int(json.loads(line)["port"])
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(HANG_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None
        if self._own is not None:
            self._own.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- where things are --------------------------------------------------------------------------------------------

    @property
    def ca(self) -> Path:
        return self.top / "etc/pve/pve-root-ca.pem"

    @property
    def bin(self) -> Path:
        """The folder of ``pvesh`` and ``qm``."""
        return self.top / "bin"

    @property
    def snippets(self) -> Path:
        """The folder behind ``local:snippets/``."""
        return self.top / "var/lib/vz/snippets"

    def environment(self) -> dict[str, str]:
        """The caller's, with our commands first on PATH."""
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "ORGANISM_PVESH": str(self.bin / "pvesh")}

    # ---- using it ----------------------------------------------------------------------------------------------------

    def control(self, operation: str, **arguments: Any) -> Any:
        """An operation of pvesim/control.py. Raises RuntimeError."""
        return ask(self.top / SOCKET, operation, **arguments)

    def qm(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``qm`` as an operator calls it."""
        return self.run("qm", *words, check=check)

    def run(self, command: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / command), *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=check,
            timeout=HANG_S,
        )

    def hook(self, text: str, name: str = "hook.sh") -> str:
        """Write an executable snippet; returns its volume id."""
        path = self.snippets / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return f"local:snippets/{name}"


def schema_is_there() -> bool:
    """Whether requests are checked; tests that need it skip themselves otherwise, with this variable in the reason."""
    return bool(os.environ.get(VARIABLE))
