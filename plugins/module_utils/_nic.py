# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reads a physical port's settings, and sets one: sysfs for queues, SIOCETHTOOL for the driver, ``tc`` for disciplines.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import json
from typing import Any

from . import _cpu_list, _netdev
from ._ethtool import COALESCE, OFFLOADS, Ethtool
from ._netdev import NET
from ._nic_plan import Port, Value
from ._root import Root
from ._systemd import CommandError, Runner, run_command

_QUEUE_FILE = {"rps": "rps_cpus", "rfs": "rps_flow_cnt", "xps": "xps_cpus"}
# what a driver or kernel says to a setting that it does not have
_ABSENT = (errno.EOPNOTSUPP, errno.ENOENT, errno.ENODEV)


class NicError(Exception):
    """The kernel or driver refused a value; the text names port, setting and value."""


class NotSupported(NicError):
    """It refused because it has no such setting."""


class Nics:
    """The hand that touches ports."""

    def __init__(self, root: Root, ethtool: Ethtool | None = None, run: Runner = run_command) -> None:
        self.root = root
        self._ethtool = ethtool or Ethtool()
        self._run = run

    def isolated(self) -> tuple[int, ...]:
        """CPUs that RPS must not use: isolated from the scheduler's domains, or ``nohz_full``."""
        cpus: set[int] = set()
        for file in ("isolated", "nohz_full"):
            text = self.root.read_or_none(f"/sys/devices/system/cpu/{file}")
            if text and text.strip() != "(null)":  # what some kernels print for "none"
                cpus.update(_cpu_list.parse(text))
        return tuple(sorted(cpus))

    def online(self) -> tuple[int, ...]:
        return _cpu_list.parse(self.root.read_or_none("/sys/devices/system/cpu/online") or "")

    def observe(self, name: str, *, tc: bool) -> Port:
        """A port as it is; ``tc``: also its queueing discipline. Raises OSError, CommandError."""
        values: dict[str, Value] = {}
        counts = {}
        for direction, kinds in (("rx", ("rps", "rfs")), ("tx", ("xps",))):
            found = _netdev.queues(self.root, name, direction)
            counts[direction] = len(found)
            for queue in found:
                for kind in kinds:
                    text = self.root.read_or_none(f"{NET}/{name}/queues/{queue}/{_QUEUE_FILE[kind]}")
                    if text is not None:
                        value = int(text) if kind == "rfs" else _cpu_list.render(_cpu_list.from_mask(text))
                        values[f"{kind}/{queue}"] = value
        channels = self._ethtool.channels(name)
        if channels is not None and channels.max_combined:
            values["channels/combined"] = channels.combined
        elif channels is not None:
            values |= {"channels/rx": channels.rx, "channels/tx": channels.tx}
        for key, number in (self._ethtool.coalesce(name) or {}).items():
            values[f"coalesce/{key}"] = number
        for key in OFFLOADS:
            on = self._ethtool.offload(name, key)
            if on is not None:
                values[f"offload/{key}"] = on
        if tc:
            values["qdisc"] = describe(self._qdiscs(name))
        driver = self.root.link_name(f"{NET}/{name}/device/driver") or ""
        return Port(name, driver, _netdev.address(self.root, name), counts["rx"], counts["tx"], values, channels)

    def set(self, port: str, key: str, value: Value) -> None:
        """Raises NotSupported or NicError."""
        kind, _slash, what = key.partition("/")
        try:
            if kind in _QUEUE_FILE:
                text = str(value) if kind == "rfs" else _cpu_list.mask(_cpu_list.parse(str(value)))
                path = self.root.path(f"{NET}/{port}/queues/{what}/{_QUEUE_FILE[kind]}")
                path.write_text(text + "\n", encoding="ascii")
            elif kind == "channels":
                self._set_channels(port, what, int(value))
            elif kind == "coalesce" and what in COALESCE:
                self._ethtool.set_coalesce(port, {what: int(value)})
            elif kind == "offload" and what in OFFLOADS:
                self._ethtool.set_offload(port, what, bool(value))
            elif kind == "qdisc":
                self._set_qdisc(port, str(value))
            else:
                raise NicError(f"{port}: {key} is no setting of a port")
        except OSError as error:
            said = f"{port}: {key} = {value!r}: {error.strerror or error}"
            raise (NotSupported if error.errno in _ABSENT else NicError)(said) from error
        except CommandError as error:
            missing = "kind is unknown" in str(error)
            raise (NotSupported if missing else NicError)(f"{port}: {key} = {value!r}: {error}") from error

    def _set_channels(self, port: str, what: str, number: int) -> None:
        now = self._ethtool.channels(port)
        if now is None:
            raise OSError(errno.EOPNOTSUPP, "the driver has no channels to set")
        self._ethtool.set_channels(
            port,
            rx=number if what == "rx" else now.rx,
            tx=number if what == "tx" else now.tx,
            combined=number if what == "combined" else now.combined,
        )

    def _qdiscs(self, port: str) -> list[dict[str, Any]]:
        raw = json.loads(self._run(["tc", "-json", "qdisc", "show", "dev", port]) or "[]")
        return [entry for entry in raw if isinstance(entry, dict) and "kind" in entry]

    def _set_qdisc(self, port: str, wanted: str) -> None:
        """``mq:fq``, ``fq``, or the default that the kernel itself attaches."""
        now = self._qdiscs(port)
        first, _colon, child = wanted.partition(":")
        if first != "mq":
            # deleting the root brings back the kernel's default, which mostly is what was there before
            if not wanted or any(entry.get("root") and entry["handle"] != "0:" for entry in now):
                self._run(["tc", "qdisc", "del", "dev", port, "root"])
            if wanted and describe(self._qdiscs(port)) != wanted:
                self._run(["tc", "qdisc", "replace", "dev", port, "root", wanted])
            return
        root = next((entry for entry in now if entry.get("root")), None)
        if root is not None and root["handle"] != "0:" and describe(now) != wanted:
            # back to the kernel's own mq first: its children are of the default kind
            self._run(["tc", "qdisc", "del", "dev", port, "root"])
            if describe(self._qdiscs(port)) == wanted:
                return
        handle = "1:"
        self._run(["tc", "qdisc", "replace", "dev", port, "root", "handle", handle, "mq"])
        if describe(self._qdiscs(port)) != wanted and "," not in child:
            for number in range(len(_netdev.queues(self.root, port, "tx"))):
                parent = f"{handle}{number + 1:x}"
                self._run(["tc", "qdisc", "replace", "dev", port, "parent", parent, child])


def describe(qdiscs: list[dict[str, Any]]) -> str:
    """``fq``, ``mq:fq``, ``mq:fq,pfifo_fast``; empty when there is none. Those of ingress are no concern of ours."""
    root = next((entry for entry in qdiscs if entry.get("root")), None)
    if root is None or root["kind"] in ("noqueue", "noop"):
        return ""
    if root["kind"] != "mq":
        return str(root["kind"])
    # the default mq has handle 0:, and its children the parents :1, :2, ...
    major = str(root["handle"]).partition(":")[0]
    parents = (major, "") if major == "0" else (major,)
    kinds = {str(entry["kind"]) for entry in qdiscs if str(entry.get("parent", "-")).partition(":")[0] in parents}
    return "mq:" + ",".join(sorted(kinds))
