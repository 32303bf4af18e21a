# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A simulated node with the guard on it as the roles leave it: six VMs that want four GPUs, one host's memory, and
turns.

100 vm-train   GPU 1 and 2    preempts 101 and 105, and is preempted by them
101 vm-infer   GPU 1
102 pool-a     GPU 3 or 4     excludes 103, by refusal
103 cuda       GPU 3
104 pool-b     GPU 3 or 4
105 vm-lab     GPU 2, most of the memory
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pvesim import warm
from pvesim.harness import Sim
from pvesim.service import SOCKET, Line

import organism.core
from organism.core import _guard_host, _guard_profile, _host_tools
from organism.core._guard_config import CONFIG, Config, GroupWish
from organism.core._root import Root

VMIDS = range(100, 106)
SHAPES = {
    100: ("vm-train", 8192, ("0000:01:00", "0000:02:00")),
    101: ("vm-infer", 4096, ("0000:01:00",)),
    102: ("pool-a", 4096, ("mapping=pool",)),
    103: ("cuda", 8192, ("0000:03:00",)),
    104: ("pool-b", 4096, ("mapping=pool",)),
    105: ("vm-lab", 20480, ("0000:02:00",)),
}
POOL = ("0000:03:00", "0000:04:00")
GROUPS = {"ml": {100, 101, 105}, "three": {102, 103}}
TOTAL, RESERVE = 32768, 2048
CONFIGURED = Config(
    groups=(
        GroupWish("ml", "preempt", ("vm-train", "vm-infer", "105")),
        GroupWish("three", "refuse", ("pool-a", "cuda")),
    ),
    reserve=RESERVE,
    shutdown_timeout=5,
    stop_timeout=5,
    lock_wait=60,
    start_wait=60,
    deadline=90,
    modes={"train": "vm-train", "infer": "vm-infer"},
)
_OURS = r"organism-guard|snippets/organism-hook|mlmode|organism-hook$"
HANG_S = 240.0
"""Hang guard of a call; none takes a tenth of that."""

_HOOK = """\
#!/usr/bin/python3 -I
# organism-hook as installed, over this node's files
import os
import sys

sys.path.insert(0, {tools!r})
from organism.core import _hook
from organism.core._hook_run import run_plan
from organism.core._root import Root


def say(line):
    sys.stdout.write(line + "\\n")
    sys.stdout.flush()


root = Root({top!r})
vmid, phase = _hook.check_call(sys.argv[1:])
plan = _hook.plan(root, phase, vmid, _hook.settings(root), owner=os.geteuid())
sys.exit(run_plan(plan, root, os.environ, say).code)
"""


def _ended(code: int, text: str) -> tuple[bool, str]:
    """A command that was killed cannot say so itself."""
    return code == 0, f"{text}\nwas killed by signal {-code}" if code < 0 else text


class Place:
    """``with Place() as place``: the node, its VMs, and the ways in which people ask for them."""

    def __init__(self, *, forked: bool = False) -> None:
        """``forked``: hook and commands are forked instead of executed (`chaos.guard.warm`)."""
        self._folder = tempfile.TemporaryDirectory(prefix="storm-")
        self.top = Path(self._folder.name)
        self._server: subprocess.Popen[bytes] | None = None
        self._warm = self.top / "warm.sock" if forked else None
        self.sim = Sim(self.top, gpus=4, **({"hook_server": self._warm} if forked else {}))

    def __enter__(self) -> Self:
        self.sim.start()
        if self._warm is not None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "chaos.guard.warm", str(self.top), str(self._warm)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            assert self._server.stdout is not None
            if not self._server.stdout.readline():
                raise RuntimeError("chaos.guard.warm does not start")
        self._install()
        for vmid in VMIDS:
            self._create(vmid)
        self._authority = ssl.create_default_context(cafile=str(self.sim.ca))
        self._authority.check_hostname = False
        secret = self.sim.control("token", user="root@pam", token_id="gui", privsep=False)
        self._token = f"root@pam!gui={secret}"
        return self

    def __exit__(self, *_: object) -> None:
        self.sim.stop()
        if self._server is not None:
            self._server.kill()
            self._server.communicate(timeout=HANG_S)
        self._folder.cleanup()

    def _install(self) -> None:
        package = Path(organism.core.__file__).parents[1]
        files = _host_tools.collect(package)
        _host_tools.apply(Root(self.top), _host_tools.read(Root(self.top)), files)
        tools = self.top / "opt/organism/host"
        self.guard = [str(tools.resolve() / "bin/organism-guard"), "--root", str(self.top)]
        self.mlmode = [str(tools.resolve() / "bin/mlmode"), "--root", str(self.top)]
        texts = {
            CONFIG: CONFIGURED.text(),
            _guard_profile.ENTRIES[0]: _guard_host.pre_start_text(CONFIGURED),
            _guard_profile.ENTRIES[1]: _guard_host.POST_STOP_TEXT,
            "/proc/meminfo": f"MemTotal:       {TOTAL * 1024} kB\n",
        }
        for name, text in texts.items():
            path = self.top / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(_guard_host.COMMAND, " ".join(self.guard)))
            path.chmod(0o755)
        qm = self.top / "usr/sbin/qm"
        qm.parent.mkdir(parents=True, exist_ok=True)
        qm.symlink_to(self.sim.bin / "qm")
        self.volume = self.sim.hook(_HOOK.format(tools=str(tools.resolve()), top=str(self.top)), "organism-hook")

    def _create(self, vmid: int) -> None:
        if vmid == min(VMIDS):
            cards = {each["address"]: each for each in self.sim.control("devices")}
            maps = []
            for path in POOL:
                card = cards[f"{path}.0"]
                maps += ["--map", f"node={self.sim.node},path={path},id={card['vendor']}:{card['device']},"
                         f"subsystem-id={':'.join(card['subsystem'])},iommugroup={card['group']}"]  # fmt: skip
            self.sim.run("pvesh", "create", "/cluster/mapping/pci", "--id", "pool", *maps)
        name, memory, devices = SHAPES[vmid]
        words = [word for index, text in enumerate(devices) for word in (f"--hostpci{index}", text)]
        self.sim.qm("create", vmid, "--name", name, "--memory", memory, *words)
        self.sim.qm("set", vmid, "--hookscript", self.volume)

    # ---- ways in -----------------------------------------------------------------------------------------------------

    @contextmanager
    def connected(self) -> Iterator[http.client.HTTPSConnection]:
        made = http.client.HTTPSConnection("127.0.0.1", self.sim.port, context=self._authority, timeout=HANG_S)
        try:
            yield made
        finally:
            made.close()

    def ask(self, connection: http.client.HTTPSConnection, verb: str, path: str, **params: Any) -> Any:
        """A call as the GUI makes it; the data. Raises RuntimeError with what Proxmox VE answers."""
        headers = {"Authorization": f"PVEAPIToken={self._token}", "Content-Type": "application/x-www-form-urlencoded"}
        connection.request(verb, f"/api2/json{path}", urllib.parse.urlencode(params), headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.reason}: {text}")
        return json.loads(text)["data"]

    def task(self, path: str, **params: Any) -> tuple[bool, str]:
        """Start a task and wait for it: did it succeed, and its log with the exit status."""
        with self.connected() as connection:
            try:
                upid = self.ask(connection, "POST", path, **params)
            except RuntimeError as error:
                return False, str(error)
            place = f"/nodes/{self.sim.node}/tasks/{urllib.parse.quote(upid, safe='')}"
            while (status := self.ask(connection, "GET", f"{place}/status"))["status"] != "stopped":
                self.pause()
            lines = [line["t"] for line in self.ask(connection, "GET", f"{place}/log?limit=0")]
        end = status["exitstatus"]
        return end == "OK" or end.startswith("WARNINGS"), "\n".join([*lines, end])

    def by_api(self, vmid: int, action: str, **params: Any) -> tuple[bool, str]:
        return self.task(f"/nodes/{self.sim.node}/qemu/{vmid}/status/{action}", **params)

    def backup(self, vmid: int, mode: str) -> tuple[bool, str]:
        return self.task(f"/nodes/{self.sim.node}/vzdump", vmid=vmid, mode=mode)

    def call(self, words: list[str]) -> tuple[bool, str]:
        if self._warm is not None and Path(words[0]).name in ("organism-guard", "mlmode"):
            child = warm.start(self._warm, words, os.environ)
            with child.stdout:
                text = child.stdout.read().decode(errors="replace")
            return _ended(child.wait(HANG_S), text)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S, check=False
        )
        return _ended(done.returncode, done.stdout + done.stderr)

    def by_qm(self, *words: object) -> tuple[bool, str]:
        return self.call([str(self.sim.bin / "qm"), *map(str, words)])

    @staticmethod
    def pause() -> None:
        """The API tells of a task's end to those who ask."""
        time.sleep(0.2)

    # ---- what is -----------------------------------------------------------------------------------------------------

    def running(self) -> dict[int, int]:
        """VMID to process, at one instant."""
        return {int(vmid): pid for vmid, pid in self.sim.control("machines").items()}

    def watched(self) -> Line:
        """A connection for who looks all the time."""
        return Line(self.top / SOCKET)

    def leases(self) -> set[int]:
        folder = self.top / "run/organism/guard/leases"
        return {int(path.stem) for path in folder.glob("*.json")}

    def devices(self) -> dict[str, int]:
        """Device to the VM whose running process Proxmox VE has noted for it."""
        pids = self.running()
        return {
            address: each["vmid"]
            for address, each in self.sim.control("reservations").items()
            if each["pid"] is not None and pids.get(each["vmid"]) == each["pid"]
        }

    def busy(self) -> bool:
        """Does anything go on? A killed guard leaves its ``qm`` behind, which goes on to stop a VM; and a VM that has
        ended is cleaned up after."""
        gone = set(VMIDS) - set(self.running())
        flags = self.top / "run/qemu-server"
        return bool(
            self._processes(rf"{_OURS}|/bin/qm\b")
            or self.sim.control("tasks")
            or any((flags / f"{vmid}.cleanup").exists() for vmid in gone)
        )

    def hooks(self) -> list[int]:
        """Processes of the guard: hooks, and commands that serve a request."""
        return self._processes(_OURS)

    def _processes(self, pattern: str) -> list[int]:
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace")
                    name = Path(entry.path, "comm").read_text(errors="replace").strip()
                except OSError:
                    continue  # it has ended
                if str(self.top) in words and re.search(pattern, f"{words} {name}"):
                    found.append(int(entry.name))
        return found
