# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a VM's configuration and named wishes to the one change that is needed; pure.

Only what is named is managed. A property string is read, the named sub-options are changed in it, and the rest stays as
it was written: the MAC of a network device, the volume of a drive, sub-options that nobody named. A volume is never
replaced and never shrunk.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from . import _cpu_list
from . import _pve_vm_keys as keys
from ._difference import Difference
from ._pve_strings import DEFAULT_KEYS, NET_ALIAS, Part, PropertyString, StringError, kind, parse_option

Wish: TypeAlias = "str | dict[str, str | None] | None"
"""A value; None removes the option; a dict names sub-options (None removes one)."""

ALLOCATES = re.compile(r"(?:[^/:\s]+:)?(?:\d+(?:\.\d+)?|cloudinit)")
"""A drive's ``file`` that asks for a new volume: ``STORAGE:GIB`` or ``STORAGE:cloudinit`` (NEW_DISK_RE of Drive.pm)."""

_AT_CREATION = {"efidisk": ("efitype", "ms-cert", "pre-enrolled-keys", "format"), "tpmstate": ("version", "format")}
"""Sub-options that describe what a volume was made with: changing them later changes words, not the volume."""

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


class WishRefused(ValueError):
    """What is wished for makes no sense or would destroy something; the text has a sentence for each problem."""


@dataclass
class ConfigPlan:
    """What to send. ``sets``: option to text; ``deletes``: options; ``grows``: drive to its wanted size.

    ``kept``: sentences about what was named and stays as it is.
    """

    sets: dict[str, str] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    grows: dict[str, str] = field(default_factory=dict)
    difference: Difference = field(default_factory=Difference)
    kept: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.sets or self.deletes or self.grows)

    @property
    def allocates(self) -> bool:
        """Whether a volume is made, which may take minutes."""
        return any(
            kind(option) in keys.DRIVES and ("import-from=" in text or ALLOCATES.match(text))
            for option, text in self.sets.items()
        )

    def options(self) -> list[str]:
        return sorted({*self.sets, *self.deletes, *self.grows})

    def part(self, wanted: Callable[[str], bool]) -> ConfigPlan:
        """What it changes of some options."""
        return ConfigPlan(
            {option: value for option, value in self.sets.items() if wanted(option)},
            [option for option in self.deletes if wanted(option)],
            {option: size for option, size in self.grows.items() if wanted(option)},
            self.difference,
            self.kept,
        )


def read_wishes(raw: Mapping[str, Any]) -> dict[str, Wish]:
    """Check names and types. Raises WishRefused with all problems at once."""
    wishes: dict[str, Wish] = {}
    problems: list[str] = []
    for option, value in raw.items():
        try:
            keys.check_name(option)
            wishes[option] = _wish(option, value)
        except (keys.KeyRefused, StringError) as error:
            problems.append(str(error))
    if problems:
        raise WishRefused("; ".join(problems))
    return wishes


def _wish(option: str, value: Any) -> Wish:
    if value is None:
        return None
    if not keys.is_string(option):
        if isinstance(value, Mapping):
            raise keys.KeyRefused(f"{option}: it takes one value, not sub-options")
        if option == "affinity":
            try:
                return _cpu_list.normalise(str(value))
            except _cpu_list.CpuListError as error:
                raise keys.KeyRefused(f"affinity: {error}") from error
        return keys.text(option, None, value)
    if isinstance(value, Mapping):
        named = dict(value)
    elif isinstance(value, (list, tuple)) and option == "boot":
        named = {"order": value}
    else:
        default = DEFAULT_KEYS.get(kind(option))
        written = keys.text(option, default, value) if isinstance(value, bool) and default else str(value)
        named = dict(parse_option(option, written).as_dict())
    parts: dict[str, str | None] = {}
    for sub, wanted in named.items():
        own = keys.check_sub(option, str(sub))
        parts[own] = None if wanted is None else keys.text(option, own, wanted)
    return parts


def plan(config: Mapping[str, Any], wishes: Mapping[str, Wish]) -> ConfigPlan:
    """The change from a configuration as ``GET .../config`` returns it (pending changes merged) to the wishes.

    Raises WishRefused.
    """
    made = ConfigPlan()
    problems: list[str] = []
    for option, wish in wishes.items():
        present = None if config.get(option) is None else str(config[option])
        try:
            _one(made, option, present, wish)
        except (WishRefused, StringError) as error:
            problems.append(str(error))
    if problems:
        raise WishRefused("; ".join(problems))
    return made


def _one(made: ConfigPlan, option: str, present: str | None, wish: Wish) -> None:
    if wish is None:
        if present is not None:
            made.deletes.append(option)
            made.difference.add(option, present, None)
        return
    if isinstance(wish, dict):
        after = _merge(made, option, present, wish)
    else:
        after = None if same(option, None, wish, present) else wish
        if after is not None and option == "sshkeys":
            made.sets[option] = quote(after, safe="")
            made.difference.add(option, unquote(present) if present else None, after)
            return
    if after is not None:
        made.sets[option] = after
        made.difference.add(option, present, after)


def _merge(made: ConfigPlan, option: str, present: str | None, wish: dict[str, str | None]) -> str | None:
    """The new text of a property string; None when nothing in it changes."""
    of = kind(option)
    drive = of in keys.DRIVES
    if present is None:
        named = {sub: value for sub, value in wish.items() if value is not None}
        if drive:
            named = _new_drive(option, named, made)
        if not named or all(same(option, sub, value, None) for sub, value in named.items()):
            return None
        return _compose(option, named)
    old = parse_option(option, present)
    changes: dict[str, str | None] = {}
    for sub, value in wish.items():
        if drive and sub in ("file", "size", "import-from", *_AT_CREATION.get(of, ())):
            _of_volume(made, option, old, sub, value)
        elif not same(option, sub, value, old.get(sub)):
            changes[sub] = value
    if of == "hostpci" and changes.get("mapping") and "host" in old:
        changes.setdefault("host", None)
    if of == "hostpci" and changes.get("host") and "mapping" in old:
        changes.setdefault("mapping", None)
    if not changes:
        return None
    return old.with_(changes).render()


def _compose(option: str, named: Mapping[str, str]) -> str:
    """A property string from nothing: the default key first and bare, a network model with its MAC as its alias."""
    of = kind(option)
    default = DEFAULT_KEYS.get(of)
    rest = dict(named)
    parts: list[Part] = []
    if of == "net" and "macaddr" in rest and rest.get("model") in NET_ALIAS.names:
        parts.append(Part(rest.pop("model"), rest.pop("macaddr")))
    elif default in rest and default is not None:
        parts.append(Part(default, rest.pop(default), bare=True))
    parts += [Part(sub, value) for sub, value in rest.items()]
    for part in parts:
        if "," in part.value or "\n" in part.value:
            raise StringError(f"{option}: {part.key}={part.value!r} has a comma or newline, which cannot be written")
    return PropertyString(tuple(parts)).render()


def _new_drive(option: str, named: dict[str, str], made: ConfigPlan) -> dict[str, str]:
    """A drive that is not there yet: ``size`` is a growth after the volume was made or imported."""
    if "file" not in named:
        raise WishRefused(
            f"{option}: the VM has no such drive, and file says not what to make: file: STORAGE:GIB for a new volume, "
            "STORAGE:0 with import-from for an image, or an existing volume"
        )
    size = named.pop("size", None)
    if size and "import-from" in named:
        made.grows[option] = size
    elif size and ALLOCATES.fullmatch(named["file"]) and not named["file"].endswith("cloudinit"):
        asked = float(named["file"].rpartition(":")[2]) * 1024**3
        if asked and size_bytes(size) > asked:
            made.grows[option] = size
        elif not asked:
            raise WishRefused(f"{option}: {named['file']} makes nothing; write the size there: STORAGE:GIB")
    return named


def _of_volume(made: ConfigPlan, option: str, old: PropertyString, sub: str, value: str | None) -> None:
    """What a wish means for a volume that exists: it may grow, and nothing else."""
    now = old.get("file") or ""
    if sub == "size":
        have = old.get("size")
        if value is None:
            return
        if have is None:
            raise WishRefused(
                f"{option}: Proxmox VE does not say the size of {now}, so it cannot be compared; leave out size"
            )
        if size_bytes(value) < size_bytes(have):
            raise WishRefused(
                f"{option}: {now} has {have}, and {value} would shrink it, which destroys data; volumes only grow"
            )
        if size_bytes(value) > size_bytes(have):
            made.grows[option] = value
            made.difference.add(f"{option} size", have, value)
    elif sub == "file":
        if value is None:
            raise WishRefused(f"{option}: a drive without file is none; null for {option} detaches it")
        if not ALLOCATES.fullmatch(value) and value != now:
            raise WishRefused(
                f"{option}: it has {now}, and {value} would take its place; volumes are not replaced. "
                f"Detach it first ({option}: null, it stays as unused disk), or name the volume that is there"
            )
    elif sub != "import-from" and value is not None and not same(option, sub, value, old.get(sub)):
        told = old.get(sub) or keys.SUB_DEFAULTS.get(kind(option), {}).get(sub, "unset")
        made.kept.append(f"{option}: {sub} stays {told}, as {now} was made with it ({value} is for a new volume)")


def same(option: str, sub: str | None, wanted: str | None, present: str | None) -> bool:
    """Whether two values of an option (or of its sub-option) mean the same to Proxmox VE; None is not there."""
    of = kind(option)
    default = keys.SUB_DEFAULTS.get(of, {}).get(sub) if sub else keys.DEFAULTS.get(option)
    if wanted is None:
        return present is None
    if present is None:
        return default is not None and _equal(option, sub, wanted, default)
    return _equal(option, sub, wanted, present)


def _equal(option: str, sub: str | None, wanted: str, present: str) -> bool:
    if wanted == present:
        return True
    of = kind(option)
    if of == "machine" and sub == "type":
        # q35 means "the newest"; a pinned version of that family was chosen by somebody, or is kept for Windows
        family = {"q35": "pc-q35-", "pc": "pc-i440fx-"}.get(wanted)
        return family is not None and present.startswith(family)
    if option == "affinity":
        return _cpu_list.normalise(wanted) == _cpu_list.normalise(present)
    if option == "tags":
        return _tags(wanted) == _tags(present)
    if option == "sshkeys":
        return _lines(wanted) == _lines(unquote(present))
    if option == "description":
        return wanted.rstrip("\n") == present.rstrip("\n")
    if option == "hotplug":
        return set(wanted.split(",")) == set(present.split(","))
    if sub in ("macaddr", "wwn") or (of == "smbios" and sub == "uuid"):
        return wanted.lower() == present.lower()
    if of == "hostpci" and sub == "host":
        return addresses(wanted) == addresses(present)
    type_of = keys.SUB_OPTIONS[of].get(sub) if sub else keys.SCALARS.get(of)
    if type_of == "n":
        return float(wanted) == float(present)
    if type_of == "b":
        return keys.text(option, sub, present) == wanted
    return False


def addresses(host: str) -> tuple[str, ...]:
    """The PCI addresses of ``host=`` with their domain, in lower case: ``01:00`` is ``0000:01:00``."""
    return tuple(each if each.count(":") == 2 else f"0000:{each}" for each in host.lower().split(";"))


def _tags(text: str) -> set[str]:
    return {tag.lower() for tag in re.split(r"[;,\s]+", text) if tag}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def size_bytes(text: str) -> float:
    """Bytes of Proxmox VE's sizes: ``64G``, ``528K``, a bare number is bytes. Raises WishRefused."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.strip())
    if not found:
        raise WishRefused(f"size {text!r} is none; write it like 64G")
    return float(found[1]) * _UNITS[found[2]]
