# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The workers on a host: what restarts one, what leaves it alone, and the command line over them."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from organism.bus.messages import BadMessage, JobSpec
from organism.cli import gpu_worker_ctl
from organism.core import _gpu_worker as units
from organism.core._gpu_map import Entry, render_map
from organism.core._gpu_worker import CONFIG, POLICY, UNIT_FILE, Facts, Service, plan
from organism.core._maestro_deploy import File
from organism.core._root import Root
from organism.core._systemd import Systemctl, UnitState
from organism.core._worker_settings import GPU_MAP, SCHEMA
from organism.worker.handlers import SCRIPT, load_handlers
from organism.worker.notify import Notifier

SETTINGS = SCHEMA.coerce({})


def wanted(root: Root, gpus: list[str], **changes: object) -> dict[str, File | None]:
    settings = SCHEMA.coerce(changes) if changes else SETTINGS
    return units.wanted_files(settings, gpus, ["cmd", "noop"], memlock="infinity", cache=True, root=root)


def running(gpu: str, **changes: Any) -> Service:
    unit = UnitState(units.unit_of(gpu), load="loaded", active="active", sub="running", unit_file="enabled", main_pid=7)
    return replace(Service(unit, "venv-1", 200.0), **changes)


def facts(files: dict[str, File | None], **services: Service) -> Facts:
    present = {path: replace(file, written=100.0) if file else None for path, file in files.items()}
    return Facts(present, services, "venv-1")


def test_a_first_run_writes_all_and_starts_each(tmp_path: Path) -> None:
    files = wanted(Root(tmp_path), ["gpu0", "gpu1"])
    made = plan(facts(dict.fromkeys(files)), files, ["gpu0", "gpu1"])
    assert set(made.writes) == {CONFIG, POLICY, UNIT_FILE}
    assert (made.enable, made.start, made.restart, made.reload) == (["gpu0", "gpu1"], ["gpu0", "gpu1"], {}, True)


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    files = wanted(Root(tmp_path), ["gpu0", "gpu1"])
    made = plan(facts(files, gpu0=running("gpu0"), gpu1=running("gpu1")), files, ["gpu0", "gpu1"])
    assert not made.difference
    assert made == units.Plan()


@pytest.mark.parametrize("path", [CONFIG, POLICY, UNIT_FILE])
def test_what_a_worker_reads_at_its_start_restarts_it(tmp_path: Path, path: str) -> None:
    files = wanted(Root(tmp_path), ["gpu0", "gpu1"])
    before = {**files, path: File("something else\n")}
    made = plan(facts(before, gpu0=running("gpu0"), gpu1=running("gpu1")), files, ["gpu0", "gpu1"])
    assert made.restart == {"gpu0": [f"{path} changed"], "gpu1": [f"{path} changed"]}
    assert made.difference


def test_an_interrupted_run_is_made_good(tmp_path: Path) -> None:
    files = wanted(Root(tmp_path), ["gpu0"])
    early = running("gpu0", started=50.0)  # before the file was written
    assert (
        plan(facts(files, gpu0=early), files, ["gpu0"]).restart["gpu0"][0].endswith("was written after it had started")
    )
    old = running("gpu0", runs="venv-0")
    assert plan(facts(files, gpu0=old), files, ["gpu0"]).restart == {"gpu0": ["it runs venv-0, installed is venv-1"]}


def test_the_worker_of_a_vanished_gpu_is_stopped(tmp_path: Path) -> None:
    files = wanted(Root(tmp_path), ["gpu0"])
    made = plan(facts(files, gpu0=running("gpu0"), gpu1=running("gpu1")), files, ["gpu0"], ["gpu1"])
    assert (made.stop, made.restart) == (["gpu1"], {})
    gone = plan(facts(files, gpu0=running("gpu0")), files, ["gpu0"], ["gpu1"])
    assert not gone.difference


def test_pinning_is_a_dropin_and_goes_when_it_is_not_wanted(tmp_path: Path) -> None:
    online = tmp_path / "sys/devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-3\n")
    root = Root(tmp_path)
    pinned = wanted(root, ["gpu0"], GPU_WORKER_CPUSET="2-3")
    dropin = pinned[units.dropin_of("gpu0")]
    assert dropin is not None
    assert "CPUAffinity=2-3\n" in dropin.content
    made = plan(facts(pinned, gpu0=running("gpu0")), wanted(root, ["gpu0"]), ["gpu0"])
    assert made.removes == [units.dropin_of("gpu0")]
    assert made.reload
    with pytest.raises(ValueError, match="names CPU 10"):
        wanted(root, ["gpu0"], GPU_WORKER_CPUSET="10")


def test_the_operators_of_a_conductor_on_the_same_machine_stay() -> None:
    text = units.keep_operators('[users]\noperators = ["olga", "admin"]\n', ["cmd"])
    assert 'operators = ["admin", "olga"]' in text
    assert 'types = ["cmd"]' in text
    assert 'operators = ["admin"]' in units.keep_operators("[broken", ["cmd"])


def test_systemd_waits_longer_than_the_worker() -> None:
    settings = SCHEMA.coerce({"STOP_GRACE_SEC": 600, "KILL_GRACE_SEC": 10})
    assert units.patience(settings) == 640
    text = units.render_unit(stop_seconds=640, memlock="", cache=False)
    assert "TimeoutStopSec=640\n" in text
    assert "LimitMEMLOCK" not in text
    assert "gpucache" not in text
    whole = units.render_unit()
    for line in ("Requires=gpucache@%i.service", "Restart=always", "RestartSec=1", "Nice=-5", "LimitMEMLOCK=infinity"):
        assert f"{line}\n" in whole


class FakeSystemctl(Systemctl):
    """Remembers what it was told; every unit is as the test says."""

    def __init__(self, active: str = "active") -> None:
        super().__init__(self._answer)
        self.told: list[list[str]] = []
        self.active = active

    def _answer(self, argv: list[str]) -> str:
        self.told.append(argv[1:])
        if argv[1] != "show":
            return ""
        names = argv[argv.index("--") + 1 :]
        return "\n\n".join(f"Id={name}\nLoadState=loaded\nActiveState={self.active}\nMainPID=0" for name in names)

    def verbs(self) -> list[str]:
        return [" ".join(word for word in call if not word.startswith("--")) for call in self.told if call[0] != "show"]


def machine(tmp_path: Path, config: str = "") -> Root:
    for path, text in (
        (
            GPU_MAP,
            render_map([Entry("gpu0", "simulated", "sim:0"), Entry("gpu1", "simulated", "sim:1", present=False)]),
        ),
        (CONFIG, config),
        ("/sys/devices/system/cpu/online", "0-3\n"),
        ("/run/systemd/system/.keep", ""),
    ):
        (tmp_path / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.lstrip("/")).write_text(text)
    return Root(tmp_path)


def ctl(root: Root, *argv: str, active: str = "active") -> tuple[int, str, FakeSystemctl, list[list[str]]]:
    said: list[str] = []
    ran: list[list[str]] = []

    def run(call: list[str]) -> int:
        ran.append(call)
        return 0

    fake = FakeSystemctl(active)
    code = gpu_worker_ctl.main(list(argv), root=root, systemctl=fake, say=said.append, run=run)
    return code, "\n".join(said), fake, ran


def test_ctl_lists_what_is_there(tmp_path: Path) -> None:
    code, text, _, _ = ctl(machine(tmp_path), "list", "--json")
    rows = json.loads(text)["gpus"]
    assert code == 0
    assert [(row["id"], row["present"], row["service"]) for row in rows] == [
        ("gpu0", True, "active"),
        ("gpu1", False, "active"),
    ]
    _, table, _, _ = ctl(machine(tmp_path), "list")
    assert "(not there now)" in table.splitlines()[2]


def test_ctl_restart_renews_the_pinning_first(tmp_path: Path) -> None:
    root = machine(tmp_path, "GPU_WORKER_CPUSET=1-2\n")
    code, _, fake, _ = ctl(root, "restart")
    assert code == 0
    assert fake.verbs() == ["daemon-reload", "restart gpu-worker@gpu0.service"]
    assert "CPUAffinity=1-2" in root.read(units.dropin_of("gpu0"))
    root = machine(tmp_path, "GPU_WORKER_CPUSET=9\n")
    code, _, fake, _ = ctl(root, "restart")
    assert (code, fake.verbs()) == (1, [])
    assert "CPUAffinity=1-2" in root.read(units.dropin_of("gpu0"))
    root = machine(tmp_path)
    ctl(root, "restart", "gpu0")
    assert not root.exists(units.dropin_of("gpu0"))


def test_ctl_enable_and_status_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = machine(tmp_path)
    assert ctl(root, "enable")[2].verbs()[1:] == [
        "enable -- gpu-worker@gpu0.service".replace("-- ", ""),
        "start gpu-worker@gpu0.service",
    ]
    assert ctl(root, "status", "--json")[0] == 0
    assert ctl(root, "status", "--json", active="failed")[0] == 1
    assert ctl(root, "logs", "gpu0", "-n", "7")[3] == [
        ["journalctl", "--unit=gpu-worker@gpu0.service", "--lines=7", "--no-pager"]
    ]
    assert ctl(root, "logs", "../x")[0] == 1
    assert ctl(root, "restart", "gpu7")[0] == 1
    assert "the map has no GPU gpu7" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        ctl(root, "explode")
    assert usage.value.code == 2


class FakeEntry:
    """An installed package's entry point."""

    value = "site_package:Handler"

    def __init__(self, name: str, loaded: Any) -> None:
        self.name = name
        self.loaded = loaded

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


class EmbedHandler:
    def check(self, spec: Any) -> None:
        """Takes anything."""

    def command(self, spec: Any) -> list[str]:
        return ["/opt/site/embed"]


def test_a_site_adds_types_and_a_broken_one_costs_only_itself() -> None:
    entries: list[Any] = [
        FakeEntry("embed", EmbedHandler),
        FakeEntry("broken", RuntimeError("no such library")),
        FakeEntry("shell", EmbedHandler),
        FakeEntry("half", object),
    ]
    handlers = load_handlers(entries)
    assert sorted(handlers) == ["cmd", "embed", "noop", "shell"]
    assert not isinstance(handlers["shell"], EmbedHandler)


def test_python_jobs_are_for_an_interpreter_that_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interpreter = tmp_path / "python3"
    entry: Any = FakeEntry("python", EmbedHandler)
    assert "python" not in load_handlers([entry])  # none wanted, and not a site's either: the name has a meaning
    assert "python" not in load_handlers([entry], python=str(interpreter))
    assert f"JOB_PYTHON={interpreter} is no program" in caplog.text
    interpreter.write_text("")
    interpreter.chmod(0o755)
    handler = load_handlers([entry], python=str(interpreter))["python"]
    command = handler.command(JobSpec(type="python", python="pass", argv=["a b", "-u"]))
    assert command == [str(interpreter), "-u", SCRIPT, "a b", "-u"]
    with pytest.raises(BadMessage, match="needs `python`"):
        handler.check(JobSpec(type="python"))


def test_systemd_hears_that_the_worker_is_ready(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        environ = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "30000000",
            "WATCHDOG_PID": str(os.getpid()),
        }
        notifier = Notifier(environ)
        notifier.send("READY=1")
        assert ear.recv(100) == b"READY=1"
        assert notifier.watchdog == 30
    assert Notifier({**environ, "WATCHDOG_PID": "1"}).watchdog == 0
    Notifier({}).send("READY=1")  # no systemd, nobody to tell
