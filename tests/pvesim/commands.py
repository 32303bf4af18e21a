# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``pvesh`` and ``qm``: their words become calls of the API by root@pam, their workers run in the foreground.

``pvesh`` ends with 0 when the call succeeded, even if the task that it started failed; ``qm`` ends with 255 then
(PVE::CLI::pvesh, PVE::CLI::qm with its upid_exit).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .access import ROOT, Caller
from .errors import ApiError, Died, bad_parameters
from .node import Node
from .routing import Router
from .schema import Schema
from .tasks import Task

VERBS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}
FAILED = 255


@dataclass
class Terminal:
    """Where a command's words go."""

    out: Callable[[str], None]
    err: Callable[[str], None]


@dataclass
class Commands:
    """Both commands over one node."""

    node: Node
    router: Router
    schema: Schema | None

    def run(self, command: str, words: list[str], terminal: Terminal) -> int:
        """The exit code."""
        try:
            if command == "pvesh":
                return self._pvesh(words, terminal)
            return self._qm(words, terminal)
        except ApiError as error:
            terminal.err(error.text)
            return FAILED

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        return self.router.dispatch(self.node, self.schema, Caller(ROOT, cli=True), verb, path, params)

    def _follow(self, answer: Any, terminal: Terminal) -> Task | None:
        """Show a task's log while it runs; None when the answer is no task."""
        task = self.node.tasks.by_upid.get(answer) if isinstance(answer, str) else None
        if task is None:
            return None
        shown = 0
        while True:
            with task.changed:
                task.changed.wait_for(lambda seen=shown: len(task.lines) > seen)  # type: ignore[misc]  # a lambda's default
                fresh = task.lines[shown:]
            shown += len(fresh)
            for line in fresh:
                if not line.startswith("TASK "):
                    terminal.out(line + "\n")
                elif line.startswith("TASK ERROR: "):
                    terminal.err(line.removeprefix("TASK ERROR: ") + "\n")
            if task.exitstatus is not None and shown == len(task.lines):
                return task

    # ---- pvesh -------------------------------------------------------------------------------------------------------

    def _pvesh(self, words: list[str], terminal: Terminal) -> int:
        if len(words) < 2 or words[0] not in VERBS:
            terminal.err(f"ERROR: pvesim knows pvesh {'|'.join(VERBS)} PATH [OPTIONS]\n")
            return FAILED
        params = options(words[2:])
        form = params.pop("output-format", "text")
        params.pop("noproxy", None)
        quiet = params.pop("quiet", None)
        try:
            answer = self._call(VERBS[words[0]], words[1], params)
        except ApiError as error:
            if error.status == 501 and "not implemented" in error.message:
                raise Died(f"no '{words[0]}' handler for '{words[1]}'") from None
            usage = f"pvesh {words[0]} <api_path> [OPTIONS] [FORMAT_OPTIONS]\n" if error.status == 400 else ""
            terminal.err(error.text + usage)
            return FAILED
        self._follow(answer, terminal)
        if answer is None or quiet:
            return 0
        if form not in ("json", "json-pretty"):
            terminal.err("pvesim: of pvesh's formats only json and json-pretty are simulated\n")
            return FAILED
        terminal.out(json.dumps(answer, sort_keys=True, indent=3 if form == "json-pretty" else None) + "\n")
        return 0

    # ---- qm ----------------------------------------------------------------------------------------------------------

    def _qm(self, words: list[str], terminal: Terminal) -> int:
        if not words:
            terminal.err("ERROR: no command specified\n")
            return FAILED
        name, rest = words[0], words[1:]
        top = f"/nodes/{self.node.name}/qemu"
        if name == "list":
            self._list(terminal)
            return 0
        tasks = {
            "start": "start",
            "stop": "stop",
            "shutdown": "shutdown",
            "reboot": "reboot",
        }
        known = {*tasks, "create", "destroy", "set", "config", "pending", "status", "unlock", "wait"}
        if name not in known:
            terminal.err(f"pvesim does not know: qm {name}\n")
            return FAILED
        if not rest:
            raise ApiError(400, "not enough arguments")
        if not rest[0].isdigit():
            raise bad_parameters({"vmid": f"type check ('integer') failed - got '{rest[0]}'"})
        vmid, params = rest[0], options(rest[1:])
        answer: Any = None
        if name in tasks:
            answer = self._call("POST", f"{top}/{vmid}/status/{tasks[name]}", params)
        elif name == "create":
            answer = self._call("POST", top, {"vmid": vmid, **params})
        elif name == "destroy":
            answer = self._call("DELETE", f"{top}/{vmid}", params)
        elif name == "set":
            self._call("PUT", f"{top}/{vmid}/config", params)
            terminal.out(f"update VM {vmid}: {' '.join(f'-{key} {value}' for key, value in sorted(params.items()))}\n")
        else:
            return self._look(name, int(vmid), params, terminal)
        task = self._follow(answer, terminal)
        return FAILED if task is not None and task.failed else 0

    def _look(self, name: str, vmid: int, params: dict[str, Any], terminal: Terminal) -> int:
        path = f"/nodes/{self.node.name}/qemu/{vmid}"
        if name == "config":
            for key, value in sorted(self._call("GET", f"{path}/config", params).items()):
                if key != "digest":
                    terminal.out(f"{key}: {value}\n")
        elif name == "pending":
            for item in self._call("GET", f"{path}/pending", params):
                if item["key"] == "digest":
                    continue
                if "value" in item:
                    terminal.out(f"{'del' if 'delete' in item else 'cur'} {item['key']}: {item['value']}\n")
                if "pending" in item:
                    terminal.out(f"new {item['key']}: {item['pending']}\n")
        elif name == "status":
            status = self._call("GET", f"{path}/status/current", {})
            shown = status if params.get("verbose") else {"status": status["status"]}
            terminal.out("".join(f"{key}: {value}\n" for key, value in sorted(shown.items())))
        elif name == "unlock":
            with self.node.vm_lock(vmid):
                conf = self.node.configs.load(vmid)
                conf.values.pop("lock", None)
                self.node.configs.write(vmid, conf)
        else:
            return self._wait(vmid, params)
        return 0

    def _wait(self, vmid: int, params: dict[str, Any]) -> int:
        machine = self.node.machine(vmid)
        timeout = float(params["timeout"]) if "timeout" in params else None
        if machine is not None and not machine.wait(timeout):
            raise Died("got timeout")
        return 0

    def _list(self, terminal: Terminal) -> None:
        rows = self._call("GET", f"/nodes/{self.node.name}/qemu", {})
        if not rows:
            return
        terminal.out(f"{'VMID':>10} {'NAME':<20} {'STATUS':<10} {'MEM(MB)':<10} {'BOOTDISK(GB)':>12} {'PID':<10}\n")
        for row in sorted(rows, key=lambda each: int(each["vmid"])):
            memory, disk, pid = row["maxmem"] // 1024**2, row["maxdisk"] / 1024**3, row.get("pid", 0)
            terminal.out(
                f"{row['vmid']:>10} {row['name']:<20} {row['status']:<10} {memory:<10} {disk:>12.2f} {pid:<10}\n"
            )


def options(words: list[str]) -> dict[str, Any]:
    """``--key value``, ``-key value``, ``--key=value``, and ``--key`` alone for 1; a key that comes again is a list.

    Raises 400 for a word that is none.
    """
    found: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-") or word in ("-", "--"):
            raise ApiError(400, f"too many arguments: {word}")
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            if position < len(words) and not (words[position].startswith("-") and len(words[position]) > 1):
                value = words[position]
                position += 1
            else:
                value = "1"
        if key in found:
            before = found[key]
            found[key] = [*(before if isinstance(before, list) else [before]), value]
        else:
            found[key] = value
    return found
