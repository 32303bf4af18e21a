# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of the guard, ``/etc/organism/guard.json``: written by the module ``vm_guard``, read at each start of a VM.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ._guard import POLICIES
from ._root import Root

CONFIG = "/etc/organism/guard.json"
FORMAT = 1
MODES = ("train", "infer")
"""Words of ``mlmode``."""

ENFORCE, REPORT = "enforce", "report"
PROFILE_KEYS = ("memory", "cores", "sockets", "numa", "cpu", "balloon", "agent")


class GuardConfigError(ValueError):
    """The settings cannot be used; the text names the place and the next step."""


@dataclass(frozen=True)
class GroupWish:
    """``members``: names or VMIDs of VMs."""

    name: str
    policy: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """Sizes in MiB, times in seconds.

    ``reserve``: what the host itself needs. ``limit``: for the sum of VMs alone, 0: none. ``claims``: what else takes
    memory. ``deadline`` bounds one request as a whole. ``modes``: word of mlmode to its VM. ``profile``: VM to what it
    shall have. ``host_total``: what the memory plan was made for, 0: not said.
    """

    groups: tuple[GroupWish, ...] = ()
    memory: bool = True
    reserve: int = 2048
    limit: int = 0
    claims: Mapping[str, int] = field(default_factory=dict)
    share_functions: bool = False
    shutdown_timeout: float = 60.0
    stop_timeout: float = 30.0
    lock_wait: float = 150.0
    start_wait: float = 180.0
    deadline: float = 240.0
    watchdog: str = ENFORCE
    modes: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    host_total: int = 0

    def text(self) -> str:
        """The settings' file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @property
    def mode_group(self) -> GroupWish | None:
        """The group that holds the VMs of both modes."""
        wanted = set(self.modes.values())
        return next((group for group in self.groups if wanted and wanted <= set(group.members)), None)


def load(root: Root) -> Config:
    """Raises GuardConfigError: rules that cannot be read are not kept, so nothing starts."""
    try:
        raw = json.loads(root.read(CONFIG))
    except FileNotFoundError:
        raise GuardConfigError(f"{CONFIG} is missing; run the role vm_guard again") from None
    except (OSError, ValueError) as error:
        raise GuardConfigError(f"{CONFIG}: {error}; run the role vm_guard again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise GuardConfigError(f"{CONFIG} is not of format {FORMAT}; run the role vm_guard again")
    del raw["format"]
    return from_dict(raw, CONFIG)


def from_dict(raw: Mapping[str, Any], source: str) -> Config:
    """Settings from JSON values. Raises GuardConfigError."""
    unknown = sorted(set(raw) - set(Config.__dataclass_fields__))
    if unknown:
        raise GuardConfigError(f"{source}: {unknown[0]} is no setting of the guard")
    try:
        groups = tuple(
            GroupWish(str(each["name"]), str(each["policy"]), tuple(str(member) for member in each["members"]))
            for each in raw.get("groups", ())
        )
        numbers: dict[str, Any] = {
            name: kind(raw[name])
            for name, kind in {
                "memory": bool,
                "reserve": int,
                "limit": int,
                "share_functions": bool,
                "shutdown_timeout": float,
                "stop_timeout": float,
                "lock_wait": float,
                "start_wait": float,
                "deadline": float,
                "watchdog": str,
                "host_total": int,
            }.items()
            if name in raw
        }
        config = Config(
            groups=groups,
            claims={str(name): int(size) for name, size in raw.get("claims", {}).items()},
            modes={str(mode): str(name) for mode, name in raw.get("modes", {}).items()},
            profile={str(name): dict(values) for name, values in raw.get("profile", {}).items()},
            **numbers,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GuardConfigError(f"{source}: {error!r} is not as the guard's settings are; see role vm_guard") from error
    check(config, source)
    return config


def check(config: Config, source: str) -> None:
    """Raises GuardConfigError for settings that contradict themselves."""
    names = [group.name for group in config.groups]
    for group in config.groups:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", group.name):
            raise GuardConfigError(f"{source}: {group.name!r} is no name of a group: letters, digits, _ and -")
        if names.count(group.name) > 1:
            raise GuardConfigError(f"{source}: group {group.name} is there twice")
        if group.policy not in POLICIES:
            raise GuardConfigError(f"{source}: group {group.name}: policy {group.policy!r} is not preempt or refuse")
        if len(set(group.members)) != len(group.members) or len(group.members) < 2:
            raise GuardConfigError(f"{source}: group {group.name} needs two VMs or more, each named once")
    if wrong := sorted(set(config.modes) - set(MODES)):
        raise GuardConfigError(f"{source}: {wrong[0]!r} is no mode; modes are {', '.join(MODES)}")
    if config.modes and config.mode_group is None:
        raise GuardConfigError(f"{source}: no group has all VMs of the modes: {', '.join(config.modes.values())}")
    for name, values in config.profile.items():
        if wrong := sorted(set(values) - set(PROFILE_KEYS)):
            raise GuardConfigError(f"{source}: profile of {name}: {wrong[0]!r} is not one of {', '.join(PROFILE_KEYS)}")
    if config.watchdog not in (ENFORCE, REPORT):
        raise GuardConfigError(f"{source}: watchdog is enforce or report, not {config.watchdog!r}")
    sizes = {"reserve": config.reserve, "limit": config.limit, "host_total": config.host_total, **config.claims}
    if negative := sorted(name for name, size in sizes.items() if size < 0):
        raise GuardConfigError(f"{source}: {negative[0]} is less than 0 MiB")
    for name in ("shutdown_timeout", "stop_timeout", "lock_wait", "start_wait", "deadline"):
        if not 0 < getattr(config, name) <= 3600:
            raise GuardConfigError(f"{source}: {name} is seconds between 0 and an hour")
    if config.deadline < config.shutdown_timeout + config.stop_timeout:
        raise GuardConfigError(
            f"{source}: within a deadline of {config.deadline:g} s no VM can be shut down "
            f"({config.shutdown_timeout:g} s) and then stopped ({config.stop_timeout:g} s)"
        )
