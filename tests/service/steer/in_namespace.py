# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run in a network and mount namespace of its own: the library and the keeper against a real veth pair.

``in_namespace.py FOLDER CASE`` prints one JSON document. A veth has no ``device``, so it is declared a port here: that
is the only thing that is not the product's.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from organism.core import _netdev, _nic_apply, _steer_config
from organism.core._nic import Nics
from organism.core._nic_plan import NicWish
from organism.core._root import Root
from organism.host.steer import Keeper

GUARD = 60  # seconds, against a hang


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=GUARD)


def queue(name: str, file: str) -> str:
    return Path(f"/sys/class/net/v0/queues/{name}/{file}").read_text(encoding="ascii").strip()


def queues() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net/v0/queues").iterdir())


def is_veth(_root: Root, name: str) -> bool:
    return name == "v0"


def wish() -> NicWish:
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    return NicWish(
        ("v0",), cpus, channels=2, rps=True, xps=True, flow_entries=4096, offloads={"gro": True, "lro": True}
    )


def library(root: Root) -> dict[str, Any]:
    """Check, apply, apply again, back; what the kernel says after each."""
    nics = Nics(root)
    wishes = {"nic": wish()}
    foretold = _nic_apply.steer(nics, wishes, check=True)
    done = _nic_apply.steer(nics, wishes)
    held = {
        file: queue(name, file) for name, file in (("rx-1", "rps_cpus"), ("rx-0", "rps_flow_cnt"), ("tx-1", "xps_cpus"))
    }
    fewer = queues()
    again = _nic_apply.steer(nics, wishes)
    back = _nic_apply.restore(nics, "nic", {})
    return {
        "foretold": foretold.difference.message,
        "done": done.difference.message,
        "unsupported": {entry.what: entry.reason for entry in done.unsupported},
        "held": held,
        "queues": fewer,
        "again": again.difference.message,
        "back": back.difference.message,
        "queues_back": queues(),
        "rps_back": queue("rx-0", "rps_cpus"),
        "record": root.exists("/var/lib/organism/earlier/nic_steering.json"),
    }


def keeper(root: Root, folder: Path) -> dict[str, Any]:
    """A keeper in a process of its own hears what happens to links and queues and puts steering back."""
    steering = NicWish(("v0",), tuple(sorted(os.sched_getaffinity(0))), rps=True, xps=True)
    section = {"wishes": {"nic": steering.as_dict()}, "drift_check": 3600}
    _steer_config.write_section(root, "nic", section)
    place = folder / "notify"
    said = Lines()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(place))
        listener.settimeout(GUARD)
        environment = {**os.environ, "NOTIFY_SOCKET": str(place)}
        argv = [sys.executable, __file__, str(folder), "be-keeper"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, env=environment) as process:
            assert process.stderr is not None
            said.open(process.stderr.fileno())
            ready = listener.recv(4096).decode()
            first = queue("rx-3", "rps_cpus")
            passes = [_state(root)["passes"]]
            # a link that goes and comes back loses nothing, and nothing is written for it
            ip("link", "set", "v0", "down")
            listener.recv(4096)
            # fewer queues and more again: the new ones have no masks until the keeper gives them theirs
            Nics(root).set("v0", "channels/rx", 1)
            Nics(root).set("v0", "channels/rx", 4)
            heard = said.until(lambda line: "rps/rx-3" in line and "(event" in line)
            second = queue("rx-3", "rps_cpus")
            while not (state := _state(root))["passes"]["event"]:
                listener.recv(4096)  # each pass ends with a message, after its state is written
            process.terminate()
            code = process.wait(GUARD)
    return {
        "ready": ready,
        "first": first,
        "second": second,
        "heard": heard,
        "code": code,
        "reports_left": root.exists("/run/organism/steer.json"),
        "events": state["events"],
        "passes": [*passes, state["passes"]],
        "problems": state["problems"],
    }


def _state(root: Root) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(root.read("/run/organism/steer.json"))
    return state


class Lines:
    """Lines of a pipe as they come, with a guard against waiting for ever."""

    def __init__(self) -> None:
        self._pipe = -1
        self._rest = b""

    def open(self, pipe: int) -> None:
        self._pipe = pipe

    def until(self, wanted: Callable[[str], bool]) -> str:
        while True:
            while b"\n" in self._rest:
                line, self._rest = self._rest.split(b"\n", 1)
                if wanted(line.decode()):
                    return line.decode()
            if not select.select([self._pipe], [], [], GUARD)[0]:
                raise TimeoutError("the keeper did not say it")
            more = os.read(self._pipe, 65536)
            if not more:
                raise EOFError("the keeper has ended")
            self._rest += more


def main(folder: Path, case: str) -> int:
    _netdev.is_port = is_veth
    root = Root(folder)
    if case == "be-keeper":
        import logging

        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
        return Keeper(root, Nics(root)).run()
    subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True, timeout=GUARD)
    for name in ("sys", "proc"):
        (folder / name).symlink_to(f"/{name}")
    peers = ["numtxqueues", "4", "numrxqueues", "4", "type", "veth", "peer", "name", "v1"]
    ip("link", "add", "v0", *peers, "numtxqueues", "4", "numrxqueues", "4")
    for name in ("v0", "v1"):
        ip("link", "set", name, "up")
    result = library(root) if case == "library" else keeper(root, folder)
    sys.stdout.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
