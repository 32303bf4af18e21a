# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the arguments of a module or a role, as YAML gives them, to a wish with values in normal form.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._host_files import FileWish
from ._host_settings import SettingsRefused, Wish
from ._kernel_value import normal
from ._unit_state import UnitWish

_ENABLED = {"true": "enabled", "false": "disabled", "masked": "masked"}


def values(mapping: Mapping[str, Any], what: str) -> dict[str, str]:
    """Kernel values by name or path. Raises SettingsRefused on a value that is not one."""
    wrong = [name for name, value in mapping.items() if not isinstance(value, (str, int, bool))]
    if wrong:
        raise SettingsRefused([f"{what} {name}: a text, a number or a boolean is needed" for name in wrong])
    return {str(name): normal(value) for name, value in mapping.items()}


def enabled(value: Any) -> str | None:
    """true, false (also as text) or masked; None leaves it."""
    if value is None:
        return None
    try:
        return _ENABLED[str(value).lower()]
    except KeyError:
        raise SettingsRefused([f"enabled is true, false or masked, not {value!r}"]) from None


def wish_from(arguments: Mapping[str, Any]) -> Wish:
    """A wish from a mapping with the names of the module's options. Raises SettingsRefused."""
    return Wish(
        capability=arguments["capability"],
        sysctl=values(arguments.get("sysctl") or {}, "sysctl"),
        sysctl_file=arguments.get("sysctl_file") or "",
        sysfs=values(arguments.get("sysfs") or {}, "sysfs"),
        sysfs_optional=values(arguments.get("sysfs_optional") or {}, "sysfs"),
        live=values(arguments.get("live") or {}, "sysfs"),
        files=tuple(
            FileWish(file["path"], file["content"], file.get("mode") or "0644") for file in arguments.get("files") or []
        ),
        modules=tuple(arguments.get("modules") or ()),
        units=tuple(
            UnitWish(
                name=unit["name"],
                enabled=enabled(unit.get("enabled")),
                active=unit.get("active"),
                optional=bool(unit.get("optional")),
                expected=bool(unit.get("expected")),
                restart_on=tuple(unit.get("restart_on") or ()),
            )
            for unit in arguments.get("units") or []
        ),
        udev_trigger=tuple(arguments.get("udev_trigger") or ()),
    )
