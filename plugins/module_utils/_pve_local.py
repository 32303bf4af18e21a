# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Proxmox VE through ``pvesh`` on the node itself, as root: the only way but a ticket to set root@pam's own keys.

``pvesh create`` of a method that starts a task stays with the task: its log comes on standard output before the UPID,
and pvesh ends with 0 even if the task failed (PVE::RESTEnvironment, fork_worker: the caller gets the UPID alone). So
a UPID that comes back has ended already, and `wait` reads how.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from . import _pve_tasks
from ._pve_errors import PveError, PveForbidden, PveTimeout, PveUnreachable, classify

PVESH = "pvesh"
VERBS = {"GET": "get", "POST": "create", "PUT": "set", "DELETE": "delete"}

_ERROR_LINE = re.compile(r"^([A-Za-z0-9_\[\]-]+): (.+)$", re.MULTILINE)
_STATUS = re.compile(r"^(\d{3}) (.*)", re.DOTALL)


class LocalPve:
    """The protocol `Pve` through ``pvesh --output-format json``.

    ``timeout``: seconds for one call. ``task_timeout``: for a call that starts a task, since pvesh stays with it.
    ``program``: which pvesh; the environment variable ORGANISM_PVESH names another one for tests.
    """

    backend = "local"
    is_root = True

    def __init__(self, timeout: float = 60.0, task_timeout: float = 3600.0, program: str | None = None) -> None:
        self.timeout = timeout
        self.task_timeout = task_timeout
        self.program = program or os.environ.get("ORGANISM_PVESH") or PVESH

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, params, self.timeout)

    def post(self, path: str, **params: Any) -> Any:
        return self._call("POST", path, params, self.task_timeout)

    def put(self, path: str, **params: Any) -> Any:
        return self._call("PUT", path, params, self.task_timeout)

    def delete(self, path: str, **params: Any) -> Any:
        return self._call("DELETE", path, params, self.task_timeout)

    def wait(self, upid: str, timeout: float) -> _pve_tasks.TaskResult:
        return _pve_tasks.wait(self.get, upid, timeout)

    def _call(self, method: str, path: str, params: Mapping[str, Any], timeout: float) -> Any:
        words = [self.program, VERBS[method], path, *command_words(params), "--output-format", "json"]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError:
            raise PveUnreachable(
                f"{method} {path}: {self.program} is not installed here; backend local works on a Proxmox VE node "
                "alone, elsewhere give api_host (backend https)",
                path=path,
            ) from None
        except PermissionError as error:
            raise PveForbidden(
                f"{method} {path}: {self.program} cannot be run: {error}", status=None, path=path
            ) from None
        except subprocess.TimeoutExpired:
            raise PveTimeout(
                f"{method} {path}: pvesh did not end within {timeout:g} s; what it started may still run: see "
                "pvesh get /cluster/tasks",
                path=path,
            ) from None
        if done.returncode != 0:
            raise failure(method, path, done.stderr or done.stdout)
        return answer(method, path, done.stdout)


def command_words(params: Mapping[str, Any]) -> list[str]:
    """Parameters as options of pvesh: a list is the option several times, booleans are 1 and 0."""
    words: list[str] = []
    for key, value in params.items():
        if value is None:
            continue
        each_one = value if isinstance(value, (list, tuple)) else [value]
        # with "=", since a value may begin with a dash
        words.extend(f"--{key}={int(each) if isinstance(each, bool) else each}" for each in each_one)
    return words


def answer(method: str, path: str, stdout: str) -> Any:
    """The data of an answer: the last JSON value, for a task's log may stand before it. Raises PveError."""
    text = stdout.strip()
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        last = text.splitlines()[-1].strip()
    if _pve_tasks.is_upid(last):
        return last
    try:
        return json.loads(last)
    except ValueError as error:
        raise PveError(
            f"{method} {path}: pvesh answered something else than JSON ({error}): {last[:200]}", path=path
        ) from None


def failure(method: str, path: str, stderr: str) -> PveError:
    """The error for pvesh's complaint, whose first line may begin with the HTTP status."""
    text = stderr.strip()
    if "please run as root" in text:
        return PveForbidden(
            f"{method} {path}: pvesh answers root alone; use become: true, or give api_host (backend https)",
            status=None,
            path=path,
        )
    found = _STATUS.match(text)
    status = int(found[1]) if found else None
    said = found[2] if found else text
    said = said.split("\npvesh ", 1)[0]  # the usage that follows a wrong parameter
    errors = {}
    if "Parameter verification failed" in said:
        status = status or 400
        head, _newline, rest = said.partition("\n")
        errors = dict(_ERROR_LINE.findall(rest))
        said = head
    return classify(status, said or "no reason given", method=method, path=path, errors=errors)
