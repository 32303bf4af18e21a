# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's tools: what belongs to a set, that it is switched as a whole, and that a command really starts from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from organism.core import _host_tools as tools
from organism.core._root import Root

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package: one command that needs two files of the library, and a file that nothing needs."""
    top = tmp_path / "src" / "organism"
    for name, text in {
        "__init__.py": "",
        "core/__init__.py": "",
        "core/_a.py": "from ._b import X\n",
        "core/_b.py": "import json\nX = json.loads('7')\n",
        "core/_unneeded.py": "import yaml\n",
        "host/__init__.py": "",
        "host/hook.py": "from organism.core import _a\ndef main(argv):\n    print(_a.X, argv)\n    return 3\n",
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def install(root: Root, files: dict[str, str] | None) -> bool:
    have = tools.read(root)
    difference = tools.plan(have, files)
    if difference:
        tools.apply(root, have, files)
    assert not tools.plan(tools.read(root), files), "a second run would change something"
    return difference.changed


def test_a_set_is_what_the_commands_import(package: Path) -> None:
    assert list(tools.collect(package)) == [
        "bin/organism-hook",
        "organism/__init__.py",
        "organism/core/__init__.py",
        "organism/core/_a.py",
        "organism/core/_b.py",
        "organism/host/__init__.py",
        "organism/host/hook.py",
    ]


@pytest.mark.parametrize("line", ["import yaml", "from organism.bus import keys", "from organism.core import _gone"])
def test_what_a_host_lacks_is_refused_by_name(package: Path, line: str) -> None:
    (package / "host/hook.py").write_text(line + "\n")
    with pytest.raises(tools.HostToolsError, match=r"hook\.py imports|_gone\.py is imported"):
        tools.collect(package)


def test_the_real_tools_need_the_standard_library_alone() -> None:
    files = tools.collect(REPO / "runtime/src/organism")
    assert tools.unpack(tools.pack(files)) == files
    assert {name for name in files if name.startswith("bin/")} <= {f"bin/{each}" for each in tools.COMMANDS.values()}
    assert {"bin/organism-hook", "bin/organism-qemu-pin"} <= set(files)


def test_a_damaged_or_foreign_archive_is_refused() -> None:
    for archive in ("", "x", tools.pack({"../../etc/passwd": "x"}), tools.pack({"organism/core/x": "x"})):
        with pytest.raises(tools.HostToolsError, match="archive"):
            tools.unpack(archive)


def test_install_upgrade_repair_and_removal(package: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "node")
    (root.top / "opt").mkdir(parents=True)
    first = tools.collect(package)
    assert install(root, first)
    assert not install(root, first)
    one = tools.read(root).current
    command = root.path("/usr/local/sbin/organism-hook")
    assert str(command.readlink()) == "/opt/organism/host/bin/organism-hook"

    (package / "core/_b.py").write_text("X = 8\n")
    assert install(root, tools.collect(package))
    two = tools.read(root).current
    assert two != one
    assert set(tools.read(root).sets) == {one, two}, "the set before stays for what runs from it"

    (package / "core/_b.py").write_text("X = 9\n")
    assert install(root, tools.collect(package))
    assert one not in tools.read(root).sets

    altered = root.path(f"/opt/organism/{tools.read(root).current}/organism/core/_b.py")
    altered.write_text("X = 'broken'\n")
    assert install(root, tools.collect(package)), "a file that somebody has changed is put right"
    assert altered.read_text() == "X = 9\n"

    assert install(root, None)
    assert not root.path("/opt/organism").exists()

    marker = root.path("/etc/organism/levels/0.json")
    marker.parent.mkdir(parents=True)
    marker.touch()
    root.path("/opt/organism").mkdir()
    tools.apply(root, tools.read(root), None)
    assert root.path("/opt/organism").is_dir(), "level 0 has made it, and stays"
    assert not command.is_symlink()


def test_a_command_starts_from_its_set_and_shows_it(package: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "node")
    (root.top / "opt").mkdir(parents=True)
    install(root, tools.collect(package))
    started = root.path(f"/opt/organism/{tools.read(root).current}/bin/organism-hook")
    done = subprocess.run([started, "100"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "7 ['100']\n"), done.stderr


def test_a_command_of_somebody_else_is_not_overwritten(package: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "node")
    foreign = root.path("/usr/local/sbin/organism-hook")
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(tools.HostToolsError, match="/usr/local/sbin/organism-hook exists and is not ours"):
        tools.plan(tools.read(root), tools.collect(package))
    assert not tools.plan(tools.read(root), None), "and it is not removed either"


def test_a_keeper_of_an_earlier_set_is_found_by_what_it_holds_open(tmp_path: Path) -> None:
    tops = {7: "/opt/organism/host-000000000001", 8: "/opt/organism/host-000000000002", 9: "/dev/null"}
    for pid, target in tops.items():
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
    pids = {"a.service": 7, "b.service": 8, "c.service": 9, "d.service": 0}
    assert tools.stale(Root(tmp_path), pids, "host-000000000002") == {"a.service": "host-000000000001"}
