# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``organism-bus`` on real servers: plan, apply, apply again, change, refuse, remove; one node, and three."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from organism.bus.jetstream import JetStream
from organism.cli import bus as command
from organism.core import _bus, _nats_config
from service.support import HANG, SMALL, BusServer, Certificates, free_port

Run = Callable[..., tuple[int, dict[str, Any]]]
LIMITS = json.dumps({name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})


@pytest.fixture
def server(bus_servers: Callable[..., BusServer]) -> BusServer:
    """Running, without any stream."""
    made = bus_servers()
    made.start()
    return made


@pytest.fixture
def run(server: BusServer, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; returns its status and its JSON document."""

    def call(*words: str) -> tuple[int, dict[str, Any]]:
        status = command.main([*words, *connection(server), "--json"])
        out = capsys.readouterr().out
        return status, json.loads(out) if out else {}

    return call


def connection(server: BusServer) -> list[str]:
    words = ["--server", server.url, "--key", str(server.credentials("admin", "setup"))]
    return words + (["--ca", server.ca_file] if server.ca_file else [])


def test_plan_changes_nothing_apply_does_and_does_it_once(run: Run) -> None:
    wanted = ("--limits", LIMITS)
    assert run("wait") == (0, {"ready": True})
    status, planned = run("topology", "plan", *wanted)
    assert (status, planned["changed"]) == (0, True)
    assert run("info")[1]["streams"] == 0
    status, applied = run("topology", "apply", *wanted)
    assert (status, applied) == (0, planned)
    assert run("info")[1]["streams"] == len(_bus.topology().streams)
    for action in ("plan", "apply"):
        status, again = run("topology", action, *wanted)
        assert (status, again["changed"], again["message"]) == (0, False, "nothing to change")
    assert run("streams")[1]["streams"][0]["consumers"] == 0


def test_changed_limits_are_reconciled(run: Run) -> None:
    run("topology", "apply", "--limits", LIMITS)
    more = json.dumps({**json.loads(LIMITS), "queue_bytes": SMALL.queue_bytes * 2})
    status, changed = run("topology", "apply", "--limits", more)
    assert status == 0
    assert [change["name"] for change in changed["changes"]] == [f"stream {_bus.STREAM_WQ}: max_bytes"]
    assert not run("topology", "plan", "--limits", more)[1]["changed"]


def test_what_the_server_cannot_change_is_refused_and_nothing_else_is_done(server: BusServer, run: Run) -> None:
    async def foreign() -> None:
        nc = await server.connected("admin", "setup")
        config = {**_bus.topology(limits=SMALL).streams[_bus.STREAM_EVENTS], "persist_mode": "default"}
        await JetStream(nc).api(f"STREAM.CREATE.{_bus.STREAM_EVENTS}", config)
        await nc.close()

    asyncio.run(foreign())
    status, refused = run("topology", "apply", "--limits", LIMITS)
    assert status == 1
    assert f"stream {_bus.STREAM_EVENTS}: persist_mode is 'default' and cannot become 'async'" in refused["error"]
    assert run("info")[1]["streams"] == 1


def test_jobs_are_destroyed_only_when_that_is_said(server: BusServer, run: Run) -> None:
    run("topology", "apply", "--limits", LIMITS)
    assert command.main(["topology", "absent", *connection(server)]) == 2
    assert run("info")[1]["streams"] == len(_bus.topology().streams)
    status, dry = run("topology", "absent", "--dry-run")
    assert (status, dry["changed"], run("info")[1]["streams"]) == (0, True, len(_bus.topology().streams))
    status, gone = run("topology", "absent", "--purge")
    assert (status, gone["changed"], run("info")[1]["streams"]) == (0, True, 0)
    assert run("topology", "absent", "--purge")[1]["changed"] is False


def test_mistakes_are_named(server: BusServer, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as usage:
        command.main(["topology", "plan", "--limits", '{"queue": 1}'])
    assert usage.value.code == 2
    assert "queue_bytes" in capsys.readouterr().err
    dead = f"nats://127.0.0.1:{free_port()}"
    assert command.main(["wait", "--server", dead, "--timeout", "0.3"]) == 1
    assert dead in capsys.readouterr().err
    huge = json.dumps({"queue_bytes": 2**50})
    status, document = run("topology", "apply", "--limits", huge)
    assert status == 1
    assert "insufficient storage" in document["error"]
    key = tmp_path / "k.nk"
    assert command.main(["key", "create", str(key)]) == 0
    public = capsys.readouterr().out.strip()
    assert (public[0], key.stat().st_mode & 0o777) == ("U", 0o400)
    assert command.main(["key", "show", str(key)]) == 0
    assert capsys.readouterr().out.strip() == public
    assert command.main(["key", "create", str(key)]) == 1
    assert "exists" in capsys.readouterr().err
    assert command.main(["key", "create", str(tmp_path / "no" / "k.nk")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bus0", "k.nk"], "nothing half-made is left"


def test_three_servers_keep_what_was_acknowledged_when_the_leader_dies(
    bus_servers: Callable[..., BusServer], tmp_path: Path
) -> None:
    certificates = Certificates.make(tmp_path / "tls")
    routes = [free_port() for _ in range(3)]
    first: BusServer | None = None
    nodes: list[BusServer] = []
    for port in routes:
        others = tuple(f"localhost:{other}" for other in routes if other != port)
        cluster = _nats_config.Cluster("organism", others, "127.0.0.1", port)
        nodes.append(bus_servers(certificates=certificates, cluster=cluster, keys_from=first))
        first = nodes[0]
    for node in nodes:
        node.start()
    urls = [node.url for node in nodes]

    async def main() -> None:
        async with asyncio.timeout(3 * HANG):
            words = [word for url in urls for word in ("--server", url)]
            words += ["--key", str(nodes[0].credentials("admin", "setup")), "--ca", str(certificates.ca)]
            assert await asyncio.to_thread(command.main, ["wait", *words, "--timeout", str(HANG)]) == 0
            apply = ["topology", "apply", "--replicas", "3", "--limits", LIMITS, *words]
            assert await asyncio.to_thread(command.main, apply) == 0
            js = JetStream(await nodes[0].connected("conductor", "a", servers=urls))
            for n in range(5):
                await js.publish(_bus.run_subject("gpu0"), b"%d" % n, msg_id=f"m{n}", timeout=HANG)
            leader = (await js.info(_bus.STREAM_WQ))["cluster"]["leader"]
            next(node for node in nodes if node.directory.name == leader).kill9()
            for n in range(5, 10):
                await js.publish(_bus.run_subject("gpu0"), b"%d" % n, msg_id=f"m{n}", timeout=HANG)
            stored = [await js.get(_bus.STREAM_WQ, seq) for seq in range(1, 11)]
            assert [one.data for one in stored if one is not None] == [b"%d" % n for n in range(10)]
            await js.nc.close()

    asyncio.run(main())
