# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules nats_nkey and bus_topology as Ansible runs them, with the real command and a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus import keys
from organism.core import _bus
from service.support import HANG, REPO, SMALL, BusServer, free_port

LIMITS = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """``organism-bus`` of this checkout, as a program."""
    path = tmp_path / "organism-bus"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={REPO}/runtime/src exec {sys.executable} -m organism.cli.bus "$@"\n')
    path.chmod(0o755)
    return path


def module(name: str, *, check: bool = False, **arguments: Any) -> dict[str, Any]:
    """The module's result; a failure is a result, too."""
    given = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, "-m", f"ansible_collections.organism.proxmox.plugins.modules.{name}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        check=False,
        timeout=HANG,
    )
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_key_is_predicted_made_kept_and_removed(tmp_path: Path, command: Path) -> None:
    path = tmp_path / "worker-gpu0.nk"
    wish = {"path": str(path), "mode": "0400"}
    assert module("nats_nkey", check=True, command="/nowhere/organism-bus", **wish)["public_key"] is None
    assert not path.exists()
    made = module("nats_nkey", command=str(command), **wish)
    assert made["changed"]
    assert made["public_key"] == keys.public_key(path)
    assert path.read_text().strip() not in json.dumps(made), "the seed stays in its file"
    again = module("nats_nkey", command=str(command), **wish)
    assert (again["changed"], again["public_key"]) == (False, made["public_key"])
    path.chmod(0o444)
    assert module("nats_nkey", check=True, command=str(command), **wish)["changed"]
    assert path.stat().st_mode & 0o777 == 0o444
    assert module("nats_nkey", command=str(command), **wish)["changed"]
    assert path.stat().st_mode & 0o777 == 0o400
    assert module("nats_nkey", check=True, path=str(path), state="absent")["changed"]
    assert path.exists()
    assert module("nats_nkey", path=str(path), state="absent")["changed"]
    assert not path.exists()
    assert not module("nats_nkey", path=str(path), state="absent")["changed"]


def test_a_broken_key_is_named_and_not_replaced(tmp_path: Path, command: Path) -> None:
    path = tmp_path / "worker-gpu0.nk"
    path.write_text("hello\n")
    result = module("nats_nkey", command=str(command), path=str(path))
    assert result["failed"]
    assert f"{path} holds no nkey seed" in result["msg"]
    assert path.read_text() == "hello\n"


def test_streams_are_predicted_made_kept_and_removed(bus_servers: Callable[..., BusServer], command: Path) -> None:
    server = bus_servers()
    wish: dict[str, Any] = {
        "servers": [server.url],
        "key_file": str(server.credentials("admin", "setup")),
        "command": str(command),
        "limits": LIMITS,
    }
    everything = {f"stream {name}" for name in _bus.topology().streams}
    predicted = module("bus_topology", check=True, **{**wish, "servers": [f"nats://127.0.0.1:{free_port()}"]})
    assert predicted["changed"], "the server is itself still to be started"
    assert everything == set(json.loads(predicted["diff"]["after"]))
    server.start()
    assert module("bus_topology", check=True, **wish)["diff"] == predicted["diff"]
    made = module("bus_topology", **wish)
    assert made["diff"] == predicted["diff"]
    assert not module("bus_topology", **wish)["changed"]
    kept = module("bus_topology", state="absent", **wish)
    assert kept["failed"]
    assert "destroys all jobs" in kept["msg"]
    assert module("bus_topology", check=True, state="absent", purge=True, **wish)["changed"]
    assert not module("bus_topology", **wish)["changed"], "check mode has removed nothing"
    assert module("bus_topology", state="absent", purge=True, **wish)["changed"]
    assert not module("bus_topology", state="absent", purge=True, **wish)["changed"]


def test_wrong_arguments_are_refused_by_name(bus: BusServer, command: Path) -> None:
    wish = {"servers": [bus.url], "command": str(command)}
    assert "unexpected keyword argument 'queue'" in module("bus_topology", limits={"queue": 1}, **wish)["msg"]
    key = str(bus.credentials("observer", "console"))
    result = module("bus_topology", key_file=key, timeout=20, **wish)
    assert "this key may not publish to $js.api.info" in result["msg"]
