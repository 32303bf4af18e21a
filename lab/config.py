# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which lab this is: its name, folder, nodes and addresses; kept in ``state.json`` so that any later shell finds it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import LabError, UsageError

REPO = Path(__file__).resolve().parent.parent
DEFAULT_NAME = "orglab0"
SUITE = "trixie"
DEFAULT_GPUS = 4
# One letter of the node's name, its number: bus1, pool2.
_KINDS = ("bus", "pool")
# Linux: an interface name has at most 15 characters (IFNAMSIZ - 1); the veth's far end appends one more.
_NAME = re.compile(r"[a-z][a-z0-9]{0,13}")


@dataclass(frozen=True)
class Node:
    """One container: ``name`` is its host name, ``address`` its IPv4 address inside the lab's network."""

    name: str
    address: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """What ``up`` decided and later commands rely on."""

    name: str
    subnet: str
    gpus: int
    nodes: tuple[Node, ...] = field(default=())

    @property
    def host_address(self) -> str:
        """The controller's own address in the lab's network (the first of the subnet)."""
        return str(next(ipaddress.IPv4Network(self.subnet).hosts()))

    @property
    def prefix(self) -> int:
        return ipaddress.IPv4Network(self.subnet).prefixlen

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise UsageError(f"the lab has no node {name!r}", f"nodes are: {known}")

    def first(self, group: str) -> Node:
        for node in self.nodes:
            if group in node.groups:
                return node
        raise LabError(f"the lab has no node in group {group!r}", "remove it with `./run clean` and start again")


@dataclass(frozen=True)
class Settings:
    """Where the lab lives. Set by ``ORGANISM_CACHE`` (folder) and ``ORGANISM_LAB_NAME`` (several labs side by side)."""

    name: str
    cache: Path

    @property
    def shared(self) -> Path:
        """The folder of all labs: the built Debian tree lies here."""
        return self.cache / "lab"

    @property
    def folder(self) -> Path:
        """This lab's own folder: everything below it belongs to it and goes with ``clean``."""
        return self.shared if self.name == DEFAULT_NAME else self.cache / f"lab-{self.name}"

    @property
    def tree(self) -> Path:
        return self.shared / f"tree-{SUITE}"

    @property
    def nodes(self) -> Path:
        return self.folder / "nodes"

    @property
    def logs(self) -> Path:
        return self.folder / "log"

    @property
    def state_file(self) -> Path:
        return self.folder / "state.json"

    @property
    def key(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def netns(self) -> Path:
        """File on which the lab's network namespace is held."""
        return self.folder / "netns"

    def root_of(self, node: str) -> Path:
        return self.nodes / node

    def machine(self, node: str) -> str:
        """Name by which the container's processes are found again (unique among labs)."""
        return f"{self.name}-{node}"

    def group(self, node: str) -> str:
        """Name of the container's control group; another checkout's lab of the same name has other ones."""
        return f"{self.name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}-{node}"

    @property
    def control_path(self) -> Path:
        """OpenSSH's connection-sharing sockets; ``%C`` is 40 characters, a temporary suffix 17, a socket path 107."""
        near = self.folder / "ssh"
        if len(str(near)) + 1 + 40 + 17 < 107:
            return near / "%C"
        return Path(f"/tmp/{self.name}-{os.getuid()}/%C")  # noqa: S108 - 0700, only where the folder's path is too long

    def ssh_options(self) -> list[str]:
        """Options that keep the user's own OpenSSH settings and known hosts out of it."""
        values = {
            "UserKnownHostsFile": self.known_hosts,
            "StrictHostKeyChecking": "yes",
            "IdentityFile": self.key,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "LogLevel": "ERROR",
            "ControlMaster": "auto",
            "ControlPersist": "60s",
            "ControlPath": self.control_path,
        }
        return ["-F", "/dev/null", *(part for key, value in values.items() for part in ("-o", f"{key}={value}"))]


def settings() -> Settings:
    """Settings from the environment. Raises `UsageError` for a name or folder that cannot work."""
    name = os.environ.get("ORGANISM_LAB_NAME", DEFAULT_NAME)
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"ORGANISM_LAB_NAME={name!r} is no interface name", "use up to 14 lower-case letters and digits"
        )
    cache = Path(os.environ.get("ORGANISM_CACHE") or REPO / ".cache").resolve()
    if any(character.isspace() or character in "'\"%\\" for character in str(cache)):
        raise UsageError(
            f"the folder {cache} has white space or a quote in its path, which OpenSSH options cannot carry",
            "set ORGANISM_CACHE to another folder, for example ORGANISM_CACHE=/var/cache/organism",
        )
    return Settings(name=name, cache=cache)


def load_state(where: Settings) -> State | None:
    """The running (or half-made) lab, or None when there is none. Raises `LabError` when the file cannot be read."""
    try:
        raw = json.loads(where.state_file.read_text(encoding="utf-8"))
        nodes = tuple(Node(node["name"], node["address"], tuple(node["groups"])) for node in raw["nodes"])
        return State(name=raw["name"], subnet=raw["subnet"], gpus=raw["gpus"], nodes=nodes)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{where.state_file} is damaged: {error}", "remove the lab with `./run clean`") from error


def save_state(where: Settings, state: State) -> None:
    """Write the state in one step: readers see the old or the new one."""
    temporary = where.state_file.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    temporary.replace(where.state_file)


def require_state(where: Settings) -> State:
    """The lab's state; `LabError` when no lab was made."""
    state = load_state(where)
    if state is None:
        raise LabError(f"there is no lab {where.name!r}", "make one with `./run lab up` (or `./run demo`)")
    return state


def plan_nodes(subnet: str, bus: int, pool: int) -> tuple[Node, ...]:
    """The nodes of a lab: ``bus`` of 1, 3 or 5 (JetStream needs an odd quorum), ``pool`` of 1 to 9.

    The first bus node is the conductor too. Bus nodes have the addresses .11 and up, pool nodes .21 and up, so that a
    node keeps its address when others are added.
    """
    if bus not in (1, 3, 5):
        raise UsageError(f"--bus {bus}: a JetStream bus has 1, 3 or 5 nodes", "an even number adds no safety")
    if not 1 <= pool <= 9:
        raise UsageError(f"--pool {pool}: the lab has 1 to 9 pool nodes")
    base = ipaddress.IPv4Network(subnet).network_address
    nodes = []
    for kind, count, offset in zip(_KINDS, (bus, pool), (10, 20), strict=True):
        for number in range(1, count + 1):
            groups = ("gpu_pool",) if kind == "pool" else ("bus", "conductor") if number == 1 else ("bus",)
            nodes.append(Node(f"{kind}{number}", str(base + offset + number), groups))
    return tuple(nodes)
