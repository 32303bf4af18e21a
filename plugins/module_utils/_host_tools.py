# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keepers and commands of a tuned host, installed for the system's Python without any package.

    /opt/organism/host-0a1b2c3d4e5f/organism/{core,host}/*.py   one set of files, written once; its name is its digest
    /opt/organism/host-0a1b2c3d4e5f/bin/organism-hook           starts ``organism.host.hook``
    /opt/organism/host                                          a link to the set in use, switched in one step
    /usr/local/sbin/organism-hook                               -> /opt/organism/host/bin/organism-hook

Which files of the library belong to a set is read from the imports, so the set is as small as its commands. A process
that runs keeps an open descriptor of its set's folder: that is how one of an earlier set is found (`set_of`).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ._atomic import fsync_directory
from ._difference import ABSENT, Difference
from ._levels import marker_path
from ._root import Root

TOP = "/opt/organism"
CURRENT = f"{TOP}/host"
SBIN = "/usr/local/sbin"

COMMANDS = {
    "hook": "organism-hook",
    "pin": "organism-qemu-pin",
    "steer": "organism-steer",
    "dma_latency": "organism-dma-latency",
    "cpu_plan": "organism-cpu-plan",
    "record": "organism-record",
    "audit": "organism-audit",
    "iommu": "organism-iommu",
    "ramlayer": "ramlayer",
    "guard": "organism-guard",
    "mlmode": "mlmode",
}
"""Module of ``organism.host`` to the command that starts it; a module that does not exist has no command."""

UNITS = ("organism-qemu-pin.service", "organism-steer.service", "organism-dma-latency.service")
"""Keepers: they are restarted when they still run from an earlier set."""

_START = """\
#!/usr/bin/python3 -I
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
import os
import sys

TOP = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
IN_USE = os.open(TOP, os.O_RDONLY | os.O_DIRECTORY)  # kept open: shows which set this process runs from
sys.path.insert(0, TOP)

from organism.host.{module} import main

sys.exit(main(sys.argv[1:]))
"""


class HostToolsError(Exception):
    """The tools cannot be collected or installed; the text names the file and the next step."""


# Collecting, on the controller ------------------------------------------------------------------------------------


def imports_of(source: str, name: str) -> set[str]:
    """Files of the package (``core/_root.py``) that a file of it imports.

    ``name``: the file's own, relative to the package. Raises HostToolsError for what a host does not have.
    """
    inside = name.split("/", maxsplit=1)[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files(alias.name, (), name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1:  # from . import _x / from ._x import y
                module = f"organism.{inside}" + (f".{module}" if module else "")
            elif node.level:
                raise HostToolsError(f"{name}:{node.lineno}: import by its full name or from the same folder")
            found |= _files(module, tuple(alias.name for alias in node.names), name)
    return found


def _files(module: str, names: tuple[str, ...], importer: str) -> set[str]:
    parts = module.split(".")
    if parts[0] != "organism":
        if parts[0] in sys.stdlib_module_names:
            return set()
        raise HostToolsError(f"{importer} imports {module}: tools of the host have the standard library alone")
    if len(parts) < 2 or parts[1] not in ("core", "host"):
        raise HostToolsError(f"{importer} imports {module}: tools of the host have organism.core and organism.host")
    if len(parts) > 2:
        return {f"{parts[1]}/{parts[2]}.py"}
    return {f"{parts[1]}/{each}.py" for each in names}


def collect(package: Path) -> dict[str, str]:
    """Path in a set to content, of all that the commands need. ``package``: the folder ``runtime/src/organism``.

    Raises HostToolsError, OSError.
    """
    host = package / "host"
    if not host.is_dir():
        raise HostToolsError(f"{package} does not hold the runtime's sources (no folder host)")
    todo = [f"host/{file.name}" for file in sorted(host.glob("*.py"))]
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        try:
            seen[name] = (package / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise HostToolsError(f"{name} is imported and does not exist in {package}") from None
        todo += imports_of(seen[name], name)
    files = {f"organism/{name}": text for name, text in seen.items()}
    for folder in ("", "core/"):
        files[f"organism/{folder}__init__.py"] = (package / folder / "__init__.py").read_text(encoding="utf-8")
    for module, command in COMMANDS.items():
        if f"organism/host/{module}.py" in files:
            files[f"bin/{command}"] = _START.format(module=module)
    return dict(sorted(files.items()))


def pack(files: Mapping[str, str]) -> str:
    """A set as one word (compressed JSON in base64), the same for the same files."""
    return base64.b64encode(zlib.compress(json.dumps(dict(sorted(files.items()))).encode(), 9)).decode()


def unpack(archive: str) -> dict[str, str]:
    """The set in a word of `pack`. Raises HostToolsError."""
    try:
        files = json.loads(zlib.decompress(base64.b64decode(archive, validate=True)))
    except (ValueError, zlib.error) as error:
        raise HostToolsError(f"the archive of host tools is damaged: {error}") from error
    if not isinstance(files, dict) or not all(_is_member(name) and isinstance(files[name], str) for name in files):
        raise HostToolsError("the archive of host tools holds something else than its files")
    return files


def _is_member(name: object) -> bool:
    pattern = r"organism/(core/|host/)?\w+\.py|bin/(organism-[a-z-]+|ramlayer|mlmode)"
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def digest(files: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits that name a set by its content."""
    return hashlib.sha256(json.dumps(dict(sorted(files.items()))).encode()).hexdigest()[:12]


# Installing, on the host --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Present:
    """The set in use, the content of each set's folder, and where our commands' names point.

    ``links``: target of a link, None for nothing, ``(a file)`` for what is no link.
    """

    current: str | None
    sets: Mapping[str, Mapping[str, str]]
    links: Mapping[str, str | None]


def read(root: Root) -> Present:
    """What a host has."""
    sets = {}
    for path in root.glob(f"{TOP}/host-*"):
        top = root.path(path)
        sets[top.name] = {
            str(file.relative_to(top)): file.read_text(encoding="utf-8", errors="replace")
            for file in sorted(top.rglob("*"))
            if file.is_file() and "__pycache__" not in file.parts
        }
    links = {command: _link(root.path(f"{SBIN}/{command}")) for command in COMMANDS.values()}
    return Present(root.link_name(CURRENT), sets, links)


def _link(path: Path) -> str | None:
    if path.is_symlink():
        return str(path.readlink())
    return "(a file)" if path.exists() else None


def wanted_links(files: Mapping[str, str] | None) -> dict[str, str | None]:
    """Command to its link's target; None where no such command shall be."""
    has = files or {}
    return {command: f"{CURRENT}/bin/{command}" if f"bin/{command}" in has else None for command in COMMANDS.values()}


def plan(have: Present, files: Mapping[str, str] | None) -> Difference:
    """What has to change to run this set (None: none shall be left). Raises HostToolsError."""
    difference = Difference()
    name = None if files is None else f"host-{digest(files)}"
    before = have.sets.get(have.current or "", {})
    if name is not None and files is not None:
        if have.sets.get(name) != files or have.current != name:
            for file in sorted({*before, *files}):
                difference.add(f"{CURRENT}/{file}", _told(before.get(file)), _told(files.get(file)))
            difference.add(CURRENT, have.current, name)
    elif have.current is not None:
        difference.add(CURRENT, have.current, ABSENT)
    for old in superfluous(have, name):
        difference.add(f"{TOP}/{old}", f"{len(have.sets[old])} files", ABSENT)
    for command, target in wanted_links(files).items():
        now = have.links[command]
        if now is not None and not now.startswith(f"{CURRENT}/"):
            if target is not None:
                raise HostToolsError(f"{SBIN}/{command} exists and is not ours ({now}): move it away")
            continue
        difference.add(f"{SBIN}/{command}", now, target)
    return difference


def _told(content: str | None) -> str | None:
    return None if content is None else f"sha256 {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def superfluous(have: Present, name: str | None) -> list[str]:
    """Sets to remove: all but the wanted one and the one before, from which processes may still run."""
    stay = set() if name is None else {name, have.current}
    if name is not None and have.current == name:
        stay |= set(sorted(set(have.sets) - {name})[:1])  # nothing is switched: the one before stays as it was
    return sorted(set(have.sets) - stay)


def apply(root: Root, have: Present, files: Mapping[str, str] | None) -> None:
    """Bring it about: the folder first, then the switch, then the links, then what nobody needs. Raises OSError."""
    name = None if files is None else f"host-{digest(files)}"
    if files is not None and name is not None and have.sets.get(name) != files:
        _write_set(root.path(f"{TOP}/{name}"), files)
    if name is not None:
        _point(root.path(CURRENT), name)
    elif have.current is not None:
        root.path(CURRENT).unlink()
    for command, target in wanted_links(files).items():
        now, path = have.links[command], root.path(f"{SBIN}/{command}")
        if target is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _point(path, target)
        elif now is not None and now.startswith(f"{CURRENT}/"):
            path.unlink()
    for old in superfluous(have, name):
        shutil.rmtree(root.path(f"{TOP}/{old}"))
    top = root.path(TOP)
    ours = not root.path(marker_path(0)).exists()  # level 0 makes that folder, too, and is not taken back
    if name is None and ours and top.is_dir() and not any(top.iterdir()):
        top.rmdir()


def _write_set(place: Path, files: Mapping[str, str]) -> None:
    """A whole folder or none: written beside its place and renamed."""
    new = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    for name, content in files.items():
        file = new / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        file.chmod(0o755 if name.startswith("bin/") else 0o644)
    for folder in (new, *(each for each in new.rglob("*") if each.is_dir())):
        folder.chmod(0o755)
    os.sync()  # many small files: on disk before their folder has its name
    if place.exists():  # altered by somebody
        shutil.rmtree(place)
    new.rename(place)
    fsync_directory(place.parent)


def _point(link: Path, target: str) -> None:
    """Make a symbolic link point at ``target`` in one step; one that does already is left alone."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def set_of(root: Root, pid: int) -> str | None:
    """The set that a running tool was started from, or None when the process is none of ours (or has ended)."""
    for descriptor in root.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(root.path(f"/proc/{pid}/fd/{descriptor}"))  # noqa: PTH115 - the target may be gone
        except OSError:
            continue  # closed meanwhile
        match = re.fullmatch(rf"{TOP}/(host-[0-9a-f]{{12}})( \(deleted\))?", target)
        if match:
            return match[1]
    return None


def stale(root: Root, pids: Mapping[str, int], name: str) -> dict[str, str]:
    """Units (with their main PIDs) that run from another set than ``name``: unit to that set."""
    found = {unit: set_of(root, pid) for unit, pid in pids.items() if pid > 0}
    return {unit: old for unit, old in sorted(found.items()) if old is not None and old != name}
