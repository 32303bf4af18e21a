# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hookscripts: checked and run as PVE::GuestHelpers does, in the worker, without any time limit."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping

from . import warm
from .errors import ApiError, Died
from .node import Node
from .tasks import Task


def check(node: Node, volume: str) -> str:
    """The script's path. Raises Died."""
    path, kind = node.storages.path(volume)
    if kind != "snippets":
        raise Died(f"'{volume}' is not in the snippets directory")
    if not path.is_file():
        raise Died(f"script '{volume}' does not exist")
    if not os.access(path, os.X_OK):
        raise Died(f"script '{volume}' is not executable")
    return str(path)


def run(
    node: Node,
    config: Mapping[str, str],
    vmid: int,
    phase: str,
    task: Task | None,
    *,
    stop_on_error: bool = False,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Run the VM's hookscript in a phase; its output goes to the task's log. Only pre-start fails its caller."""
    if "hookscript" not in config:
        return
    say = task.log if task is not None else node.syslog
    try:
        _run(node, check(node, config["hookscript"]), vmid, phase, task, extra or {})
    except ApiError as error:
        text = f"hookscript error for {vmid} on {phase}: {error.message}\n\n"
        if stop_on_error:
            raise Died(text) from None
        say(text.rstrip("\n"))


def _started(node: Node, words: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes] | warm.Child:
    if node.settings.hook_server is not None:
        return warm.start(node.settings.hook_server, words, environment)
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", env=environment
    )


def _run(node: Node, script: str, vmid: int, phase: str, task: Task | None, extra: Mapping[str, str]) -> None:
    words = [script, str(vmid), phase]
    say = task.log if task is not None else node.syslog
    try:
        child = _started(node, words, {**node.environment(), **extra})
    except OSError as error:
        raise Died(f"command '{shlex.join(words)}' failed: {error.strerror}") from None
    if task is not None:
        task.child = child
    assert child.stdout is not None
    for line in child.stdout:
        say(line.decode(errors="replace").rstrip("\n"))
    code = child.wait()
    child.stdout.close()
    if task is not None:
        task.child = None
        task.interrupted()
    if code < 0:
        raise Died(f"command '{shlex.join(words)}' failed: got signal {-code}")
    if code:
        raise Died(f"command '{shlex.join(words)}' failed: exit code {code}")
