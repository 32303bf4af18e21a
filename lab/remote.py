# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The product's own commands on the lab's nodes, through ssh."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

from .config import Node, Settings, State
from .errors import LabError
from .lifecycle import ssh_command

BIN = "/opt/organism/venv/bin"


class Remote:
    """Runs commands on nodes; the ssh connection is shared and stays open between them."""

    def __init__(self, where: Settings, state: State) -> None:
        self.where = where
        self.state = state
        self.conductor = state.first("conductor")

    def call(self, node: Node, *words: str, timeout: float = 60, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run one command and give what it printed, whatever its exit code."""
        command = ssh_command(self.where, node, shlex.join(words))
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"`{shlex.join(words)}` on {node.name} did not end within {timeout:g} s", f"./run lab ssh {node.name}"
            ) from error
        if done.returncode == 255:  # ssh's own exit code: no connection
            raise LabError(f"no SSH connection to {node.name}: {done.stderr.strip()}", "./run lab status")
        return done

    def text(self, node: Node, *words: str, timeout: float = 60) -> str:
        """Run one command that must succeed; gives its standard output."""
        done = self.call(node, *words, timeout=timeout)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise LabError(
                f"`{shlex.join(words)}` on {node.name} ended with {done.returncode}: {said}",
                f"./run lab ssh {node.name} {shlex.join(words)}",
            )
        return done.stdout

    def maestro(self, *words: str, timeout: float = 60, stdin: str = "", may_fail: bool = False) -> dict[str, Any]:
        """``maestroctl --json`` on the conductor; gives its JSON object. Raises unless it says ``ok`` (or may fail)."""
        done = self.call(self.conductor, f"{BIN}/maestroctl", "--json", *words, timeout=timeout, stdin=stdin)
        try:
            answer = json.loads(done.stdout)
        except ValueError as error:
            said = (done.stderr or done.stdout).strip()
            raise LabError(f"maestroctl {words[0]} gave no JSON (exit code {done.returncode}): {said}") from error
        if not isinstance(answer, dict) or not (may_fail or answer.get("ok")):
            raise LabError(f"maestroctl {words[0]} failed: {done.stdout.strip()}")
        return answer

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.maestro("list", "--all", "--limit", "1000")["jobs"])
