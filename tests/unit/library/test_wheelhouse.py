# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the wheelhouse decides; that it builds is shown by tests/gates/test_artifact.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from organism.core import _wheelhouse as wheelhouse


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    top = tmp_path / "runtime"
    core = tmp_path / "library"
    core.mkdir()
    (core / "_wheelhouse.py").write_text("")
    (core / "_cpus.py").write_text("one = 1\n")
    (top / "src/organism").mkdir(parents=True)
    (top / "src/organism/_version.py").write_text('VERSION = "1.2.3"\n')
    (top / "src/organism/core").symlink_to("../../../library")
    (top / "pyproject.toml").write_text("")
    return top


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    file = tmp_path / "requirements.txt"
    file.write_text("a==1 --hash=sha256:00\n")
    return file


def filled(dest: Path, want: wheelhouse.Wanted) -> Path:
    dest.mkdir()
    (dest / "x.whl").write_bytes(b"wheel")
    stamp = {"version": want.version, "digest": want.digest, "wheel": "x.whl"}
    files = {"x.whl": wheelhouse._sha256(dest / "x.whl")}
    (dest / wheelhouse.STAMP).write_text(json.dumps(stamp | {"files": files}))
    return dest


def test_version_names_the_sources_behind_the_link(runtime: Path) -> None:
    before = wheelhouse.source_version(runtime)
    assert before.startswith("1.2.3+src.")
    assert len(before) == len("1.2.3+src.") + 12
    (runtime.parent / "library/_cpus.py").write_text("one = 2\n")
    assert wheelhouse.source_version(runtime) != before


def test_version_ignores_what_running_and_installing_leave(runtime: Path) -> None:
    before = wheelhouse.source_version(runtime)
    (runtime / "src/organism.egg-info").mkdir()
    (runtime / "src/organism.egg-info/PKG-INFO").write_text("x")
    (runtime / "src/organism/__pycache__").mkdir()
    (runtime / "src/organism/__pycache__/a.pyc").write_bytes(b"x")
    assert wheelhouse.source_version(runtime) == before


def test_sources_are_copied_whole(runtime: Path) -> None:
    assert [name for name, _file in wheelhouse.source_files(runtime)] == [
        "pyproject.toml",
        "src/organism/_version.py",
        "src/organism/core/_cpus.py",
        "src/organism/core/_wheelhouse.py",
    ]


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(wheelhouse.WheelhouseError, match="does not hold the runtime's sources"):
        wheelhouse.source_version(tmp_path)


@pytest.mark.parametrize("version", ["3", "2.7", "3.11.2", "3.x", ""])
def test_python_versions_are_checked(runtime: Path, requirements: Path, version: str) -> None:
    with pytest.raises(wheelhouse.WheelhouseError, match="not a Python version"):
        wheelhouse.wanted(runtime, requirements, [version])


def test_same_inputs_same_wheelhouse_in_any_order(runtime: Path, requirements: Path) -> None:
    one = wheelhouse.wanted(runtime, requirements, ["3.11", "3.13"])
    assert one == wheelhouse.wanted(runtime, requirements, ["3.13", "3.11"])
    assert one != wheelhouse.wanted(runtime, requirements, ["3.13"])
    requirements.write_text("a==2 --hash=sha256:00\n")
    assert one != wheelhouse.wanted(runtime, requirements, ["3.11", "3.13"])


def test_nothing_to_do_when_all_is_there(tmp_path: Path) -> None:
    want = wheelhouse.Wanted("1+src.0", "d")
    assert not wheelhouse.plan(wheelhouse.present(filled(tmp_path / "w", want)), want)


def test_a_missing_an_altered_and_a_strange_file_are_noticed(tmp_path: Path) -> None:
    want = wheelhouse.Wanted("1+src.0", "d")
    for harm in ("missing", "altered", "strange"):
        dest = filled(tmp_path / harm, want)
        if harm == "missing":
            (dest / "x.whl").unlink()
        elif harm == "altered":
            (dest / "x.whl").write_bytes(b"other")
        else:
            (dest / "y.whl").write_bytes(b"")
        assert wheelhouse.plan(wheelhouse.present(dest), want).message == "change files: altered -> as built", harm


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}'])
def test_a_broken_stamp_is_rebuilt(tmp_path: Path, text: str) -> None:
    (tmp_path / wheelhouse.STAMP).write_text(text)
    assert wheelhouse.plan(wheelhouse.present(tmp_path), wheelhouse.Wanted("1+src.0", "d"))


def test_absent(tmp_path: Path) -> None:
    dest = filled(tmp_path / "w", wheelhouse.Wanted("1+src.0", "d"))
    assert wheelhouse.plan(wheelhouse.present(dest), None).message == "remove wheelhouse"
    wheelhouse.remove(dest)
    assert not dest.exists()
    assert not wheelhouse.plan(wheelhouse.present(dest), None)


def test_other_peoples_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    for act in (wheelhouse.refuse_foreign, wheelhouse.remove):
        with pytest.raises(wheelhouse.WheelhouseError, match="is not a wheelhouse"):
            act(tmp_path)
    shutil.rmtree(tmp_path)
    wheelhouse.refuse_foreign(tmp_path)  # nothing there: fine
