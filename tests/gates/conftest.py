# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the gates share: how to run a tool, and a copy of the project as ansible-test and the packager want it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").absolute()
BIN = Path(sys.executable).parent
SITE = Path(yaml.__file__).resolve().parents[1]
HANG_GUARD = 900  # seconds; a gate that is not through by then hangs

# where the checkout is no git repository (an unpacked archive): what is not part of the project
NOT_OURS = {".git", ".cache", ".venv", ".ansible", "build", "dist", "__pycache__"}


def environment(**extra: str) -> dict[str, str]:
    """The gates' environment: the tools of this venv, UTF-8, no colour, nothing written outside the cache."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CLICOLOR_FORCE", "FORCE_COLOR")}
    env.update(
        PATH=f"{BIN}:{CACHE / 'bin'}:{env.get('PATH', '')}:/usr/sbin:/sbin",
        LC_ALL="C.UTF-8",
        NO_COLOR="1",
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_HOME=str(CACHE / "ansible"),
        ANSIBLE_COLLECTIONS_PATH=str(CACHE / "collections"),
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PYTHONDONTWRITEBYTECODE="1",
    )
    env.setdefault("PIP_CACHE_DIR", str(CACHE / "pip"))
    env.update(extra)
    return env


def run_tool(
    *words: str | Path, cwd: Path = REPO, env: dict[str, str] | None = None, only: tuple[str, ...] = ()
) -> str:
    """Run a checker; its output is the failure's text unless it ends 0. Returns the output.

    `only` keeps the lines that begin with one of these, where there are such; the whole goes to the cache's log/.
    """
    command = [str(word) for word in words]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    if done.returncode != 0:
        shown = done.stdout
        if only:
            log = CACHE / "log" / f"{Path(command[0]).name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(done.stdout)
            lines = [line for line in done.stdout.splitlines() if line.startswith(only)]
            shown = "\n".join([*lines, f"(all of it: {log})"]) if lines else done.stdout
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}\n{shown}", pytrace=False)
    return done.stdout


def project_files() -> list[str]:
    """Names of the project's files, relative to its root: what git tracks or would track."""
    if (REPO / ".git").exists():
        # a checkout of somebody else (sudo, a container) is fine to list
        listing = run_tool("git", "-c", f"safe.directory={REPO}", "ls-files", "-z", "-co", "--exclude-standard")
        names = [name for name in listing.split("\0") if name]
    else:
        names = []
        for folder, folders, files in os.walk(REPO):
            folders[:] = [
                name for name in folders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))
            ]
            links = [name for name in folders if Path(folder, name).is_symlink()]
            names += [str(Path(folder, name).relative_to(REPO)) for name in (*files, *links)]
    return sorted(name for name in set(names) if os.path.lexists(REPO / name))


@pytest.fixture(scope="session")
def files() -> list[str]:
    return project_files()


@pytest.fixture(scope="session")
def of_kind(files: list[str]) -> Callable[..., list[str]]:
    """Names of the files that end with one of the given endings and are no links."""

    def choose(*endings: str) -> list[str]:
        return [name for name in files if name.endswith(endings) and not (REPO / name).is_symlink()]

    return choose


@pytest.fixture(scope="session")
def shell_scripts(files: list[str]) -> list[str]:
    found = []
    for name in files:
        path = REPO / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                first = stream.readline(80)
            if name.endswith(".sh") or (
                first.startswith(b"#!") and first.split()[-1].endswith((b"bash", b"/sh", b"dash"))
            ):
                found.append(name)
    return found


@pytest.fixture(scope="session")
def tree(files: list[str]) -> Path:
    """The project as `ansible_collections/organism/proxmox`, in a git repository of its own.

    ansible-test, ansible-lint and the packager want this path, and see just the files that git knows. Kept between
    runs (files keep their times), so that the tools' caches stay good.
    """
    top = CACHE / "tree" / "ansible_collections"
    here = top / "organism" / "proxmox"
    here.mkdir(parents=True, exist_ok=True)
    wanted = set(files)
    for folder, folders, names in os.walk(here, topdown=True):
        folders[:] = [name for name in folders if name != ".git"]
        for name in [*names, *folders]:
            path = Path(folder, name)
            if not (path.is_dir() and not path.is_symlink()) and str(path.relative_to(here)) not in wanted:
                path.unlink()
    for name in files:
        _copy(REPO / name, here / name)
    galaxy = yaml.safe_load((REPO / "galaxy.yml").read_text())
    for dependency in galaxy["dependencies"]:
        _link_to(top / dependency.replace(".", "/"), SITE / "ansible_collections" / dependency.replace(".", "/"))
    if not (here / ".git").exists():
        run_tool("git", "init", "-q", "-b", "main", here)
    run_tool("git", "add", "-A", cwd=here)
    return here


def _copy(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)  # a folder of an earlier run, a file now
    for parent in target.parents:
        if parent.is_symlink() or parent.is_file():
            parent.unlink()
            break
        if parent.is_dir():
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        _link_to(target, source.readlink())
        return
    if target.is_symlink():
        target.unlink()
    old, new = (target.stat() if target.exists() else None), source.stat()
    if old is None or (old.st_mtime_ns, old.st_size, old.st_mode) != (new.st_mtime_ns, new.st_size, new.st_mode):
        shutil.copy2(source, target)


def _link_to(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(link):
        link.unlink()
    link.symlink_to(target)


class Gate:
    """What a gate's test has at hand."""

    repo = REPO
    cache = CACHE
    bin = BIN
    run = staticmethod(run_tool)
    environment = staticmethod(environment)


@pytest.fixture(scope="session")
def gate() -> Gate:
    return Gate()
